// The inner loop of all tasks in one launch, and its adjoint recursion in another: a block a task.
//
// Shared memory holds theta for all K steps, the values of the chunk's samples, gradients, and in the recursion the
// direction rate * lambda and the tangents of all these. Device memory: the inner loop reads theta_0 and the samples
// and writes theta_1 .. theta_K, P numbers a step and task. The recursion reads theta_k, P numbers a step, and keeps
// lambda there, which each thread reads and writes a share of: 3 P numbers a step (from the second level cache, where
// the lambdas of all tasks fit).
#include "launch.h"
#include "task.h"

namespace maml_ext::cuda {

// Steps begin .. end of the inner loop, and where their vectors [T, P] are: of step k at k - begin.
template <class T>
struct Steps {
  int64_t begin, end;
  T* theta[kStepsOfALaunch];            // adapt: theta_{k+1}, written; adjoint: theta_k, null for theta_0
  const T* cotangent[kStepsOfALaunch];  // adjoint: of theta_{k+1}, or null
  const T* start;                       // adapt: theta_begin, null for theta_0
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    adapt(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call,
          const __grid_constant__ Steps<T> steps) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  task.load_parameters(steps.start ? task.of_task(steps.start, false) : task.of_task(call.theta, call.shared));
  task.load_constants();
  __syncthreads();
  for (int64_t k = steps.begin; k < steps.end; k++) {
    task.clear_slopes();
    task.template score<T>(task.alone(call.support), k > steps.begin, true, false, 1);
    task.update(k, steps.theta[k - steps.begin] + task.task * plan.parameters);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    adjoint(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call,
            const __grid_constant__ Steps<T> steps) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  T* const lambda = call.to_theta + task.task * plan.parameters;
  task.load_constants();
  for (int64_t k = steps.end; k-- > steps.begin;) {
    const T *theta = steps.theta[k - steps.begin], *cotangent = steps.cotangent[k - steps.begin];
    task.load_parameters(theta ? task.of_task(theta, false) : task.of_task(call.theta, call.shared));
    if (cotangent)
      each_parameter(
          plan, [&](int64_t at) { return lambda[at] + task.of_task(cotangent, false)[at]; },
          [&](int, int64_t at, T sum) { lambda[at] = sum; });
    task.step_back(k, k < steps.end - 1, lambda);
  }
}

template <class T>
cudaError_t run_adapt(const Plan& plan, const Call<T>& call, Grid grid) {
  cudaError_t error = cudaSuccess;
  for (int64_t begin = 0; begin < call.steps && error == cudaSuccess; begin += kStepsOfALaunch) {
    Steps<T> steps{begin,
                   begin + kStepsOfALaunch < call.steps ? begin + kStepsOfALaunch : call.steps,
                   {},
                   {},
                   begin ? call.to_trajectory[begin - 1] : nullptr};
    for (int64_t k = begin; k < steps.end; k++) steps.theta[k - begin] = call.to_trajectory[k];
    error = launch(adapt<T>, grid, plan, call, steps);
  }
  return error;
}

// Call::to_theta is zeros before.
template <class T>
cudaError_t run_adjoint(const Plan& plan, const Call<T>& call, Grid grid) {
  cudaError_t error = cudaSuccess;
  for (int64_t end = call.steps; end > 0 && error == cudaSuccess; end -= kStepsOfALaunch) {
    Steps<T> steps{end > kStepsOfALaunch ? end - kStepsOfALaunch : 0, end, {}, {}, nullptr};
    for (int64_t k = steps.begin; k < end; k++) {
      steps.theta[k - steps.begin] = k ? const_cast<T*>(call.trajectory[k - 1]) : nullptr;
      steps.cotangent[k - steps.begin] = call.cotangents[k];
    }
    error = launch(adjoint<T>, grid, plan, call, steps);
  }
  return error;
}

static_assert(sizeof(Plan) + sizeof(Call<double>) + sizeof(Steps<double>) <= 4096, "parameters of a kernel");

#define INSTANTIATE(T)                                               \
  template cudaError_t run_adapt(const Plan&, const Call<T>&, Grid); \
  template cudaError_t run_adjoint(const Plan&, const Call<T>&, Grid);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace maml_ext::cuda
