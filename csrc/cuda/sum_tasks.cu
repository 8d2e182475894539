// Sums over tasks of what they share: a thread adds up one element, task after task, so that the order is always the
// same. Neighbouring threads read neighbouring elements; tasks x count numbers are read once.
#include "launch.h"

namespace maml_ext::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sum_over_tasks(const T* from, T* to, int64_t tasks, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    T sum = 0;
    for (int64_t t = 0; t < tasks; t++) sum += from[t * count + i];
    to[i] = sum;
  }
}

template <class T>
cudaError_t sum_tasks(const T* from, T* to, int64_t tasks, int64_t count, cudaStream_t stream) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  if (!blocks) return cudaSuccess;
  return launch(sum_over_tasks<T>, {blocks < 65536 ? blocks : 65536, 0, kThreads, stream}, from, to, tasks, count);
}
template cudaError_t sum_tasks(const float*, float*, int64_t, int64_t, cudaStream_t);
template cudaError_t sum_tasks(const double*, double*, int64_t, int64_t, cudaStream_t);

}  // namespace maml_ext::cuda
