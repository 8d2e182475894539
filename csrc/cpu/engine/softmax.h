// Softmax and its logarithm over the channels of each position. With p the probabilities:
//   softmax: gx = p (g - sum(g p))       p' = p (x' - sum(p x'))
//   log:     gx = g - p sum(g)         out' = x' - sum(p x')
// Plain scalar code: a network has one, on a handful of classes.

template <class T>
struct Softmax {
  // Calls f(sample, offset in in, offset in out) for every position.
  template <class F>
  static void positions(const Context<T>& c, const Layer& l, F f) {
    const Value &in = c.in(l), &out = c.out(l);
    c.crew.each(c.f.count, 64 * in.c * in.h * in.w, [&](int64_t n) {
      for (int64_t y = 0; y < in.h; y++)
        for (int64_t x = 0; x < in.w; x++)
          f(n * in.image + y * in.row + x * in.pitch, n * out.image + y * out.row + x * out.pitch);
    });
  }

  static void forward(const Context<T>& c, const Layer& l) {
    const T* x = c.f.value(c.in(l));
    T* to = c.f.value(c.out(l));
    const int64_t channels = c.in(l).c;
    positions(c, l, [&](int64_t i, int64_t o) {
      double top = x[i], sum = 0;
      for (int64_t k = 1; k < channels; k++) top = larger<double>(top, x[i + k]);
      for (int64_t k = 0; k < channels; k++) sum += __builtin_exp(x[i + k] - top);
      for (int64_t k = 0; k < channels; k++)
        to[o + k] = T(l.logarithm ? x[i + k] - top - __builtin_log(sum) : __builtin_exp(x[i + k] - top) / sum);
    });
  }

  static INLINE double probability(const Layer& l, T out) {
    return l.logarithm ? __builtin_exp(double(out)) : double(out);
  }

  static void backward(const Context<T>& c, const Layer& l) {
    if (!c.net.needs_gradient[l.in]) return;
    const T *y = c.f.value(c.out(l)), *g = c.f.gradient(c.out(l));
    T* to = c.f.gradient(c.in(l));
    positions(c, l, [&](int64_t i, int64_t o) {
      double sum = 0;
      for (int64_t k = 0; k < c.in(l).c; k++) sum += l.logarithm ? g[o + k] : double(g[o + k]) * y[o + k];
      for (int64_t k = 0; k < c.in(l).c; k++) {
        const double p = probability(l, y[o + k]);
        const double gx = l.logarithm ? g[o + k] - p * sum : p * (g[o + k] - sum);
        to[i + k] = T(gx) + (l.accumulate[0] ? to[i + k] : 0);
      }
    });
  }

  static void tangent_forward(const Context<T>& c, const Layer& l) {
    const T *y = c.f.value(c.out(l)), *x_t = c.t.value(c.in(l));
    T* to = c.t.value(c.out(l));
    positions(c, l, [&](int64_t i, int64_t o) {
      double sum = 0;
      for (int64_t k = 0; k < c.in(l).c; k++) sum += probability(l, y[o + k]) * x_t[i + k];
      for (int64_t k = 0; k < c.in(l).c; k++)
        to[o + k] = T((l.logarithm ? 1 : double(y[o + k])) * (x_t[i + k] - sum));
    });
  }

  static void tangent_backward(const Context<T>& c, const Layer& l) {
    if (!c.net.needs_gradient[l.in]) return;
    const T *y = c.f.value(c.out(l)), *y_t = c.t.value(c.out(l));
    const T *g = c.f.gradient(c.out(l)), *g_t = c.t.gradient(c.out(l));
    T* to = c.t.gradient(c.in(l));
    positions(c, l, [&](int64_t i, int64_t o) {
      double sum = 0, sum_t = 0;
      for (int64_t k = 0; k < c.in(l).c; k++) {
        sum += l.logarithm ? g[o + k] : double(g[o + k]) * y[o + k];
        sum_t += l.logarithm ? g_t[o + k] : double(g_t[o + k]) * y[o + k] + double(g[o + k]) * y_t[o + k];
      }
      for (int64_t k = 0; k < c.in(l).c; k++) {
        const double p = probability(l, y[o + k]), p_t = l.logarithm ? p * y_t[o + k] : double(y_t[o + k]);
        const double gx = l.logarithm ? g_t[o + k] - p_t * sum - p * sum_t
                                      : p_t * (g[o + k] - sum) + p * (g_t[o + k] - sum_t);
        to[i + k] = T(gx) + (l.accumulate[0] ? to[i + k] : 0);
      }
    });
  }
};
