// The meta-gradient of all tasks in one launch, whatever the number of steps: a block a task adapts, scores its query
// set and runs the adjoint recursion. A second launch sums over tasks what they share.
//
// Shared memory as in adapt.cu. Device memory: P numbers a step and task are written and read again (the trajectory),
// lambda as in adapt.cu.
#include "launch.h"
#include "task.h"

namespace maml_ext::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    meta(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call, T* trajectory, T* lambda) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  const T* const initial = task.of_task(call.theta, call.shared);
  auto theta = [&](int64_t k) { return trajectory + ((k - 1) * call.tasks + task.task) * plan.parameters; };
  T* const mine = lambda + task.task * plan.parameters;
  task.load_parameters(initial);
  task.load_constants();
  __syncthreads();
  // The score of the query set is one more gradient of the same form.
  for (int64_t k = 0; k <= call.steps; k++) {
    const bool last = k == call.steps;
    task.clear_slopes();
    const T loss = task.template score<T>(last ? call.query : task.alone(call.support), k > 0 && !last, true, last, 1);
    if (!last)
      task.update(k, theta(k + 1));
    else if (threadIdx.x == 0)
      call.loss[task.task] = loss;
  }
  task.store_slope(mine);
  __syncthreads();
  for (int64_t k = call.steps; k-- > 0;) {
    task.load_parameters(k ? theta(k) : initial);
    task.step_back(k, k < call.steps - 1, mine);
  }
}

template <class T>
cudaError_t run_meta(const Plan& plan, const Call<T>& call, T* trajectory, T* lambda, Grid grid) {
  return launch(meta<T>, grid, plan, call, trajectory, lambda);
}
template cudaError_t run_meta(const Plan&, const Call<float>&, float*, float*, Grid);
template cudaError_t run_meta(const Plan&, const Call<double>&, double*, double*, Grid);

}  // namespace maml_ext::cuda
