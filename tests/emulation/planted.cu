// Small kernels to try the emulation on, with the bug that the environment variable PLANTED numbers. Rows of numbers
// in, a result for each out.
#include <cstdlib>

#include "platform.h"

namespace planted {

enum Bug : int {
  kNone,
  kReadBeforeWrite,   // a missing barrier
  kWriteAfterRead,    // a missing barrier
  kReusedScratch,     // a missing barrier
  kBehindArray,       // a write
  kBehindMemory,      // a write
  kUninitialised,     // a read
  kDivergentBarrier,
  kSharedResult,      // two blocks write one address
  kOnlyShuffles,      // nothing else between lanes that write and lanes that read
  kDeadLock,          // half of a warp waits for the block, half for the warp
  kEarlyEnd,          // of threads, before a barrier
};
const Bug kBug = Bug(std::getenv("PLANTED") ? std::atoi(std::getenv("PLANTED")) : 0);
constexpr int kThreads = 64, kWarp = 32;

// As large as the plans of real kernels, and like them passed by value.
struct Plan {
  const float* in;
  float* out;
  float* total;  // of all that is in `out`
  int rows, columns;
  int unused[200];
};

// Memory for `count` numbers behind what is carved already.
template <class T>
__device__ T* carve(unsigned char* memory, int& at, int count) {
  T* array = reinterpret_cast<T*>(memory + at);
  const int end = at + count * static_cast<int>(sizeof(T));
  at = (end + kGap + 15) / 16 * 16;
  poison(memory + end, at - end);
  return array;
}

constexpr int carved(int bytes) { return (bytes + kGap + 15) / 16 * 16; }

// Out: the sum of each row, by a tree in shared memory. One block a row.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows(const __grid_constant__ Plan plan) {
  DYNAMIC_SHARED(memory);
  int at = 0;
  T* partial = carve<T>(memory, at, blockDim.x);
  T* sum = carve<T>(memory, at, 1);
  const int t = threadIdx.x, threads = blockDim.x;
  const float* row = plan.in + static_cast<long>(blockIdx.x) * plan.columns;
  T mine = 0;
  for (int i = t; i < plan.columns; i += threads) mine += row[i];
  if (kBug != kUninitialised || t < plan.columns) partial[t] = mine;
  if (kBug == kEarlyEnd && t >= plan.columns) return;
  if (kBug == kBehindArray && t == 0) partial[threads] = 0;
  if (kBug != kReadBeforeWrite) __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (t < half) {
      partial[t] += partial[t + half];
      if (kBug == kDivergentBarrier) __syncthreads();
    }
    __syncthreads();
  }
  if (t == 0) *sum = partial[0];
  if (kBug == kBehindMemory && t == 0) *reinterpret_cast<T*>(memory + at) = 0;
  __syncthreads();
  if (t == threads - 1) {
    plan.out[kBug == kSharedResult ? 0 : blockIdx.x] = *sum;
    atomicAdd(plan.total, static_cast<float>(*sum));
  }
}

// A reduction over the block by shuffles; `scratch` holds a number for each warp. Every thread has the result.
template <class F>
__device__ float reduce(float mine, float* scratch, F combine) {
  const int t = threadIdx.x, warps = blockDim.x / kWarp;
  for (int bits = kWarp / 2; bits > 0; bits /= 2) mine = combine(mine, __shfl_xor_sync(~0u, mine, bits));
  if (kBug != kReusedScratch) __syncthreads();  // the result before this one has been read
  if (t % kWarp == 0) scratch[t / kWarp] = mine;
  __syncthreads();
  float all = scratch[0];
  for (int i = 1; i < warps; i++) all = combine(all, scratch[i]);
  return all;
}

