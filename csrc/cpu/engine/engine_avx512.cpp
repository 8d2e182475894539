// The engine for x86 with AVX-512: vectors of 64 bytes.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define MAML_VECTOR_BYTES 64
#define MAML_ENGINE engine_avx512
#include "build.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
