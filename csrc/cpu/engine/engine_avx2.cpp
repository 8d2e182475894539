// The engine for x86 with AVX2: vectors of 32 bytes.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)  // it takes minutes, and the others are of the same source
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define MAML_VECTOR_BYTES 32
#define MAML_ENGINE engine_avx2
#include "build.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