// Out: the Euclidean norm of each row, of numbers scaled by the largest.
__global__ void __launch_bounds__(kThreads) row_norms(const __grid_constant__ Plan plan) {
  DYNAMIC_SHARED(memory);
  int at = 0;
  float* scratch = carve<float>(memory, at, blockDim.x / kWarp);
  const float* row = plan.in + static_cast<long>(blockIdx.x) * plan.columns;
  float largest = 0, squares = 0;
  for (int i = threadIdx.x; i < plan.columns; i += blockDim.x) largest = fmaxf(largest, fabsf(row[i]));
  largest = reduce(largest, scratch, [](float a, float b) { return fmaxf(a, b); });
  for (int i = threadIdx.x; i < plan.columns; i += blockDim.x) squares += row[i] / largest * (row[i] / largest);
  squares = reduce(squares, scratch, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) plan.out[blockIdx.x] = largest / rsqrtf(squares);
}

// Out: the matrix of rows, transposed, by tiles of a warp's width. One block a band of rows.
__global__ void __launch_bounds__(kThreads) transpose(const __grid_constant__ Plan plan) {
  DYNAMIC_SHARED(memory);
  int at = 0;
  float* tile = carve<float>(memory, at, kWarp * (kWarp + 1));
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int top = blockIdx.x * kWarp;
  for (int left = 0; left < plan.columns; left += kWarp) {
    for (int i = warp; i < kWarp; i += warps) {
      if (top + i < plan.rows && left + lane < plan.columns) {
        tile[i * (kWarp + 1) + lane] = plan.in[(top + i) * plan.columns + left + lane];
      }
    }
    __syncthreads();
    for (int i = warp; i < kWarp; i += warps) {
      if (top + lane < plan.rows && left + i < plan.columns) {
        plan.out[(left + i) * plan.rows + top + lane] = tile[lane * (kWarp + 1) + i];
      }
    }
    if (kBug != kWriteAfterRead) __syncthreads();
  }
}

// Out: each row's sum of its first 32 numbers. A warp a row; its halves reduce apart, then together.
__global__ void __launch_bounds__(kThreads) sum_heads(const __grid_constant__ Plan plan) {
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x % kWarp, half = kWarp / 2, row = blockIdx.x;
  const unsigned mask = lane < half ? 0xffffu : 0xffff0000u;
  int at = 0;
  double* halves = carve<double>(memory, at, 2);
  double mine = lane < plan.columns ? plan.in[static_cast<long>(row) * plan.columns + lane] : 0;
  for (int down = half / 2; down > 0; down /= 2) {
    mine += __shfl_down_sync(mask, mine, down, half);
    if (lane < half) __syncwarp(mask);  // one half waits more often than the other
  }
  if (lane % half == 0) halves[lane / half] = mine;
  if (kBug == kDeadLock && lane < half) __syncthreads();
  if (kBug != kOnlyShuffles) __syncwarp();
  const double sum = __shfl_sync(~0u, halves[0] + halves[1], 7);
  if (lane == kWarp - 1) plan.out[row] = static_cast<float>(sum);
}

template <class Kernel>
cudaError_t launch(Kernel* kernel, const Plan& plan, int blocks, dim3 threads, int bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, plan) : error;
}

template <class T>
cudaError_t launch_sum_rows(const Plan& plan, cudaStream_t stream) {
  const int bytes = carved(kThreads * sizeof(T)) + carved(sizeof(T));
  const cudaError_t error = cudaMemsetAsync(plan.total, 0, sizeof(float), stream);
  return error == cudaSuccess ? launch(sum_rows<T>, plan, plan.rows, kThreads, bytes, stream) : error;
}

cudaError_t launch_row_norms(const Plan& plan, cudaStream_t stream) {
  return launch(row_norms, plan, plan.rows, kThreads, carved(kThreads / kWarp * sizeof(float)), stream);
}

cudaError_t launch_transpose(const Plan& plan, cudaStream_t stream) {
  const int bytes = carved(kWarp * (kWarp + 1) * sizeof(float));
  return launch(transpose, plan, (plan.rows + kWarp - 1) / kWarp, dim3(kWarp, kThreads / kWarp), bytes, stream);
}

cudaError_t launch_sum_heads(const Plan& plan, cudaStream_t stream) {
  return launch(sum_heads, plan, plan.rows, kWarp, carved(2 * sizeof(double)), stream);
}

template cudaError_t launch_sum_rows<float>(const Plan&, cudaStream_t);
template cudaError_t launch_sum_rows<double>(const Plan&, cudaStream_t);

}  // namespace planted
