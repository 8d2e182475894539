// What the shared mathematics (engine/activation.h, dual.h, losses.h) builds on, for one number a thread: a vector of
// one lane. Included inside the namespace of the kernels, then the mathematics itself.

#define INLINE __device__ __forceinline__

template <class T>
using Vec = T;
template <class T>
INLINE T splat(T x) {
  return x;
}
template <class T, class F>
INLINE T by_lane(T x, F f) {
  return f(x);
}

INLINE float exp_of(float x) { return expf(x); }
INLINE double exp_of(double x) { return exp(x); }
INLINE float log_of(float x) { return logf(x); }
INLINE double log_of(double x) { return log(x); }
INLINE float sqrt_of(float x) { return sqrtf(x); }
INLINE double sqrt_of(double x) { return sqrt(x); }
INLINE float erf_of(float x) { return erff(x); }
INLINE double erf_of(double x) { return erf(x); }
INLINE float log1p_of(float x) { return log1pf(x); }
INLINE double log1p_of(double x) { return log1p(x); }
INLINE float sin_of(float x) { return sinf(x); }
INLINE double sin_of(double x) { return sin(x); }
INLINE float cos_of(float x) { return cosf(x); }
INLINE double cos_of(double x) { return cos(x); }
INLINE float expm1_of(float x) { return expm1f(x); }
INLINE double expm1_of(double x) { return expm1(x); }
INLINE float tanh_of(float x) { return tanhf(x); }
INLINE double tanh_of(double x) { return tanh(x); }

template <class T, bool minus_one>
INLINE T exponential(T x) {
  return minus_one ? expm1_of(x) : exp_of(x);
}
template <class T>
INLINE T vector_exp(T x) {
  return exp_of(x);
}
template <class T>
INLINE T vector_sigmoid(T x) {
  return 1 / (1 + exp_of(-x));
}
template <class T>
INLINE T vector_tanh(T x) {
  return tanh_of(x);
}

#include "../engine/activation.h"
#include "../engine/dual.h"
#include "../engine/losses.h"
