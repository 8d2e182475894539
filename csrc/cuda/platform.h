// What kernels are compiled against: CUDA, or (tests/emulation) threads of a GPU run one by one on the CPU.
#pragma once
#ifdef MAML_EMULATED
#include "cuda_on_cpu.h"

#define DYNAMIC_SHARED(memory) unsigned char* const memory = emulation::shared_memory()

constexpr int kGap = emulation::kAddressSanitizer ? 64 : 0;

inline void poison(void* memory, int bytes) { emulation::sanitizer::poison(memory, bytes); }

template <class T>
inline T* in_device_memory(T* pointer) {
  return pointer;
}

#define CALLED __attribute__((noinline))
#else
#include <cuda_runtime.h>

// The dynamic shared memory of the block, which is the only one that kernels use. Arrays are carved from it by adding
// offsets; by way of an integer the compiler would lose that the pointer is to shared memory.
#define DYNAMIC_SHARED(memory) extern __shared__ __align__(16) unsigned char memory[]

// Bytes to leave behind every array carved from shared memory, for `poison`. None, but where they find bugs.
constexpr int kGap = 0;

// Nobody may touch these bytes of shared memory until the block ends.
__host__ __device__ inline void poison(void*, int) {}

// For pointers of which the compiler loses sight that they are not to shared memory: those it chooses between.
template <class T>
__device__ __forceinline__ T* in_device_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

#define CALLED __device__ __noinline__
#endif

#define HOST_DEVICE __host__ __device__
