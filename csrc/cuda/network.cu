// Predictions, their gradients and the derivative of those: one launch, a block a task.
//
// Shared memory: the task's parameters (and for the second derivative their direction), a frame of the values of each
// sample in the chunk (and their tangents), two buffers of gradients that take turns from layer to layer, the gradient
// of the parameters. Device memory: parameters and samples are read once, results written once.
#include "launch.h"
#include "task.h"

namespace maml_ext::cuda {

template <class T, class D>
INLINE void store_prediction(const Task<T>& task, int64_t first, int count) {
  const Plan& plan = task.plan;
  const Array<D> y = task.template value<D>(plan.stages ? plan.stage[plan.stages - 1].out : 0);
  for (int i = threadIdx.x; i < count * plan.outputs; i += blockDim.x) {
    const int n = i / plan.outputs, k = i % plan.outputs;
    task.call.prediction[task.sample(task.call.query, first) * plan.outputs + i] =
        result_of(y.at(n * Stage::pitch(plan.outputs) + k));
  }
}

// The gradient at the predictions is the caller's, and does not change along a direction.
template <class T, class D>
INLINE void seed_cotangent(const Task<T>& task, int64_t first, int count) {
  const Plan& plan = task.plan;
  const Array<D> g = task.template gradient<D>(0);
  for (int i = threadIdx.x; i < count * plan.outputs; i += blockDim.x) {
    const int n = i / plan.outputs, k = i % plan.outputs;
    g.set(n * Stage::pitch(plan.outputs) + k,
          D(task.call.cotangent[task.sample(task.call.query, first) * plan.outputs + i]));
    task.descend(plan.stages - 1, g, n, k);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    predict(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  task.start(false);
  task.template pass<T>(call.query, false, 1, [&](int64_t first, int count) {
    store_prediction<T, T>(task, first, count);
    return false;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    pull(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  task.start(false);
  task.template pass<T>(call.query, false, 1, [&](int64_t first, int count) {
    seed_cotangent<T, T>(task, first, count);
    return true;
  });
  if (call.to_theta) task.store_slope(call.to_theta + task.task * plan.parameters);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    pull_tangent(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  task.start(true);
  task.template pass<Dual<T>>(call.query, false, 1, [&](int64_t first, int count) {
    store_prediction<T, Dual<T>>(task, first, count);
    seed_cotangent<T, Dual<T>>(task, first, count);
    return true;
  });
  task.store_slope(call.to_theta + task.task * plan.parameters);
}

template <class T>
cudaError_t run_network(const Plan& plan, const Call<T>& call, Grid grid) {
  return launch(call.mode == kPredict ? predict<T> : call.mode == kPull ? pull<T> : pull_tangent<T>, grid, plan, call);
}
template cudaError_t run_network(const Plan&, const Call<float>&, Grid);
template cudaError_t run_network(const Plan&, const Call<double>&, Grid);

}  // namespace maml_ext::cuda
