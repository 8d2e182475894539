// Explicit vectors, and the few mathematical functions the engine needs on them.
// Included by each build of the engine inside its anonymous namespace: see build.h.

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(MAML_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(MAML_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(MAML_VECTOR_BYTES)));
  // exp: round by adding 1.5 * 2^23, the exponent's place, its bias, log(2) in two parts, terms of the series
  static constexpr float kRound = 12582912.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLargest = 88.0f;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 8;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(MAML_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(MAML_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(MAML_VECTOR_BYTES)));
  static constexpr double kRound = 6755399441055744.0, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLargest = 708.0;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 14;
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int kLanes = MAML_VECTOR_BYTES / sizeof(T);

#if defined(__SANITIZE_ADDRESS__)  // each function is compiled once, not into every caller: in less than half the time
#define INLINE inline
#define ALWAYS
#else
#define INLINE inline __attribute__((always_inline))
#define ALWAYS __attribute__((always_inline))  // of a lambda in an inner loop: else its vectors go through memory
#endif
// Of a pointer that advances in an unrolled loop: else all its values are computed ahead, and spilled.
#define IN_ORDER(pointer) asm("" : "+r"(pointer))

template <class T>
INLINE Vec<T> load(const T* p) {
  return *(const typename Simd<T>::Unaligned*)p;
}
template <class T>
INLINE void store(T* p, Vec<T> v) {
  *(typename Simd<T>::Unaligned*)p = v;
}
template <class T>
INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
constexpr int kWidest = MAML_VECTOR_BYTES == 64 ? 5 : 4;  // vectors of a row that a product works on at a time

// Where a sum may have no first term, it starts from these zeros: `start ? load(start) + v : v` must not be written.
// GCC 12 makes a masked addition of it whose mask is the condition, one bit, so that only lane 0 is added.
template <class T>
alignas(MAML_VECTOR_BYTES) constexpr T kZeros[kWidest * kLanes<T>] = {};
template <class T>
INLINE Vec<T> load_or_zero(const T* p) {
  return load<T>(p ? p : kZeros<T>);
}
// What moves as one where A tasks are abreast (Network::abreast): their numbers of one channel.
template <class T, int A>
struct Whole {
  typedef T Type;
};
template <>
struct Whole<float, 2> {
  typedef double Type;
};
// In all lanes, again and again.
template <class T, int A>
INLINE Vec<T> spread(const T* p) {
  if constexpr (A == 1) {
    return splat<T>(*p);
  } else {
    int64_t numbers;
    __builtin_memcpy(&numbers, p, sizeof numbers);
    return (Vec<T>)(numbers - Simd<double>::Int{});
  }
}
template <class T>
INLINE T sum_of_lanes(Vec<T> v, int64_t lanes = kLanes<T>) {
  T sum = 0;
  for (int64_t i = 0; i < lanes; i++) sum += v[i];
  return sum;
}
template <class T>
INLINE Vec<T> select(typename Simd<T>::Int mask, Vec<T> a, Vec<T> b) {
  return mask ? a : b;
}

template <class T>
INLINE T erf_of(T v) {
  return T(__builtin_erf(v));
}
template <class T>
INLINE T log1p_of(T v) {
  return T(__builtin_log1p(v));
}
template <class T>
INLINE T sin_of(T v) {
  return T(__builtin_sin(v));
}
template <class T>
INLINE T cos_of(T v) {
  return T(__builtin_cos(v));
}
INLINE double exp_of(double v) { return __builtin_exp(v); }
INLINE double log_of(double v) { return __builtin_log(v); }
INLINE double sqrt_of(double v) { return __builtin_sqrt(v); }

// A function of one lane applied to all: for what has no vector form here.
template <class T, class F>
INLINE Vec<T> by_lane(Vec<T> x, F f) {
  for (int i = 0; i < kLanes<T>; i++) x[i] = f(x[i]);
  return x;
}

// e^x - 1 where `minus_one`, else e^x, saturating at +-kLargest. x = n log 2 + r, |r| <= log(2) / 2, then the Taylor
// series of e^r - 1, whose relative error stays at rounding near 0. NaN stays NaN.
template <class T, bool minus_one>
INLINE Vec<T> exponential(Vec<T> x) {
  typedef Simd<T> S;
  x = x > S::kLargest ? splat<T>(S::kLargest) : x;
  x = x < -S::kLargest ? splat<T>(-S::kLargest) : x;
  const Vec<T> n = (x * T(1.4426950408889634074) + S::kRound) - S::kRound;
  const Vec<T> r = (x - n * S::kLn2High) - n * S::kLn2Low;
  T factorial = 1;
  for (int i = 2; i <= S::kTerms; i++) factorial *= i;
  T coefficient = 1 / factorial;
  Vec<T> series = splat<T>(coefficient);
#pragma GCC unroll 16
  for (int i = S::kTerms; i > 1; i--) {
    coefficient *= i;
    series = series * r + coefficient;
  }
  const auto bits = (__builtin_convertvector(n, typename S::Int) + S::kBias) << S::kMantissa;
  const Vec<T> scale = (Vec<T>)bits;
  return scale * (series * r) + (minus_one ? scale - 1 : scale);
}

template <class T>
INLINE Vec<T> vector_exp(Vec<T> x) {
  return exponential<T, false>(x);
}
template <class T>
INLINE Vec<T> vector_sigmoid(Vec<T> x) {
  return 1 / (1 + exponential<T, false>(-x));
}
template <class T>
INLINE Vec<T> vector_tanh(Vec<T> x) {
  const Vec<T> e = exponential<T, true>(2 * x);
  return e / (e + 2);
}

template <class A>
INLINE A smaller(A a, A b) {
  return a < b ? a : b;
}
template <class A>
INLINE A larger(A a, A b) {
  return a > b ? a : b;
}
// Rounded up to whole vectors.
template <class T>
INLINE int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
