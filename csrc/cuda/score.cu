// The loss of each task with its gradients, and their derivative along a direction: one launch, a block a task.
//
// Shared and device memory as in network.cu.
#include "launch.h"
#include "task.h"

namespace maml_ext::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    score(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  task.start(false);
  const T loss = task.template score<T>(call.query, false, call.to_theta || call.query.to_x, true, 1);
  if (threadIdx.x == 0) call.loss[task.task] = loss;
  if (call.to_theta) task.store_slope(call.to_theta + task.task * plan.parameters);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    score_tangent(const __grid_constant__ Plan plan, const __grid_constant__ Call<T> call) {
  DYNAMIC_SHARED(shared);
  const Task<T> task(plan, call, shared);
  task.start(true);
  task.template score<Dual<T>>(call.query, false, true, false, 1);
  task.store_slope(call.to_theta + task.task * plan.parameters);
}

template <class T>
cudaError_t run_score(const Plan& plan, const Call<T>& call, Grid grid) {
  return launch(call.mode == kScore ? score<T> : score_tangent<T>, grid, plan, call);
}
template cudaError_t run_score(const Plan&, const Call<float>&, Grid);
template cudaError_t run_score(const Plan&, const Call<double>&, Grid);

}  // namespace maml_ext::cuda
