// Activations: the function with its first and second derivative, for the engines of every device. A new one is a
// struct here, its name in the enum of network.h and its line in `with_activation`. What a caller does not use of the
// three is never computed; kCurved says whether the second is ever other than 0. Included where Vec<T> and the
// functions on it are defined: cpu/engine/simd.h, cuda/scalar.h.

template <class T>
struct Jet {
  Vec<T> value, first, second;
};

struct Identity {
  static constexpr bool kCurved = false;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    return {x, splat<T>(1), Vec<T>{}};
  }
};

struct Relu {
  static constexpr bool kCurved = false;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const Vec<T> zero{};
    return {x < zero ? zero : x, x > zero ? splat<T>(1) : zero, zero};  // NaN stays NaN
  }
};

struct LeakyRelu {
  static constexpr bool kCurved = false;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T slope, T) {
    const Vec<T> first = x > Vec<T>{} ? splat<T>(1) : splat<T>(slope);
    return {x * first, first, Vec<T>{}};
  }
};

struct Elu {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T alpha, T) {
    const Vec<T> zero{}, below = alpha * exponential<T, true>(x), slope = below + alpha;
    return {x > zero ? x : below, x > zero ? splat<T>(1) : slope, x > zero ? zero : slope};
  }
};

struct Gelu {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const Vec<T> erf = by_lane<T>(x * T(0.70710678118654752440), [](T v) { return erf_of(v); });
    const Vec<T> cdf = T(0.5) * (1 + erf);
    const Vec<T> density = T(0.39894228040143267794) * vector_exp<T>(T(-0.5) * x * x);
    return {x * cdf, cdf + x * density, density * (2 - x * x)};
  }
};

struct GeluTanh {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const T scale = T(0.79788456080286535588), cubic = T(0.044715);
    const Vec<T> t = vector_tanh<T>(scale * (x + cubic * x * x * x)), rest = 1 - t * t;
    const Vec<T> u = scale * (1 + 3 * cubic * x * x);
    return {T(0.5) * x * (1 + t), T(0.5) * ((1 + t) + x * rest * u),
            rest * (u + T(0.5) * x * (6 * scale * cubic * x - 2 * t * u * u))};
  }
};

struct Silu {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const Vec<T> s = vector_sigmoid<T>(x), slope = s * (1 - s);
    return {x * s, s + x * slope, slope * (2 + x * (1 - 2 * s))};
  }
};

struct Softplus {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T beta, T threshold) {
    const Vec<T> scaled = x * beta, s = vector_sigmoid<T>(scaled);
    const auto linear = scaled > splat<T>(threshold);
    const Vec<T> curved = by_lane<T>(vector_exp<T>(scaled), [](T v) { return log1p_of(v); }) / beta;
    return {linear ? x : curved, linear ? splat<T>(1) : s, linear ? Vec<T>{} : beta * s * (1 - s)};
  }
};

struct Tanh {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const Vec<T> t = vector_tanh<T>(x), first = 1 - t * t;
    return {t, first, -2 * t * first};
  }
};

struct Sigmoid {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const Vec<T> s = vector_sigmoid<T>(x), first = s * (1 - s);
    return {s, first, first * (1 - 2 * s)};
  }
};

struct Sine {
  static constexpr bool kCurved = true;
  template <class T>
  static INLINE Jet<T> at(Vec<T> x, T, T) {
    const Vec<T> s = by_lane<T>(x, [](T v) { return sin_of(v); });
    return {s, by_lane<T>(x, [](T v) { return cos_of(v); }), -s};
  }
};

// Calls f with the activation's struct.
template <class F>
INLINE void with_activation(Activation which, F f) {
  switch (which) {
    case kRelu: return f(Relu());
    case kLeakyRelu: return f(LeakyRelu());
    case kElu: return f(Elu());
    case kGelu: return f(Gelu());
    case kGeluTanh: return f(GeluTanh());
    case kSilu: return f(Silu());
    case kSoftplus: return f(Softplus());
    case kTanh: return f(Tanh());
    case kSigmoid: return f(Sigmoid());
    case kSin: return f(Sine());
    case kIdentity: return f(Identity());
  }
}
