// A number and its derivative along one direction. What is written once for any number type, a pass over a layer or a
// loss, gives derivatives when it runs on these. Included as activation.h is.

template <class A>
struct Dual {
  A value, tangent;

  INLINE Dual(A v = 0, A t = 0) : value(v), tangent(t) {}
  friend INLINE Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }
  friend INLINE Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.tangent - b.tangent}; }
  friend INLINE Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
  friend INLINE Dual operator/(Dual a, Dual b) {
    const A q = a.value / b.value;
    return {q, (a.tangent - q * b.tangent) / b.value};
  }
  friend INLINE A value_of(Dual x) { return x.value; }
  friend INLINE Dual exp_of(Dual x) {
    const A e = exp_of(x.value);
    return {e, e * x.tangent};
  }
  friend INLINE Dual log_of(Dual x) { return {log_of(x.value), x.tangent / x.value}; }
  friend INLINE Dual sqrt_of(Dual x) {
    const A root = sqrt_of(x.value);
    return {root, x.tangent / (2 * root)};
  }
};
INLINE double value_of(double x) { return x; }
INLINE float value_of(float x) { return x; }

// Which derivative a pass gives: of D, the value for a plain number, the tangent for a Dual.
template <class A>
INLINE A result_of(A x) {
  return x;
}
template <class A>
INLINE A result_of(Dual<A> x) {
  return x.tangent;
}
template <class D>
constexpr bool is_dual = false;
template <class A>
constexpr bool is_dual<Dual<A>> = true;
