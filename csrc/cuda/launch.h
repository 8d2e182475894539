// What the host calls: launchers on raw device pointers, with no torch header. Each returns CUDA's error.
#pragma once

#include "plan.h"

namespace maml_ext::cuda {

// The inner loop of so many steps runs in one launch; longer ones go on in another.
constexpr int kStepsOfALaunch = 64;

struct Grid {
  int64_t tasks, bytes;  // a block each; of shared memory
  int threads;
  cudaStream_t stream;
};

// kPredict, kPull, kPullTangent
template <class T>
cudaError_t run_network(const Plan& plan, const Call<T>& call, Grid grid);
// kScore, kScoreTangent
template <class T>
cudaError_t run_score(const Plan& plan, const Call<T>& call, Grid grid);
// kAdapt, kAdjoint. Call::to_rates is [T, rate_rows, 1 or P] here: a sum for each task.
template <class T>
cudaError_t run_adapt(const Plan& plan, const Call<T>& call, Grid grid);
template <class T>
cudaError_t run_adjoint(const Plan& plan, const Call<T>& call, Grid grid);
// kMeta, with `trajectory` [steps, T, P] and `lambda` [T, P] of its own; to_rates as above, to_theta is not used.
template <class T>
cudaError_t run_meta(const Plan& plan, const Call<T>& call, T* trajectory, T* lambda, Grid grid);
// to[i] = sum over tasks of from[t][i], in the order of tasks.
template <class T>
cudaError_t sum_tasks(const T* from, T* to, int64_t tasks, int64_t count, cudaStream_t stream);

// One block a task with this much shared memory.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, Parameters... arguments) {
  if (grid.tasks > 0x7fffffff) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.tasks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.bytes);
  config.stream = grid.stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace maml_ext::cuda
