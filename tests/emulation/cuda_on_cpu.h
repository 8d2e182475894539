// Runs CUDA kernels on the CPU, for tests: the same source, compiled as plain C++20 (Linux, g++).
//
// A CUDA thread is a fibre that runs until it waits at a barrier or shuffle, or ends. Blocks run one after another.
// Both take turns in an order that the test chooses, so a missing barrier shows in the results. Shared memory starts as
// NaN. With AddressSanitizer it has its exact size; with ThreadSanitizer nothing but barriers orders the accesses of
// threads, and nothing orders those of blocks.
//
// Not modelled: warps in lock-step, fences and the memory model, asynchronous copies and streams (a launch returns when
// all is done), matrix instructions, clusters, fast-math, the limits of registers and __launch_bounds__.
#pragma once
#include <atomic>
#include <climits>
#include <cmath>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>

#include "fibres.h"

// No __shared__: static shared memory would have neither its exact size nor NaN in it. See DYNAMIC_SHARED.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

constexpr size_t kShared = 48 * 1024;   // of dynamic shared memory: without asking
constexpr size_t kMostShared = 232448;  // and after cudaFuncSetAttribute

struct Runtime {
  cudaError_t last_error = cudaSuccess;
  std::map<const void*, size_t> shared_limits;  // by kernel
};
inline Runtime runtime;

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) runtime.last_error = error;
  return error;
}

inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  constexpr uint64_t kThreads = 1024;
  if (!grid.x || !grid.y || !grid.z || grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535 || !block.x || !block.y ||
      !block.z || block.x > kThreads || block.y > kThreads || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > kThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = runtime.shared_limits.find(kernel);
  const size_t most = limit == runtime.shared_limits.end() ? kShared : std::max(kShared, limit->second);
  return config.dynamicSmemBytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffle(unsigned mask, unsigned source, T value, std::source_location where) {
  const uint64_t bits = wait_for_warp(mask, source, to_bits(value), false, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return machine.current->lane(); }

template <class T>
T add_atomically(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

// For tests. The order in which threads and blocks take turns, from the next launch on.
inline void order(Order kind, uint64_t seed = 0) {
  machine.order = kind;
  machine.random.seed(seed);
}

// What has run. `counters() = {}` starts anew.
inline Counters& counters() { return machine.counters; }

inline unsigned char* shared_memory() { return machine.block->memory.begin(); }

}  // namespace emulation

// CUDA's own names.

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  emulation::wait_for_block(where);
}

inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  emulation::wait_for_warp(mask, emulation::lane(), 0, true, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const unsigned lane = emulation::lane(), group = static_cast<unsigned>(width);
  return emulation::shuffle(mask, lane / group * group + static_cast<unsigned>(source) % group, value, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  std::source_location where = std::source_location::current()) {
  const unsigned lane = emulation::lane(), group = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(bits);  // its own where that is in a later group
  return emulation::shuffle(mask, source / group > lane / group ? lane : source, value, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned down, int width = 32,
                   std::source_location where = std::source_location::current()) {
  const unsigned lane = emulation::lane(), group = static_cast<unsigned>(width);
  return emulation::shuffle(mask, (lane + down) / group > lane / group ? lane : lane + down, value, where);
}

inline int atomicAdd(int* to, int value) { return emulation::add_atomically(to, value); }
inline float atomicAdd(float* to, float value) { return emulation::add_atomically(to, value); }
inline double atomicAdd(double* to, double value) { return emulation::add_atomically(to, value); }

#if !defined(__GLIBC_PREREQ) || !__GLIBC_PREREQ(2, 42)  // which has them
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
#endif

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const cudaError_t error = emulation::check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return emulation::result(error);
  const auto call = std::make_pair(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto run = [](const void* given) {
    const auto& [kernel, parameters] = *static_cast<decltype(call)*>(given);
    std::apply(kernel, parameters);
  };
  emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, run, &call);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulation::kMostShared) {
    return emulation::result(cudaErrorInvalidValue);
  }
  emulation::runtime.shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::runtime.last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
