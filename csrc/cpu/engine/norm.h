// Norms over each sample: layer norm (one group), group norm, instance norm (a group a channel). With h = gamma gy and
// means over the elements of a group of one sample,
//   out = gamma x^ + beta      gx = r q,  q = h - mean(h) - x^ mean(h x^)
//   x^' = r (x' - mean(x') - x^ mean(x^ x'))     r' = - r^2 mean(x^ x')
// gamma and beta are per channel, or per element. Four statistics are kept a group: mean, r, mean(h), mean(h x^), and
// in the tangent frame mean(x'), mean(x^ x') and the tangents of the last two.

template <class T>
struct SampleNorm {
  // Calls f(offset in a sample of in, of out, offset in gamma and beta) for the elements of a group.
  template <class F>
  static INLINE void group(const Context<T>& c, const Layer& l, int64_t g, F f) {
    const Value &v = c.in(l), &out = c.out(l);
    const bool elements = (l.weight >= 0 && c.net.slot[l.weight].kind == kElements) ||
                          (l.bias >= 0 && c.net.slot[l.bias].kind == kElements);
    const int64_t size = v.c / l.groups;
    for (int64_t y = 0; y < v.h; y++)
      for (int64_t x = 0; x < v.w; x++)
        for (int64_t k = g * size; k < (g + 1) * size; k++)
          f(y * v.row + x * v.pitch + k, y * out.row + x * out.pitch + k,
            elements ? (y * v.w + x) * padded<T>(v.c) + k : k);
  }
  static INLINE T* kept(const Context<T>& c, const Layer& l, const Frame<T>& f, int64_t n, int64_t g) {
    return f.statistics(l) + (n * l.groups + g) * 4;
  }
  // Calls f(n, g) for every group of every sample.
  template <class F>
  static void groups(const Context<T>& c, const Layer& l, F f) {
    const Value& v = c.in(l);
    c.crew.each(c.f.count * l.groups, 4 * v.c * v.h * v.w / l.groups,
                [&](int64_t i) { f(i / l.groups, i % l.groups); });
  }

  static void forward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    const T *gamma = c.p.slot(c.net, l.weight), *beta = c.p.slot(c.net, l.bias);
    const double m = double(in.c / l.groups) * in.h * in.w;
    groups(c, l, [&](int64_t n, int64_t g) {
      const T* x = c.f.value(in, n);
      T *to = c.f.value(out, n), *s = kept(c, l, c.f, n, g);
      double sum = 0, square = 0;
      group(c, l, g, [&](int64_t at, int64_t, int64_t) { sum += x[at]; });
      const double mean = sum / m;
      group(c, l, g, [&](int64_t at, int64_t, int64_t) { square += (x[at] - mean) * (x[at] - mean); });
      s[0] = T(mean), s[1] = T(1 / __builtin_sqrt(square / m + l.eps));
      group(c, l, g, [&](int64_t at, int64_t o, int64_t a) {
        to[o] = (gamma ? gamma[a] : 1) * ((x[at] - s[0]) * s[1]) + (beta ? beta[a] : 0);
      });
    });
  }

  static void backward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    const T* gamma = c.p.slot(c.net, l.weight);
    const double m = double(in.c / l.groups) * in.h * in.w;
    groups(c, l, [&](int64_t n, int64_t g) {
      const T *x = c.f.value(in, n), *gy = c.f.gradient(out, n);
      T *to = c.f.gradient(in, n), *s = kept(c, l, c.f, n, g);
      double sum = 0, slope = 0;
      group(c, l, g, [&](int64_t at, int64_t o, int64_t a) {
        const T h = (gamma ? gamma[a] : 1) * gy[o];
        sum += h, slope += double(h) * ((x[at] - s[0]) * s[1]);
      });
      s[2] = T(sum / m), s[3] = T(slope / m);
      if (!c.net.needs_gradient[l.in]) return;
      group(c, l, g, [&](int64_t at, int64_t o, int64_t a) {
        const T normal = (x[at] - s[0]) * s[1], h = (gamma ? gamma[a] : 1) * gy[o];
        to[at] = s[1] * (h - s[2] - normal * s[3]) + (l.accumulate[0] ? to[at] : 0);
      });
    });
    parameters(c, l, [&](int64_t n, int64_t g, int64_t at, int64_t o, T& to_weight, T& to_bias) {
      const T* s = kept(c, l, c.f, n, g);
      to_bias = c.f.gradient(out, n)[o];
      to_weight = to_bias * ((c.f.value(in, n)[at] - s[0]) * s[1]);
    });
  }

  // Sums over samples (and positions) of what f gives for each element, into the gradients of gamma and beta.
  template <class F>
  static void parameters(const Context<T>& c, const Layer& l, F f) {
    T *to_weight = c.gradient(l.weight), *to_bias = c.gradient(l.bias);
    if (to_weight && l.writes_weight) clear(to_weight, c.net.slot[l.weight].extent);
    if (to_bias && l.writes_bias) clear(to_bias, c.net.slot[l.bias].extent);
    if (!to_weight && !to_bias) return;
    for (int64_t n = 0; n < c.f.count; n++)
      for (int64_t g = 0; g < l.groups; g++)
        group(c, l, g, [&](int64_t at, int64_t o, int64_t a) {
          T weight, bias;
          f(n, g, at, o, weight, bias);
          if (to_weight) to_weight[a] += weight;
          if (to_bias) to_bias[a] += bias;
        });
  }
  static void clear(T* at, int64_t count) {
    for (int64_t i = 0; i < count; i++) at[i] = 0;
  }

  static void tangent_forward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    const T *gamma = c.p.slot(c.net, l.weight), *gamma_t = c.d.slot(c.net, l.weight);
    const T* beta_t = c.d.slot(c.net, l.bias);
    const bool moving = c.net.has_tangent[l.in];
    const double m = double(in.c / l.groups) * in.h * in.w;
    groups(c, l, [&](int64_t n, int64_t g) {
      const T *x = c.f.value(in, n), *x_t = c.t.value(in, n), *s = kept(c, l, c.f, n, g);
      T *to = c.t.value(out, n), *t = kept(c, l, c.t, n, g);
      double sum = 0, slope = 0;
      if (moving)
        group(c, l, g, [&](int64_t at, int64_t, int64_t) {
          sum += x_t[at], slope += double(x_t[at]) * ((x[at] - s[0]) * s[1]);
        });
      t[0] = T(sum / m), t[1] = T(slope / m);
      group(c, l, g, [&](int64_t at, int64_t o, int64_t a) {
        const T normal = (x[at] - s[0]) * s[1];
        const T normal_t = moving ? s[1] * (x_t[at] - t[0] - normal * t[1]) : 0;
        to[o] = (gamma_t ? gamma_t[a] * normal : 0) + (gamma ? gamma[a] : 1) * normal_t + (beta_t ? beta_t[a] : 0);
      });
    });
  }

  static void tangent_backward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    const T *gamma = c.p.slot(c.net, l.weight), *gamma_t = c.d.slot(c.net, l.weight);
    const bool moving = c.net.has_tangent[l.in];
    const double m = double(in.c / l.groups) * in.h * in.w;
    auto tangent = [&](const T* s, const T* t, T normal, const T* x_t, int64_t at) {
      return moving ? s[1] * (x_t[at] - t[0] - normal * t[1]) : 0;
    };
    groups(c, l, [&](int64_t n, int64_t g) {
      const T *x = c.f.value(in, n), *x_t = c.t.value(in, n);
      const T *gy = c.f.gradient(out, n), *gy_t = c.t.gradient(out, n), *s = kept(c, l, c.f, n, g);
      T *to = c.t.gradient(in, n), *t = kept(c, l, c.t, n, g);
      double sum = 0, slope = 0;
      auto each = [&](auto f) {
        group(c, l, g, [&](int64_t at, int64_t o, int64_t a) {
          const T normal = (x[at] - s[0]) * s[1], weight = gamma ? gamma[a] : 1;
          f(at, normal, tangent(s, t, normal, x_t, at), weight * gy[o],
            (gamma_t ? gamma_t[a] * gy[o] : 0) + weight * gy_t[o]);
        });
      };
      each([&](int64_t, T normal, T normal_t, T h, T h_t) {
        sum += h_t, slope += double(h_t) * normal + double(h) * normal_t;
      });
      t[2] = T(sum / m), t[3] = T(slope / m);
      if (!c.net.needs_gradient[l.in]) return;
      each([&](int64_t at, T normal, T normal_t, T h, T h_t) {
        const T q = h - s[2] - normal * s[3], q_t = h_t - t[2] - normal_t * s[3] - normal * t[3];
        to[at] = s[1] * (q_t - s[1] * t[1] * q) + (l.accumulate[0] ? to[at] : 0);
      });
    });
    parameters(c, l, [&](int64_t n, int64_t g, int64_t at, int64_t o, T& to_weight, T& to_bias) {
      const T *s = kept(c, l, c.f, n, g), *t = kept(c, l, c.t, n, g);
      const T normal = (c.f.value(in, n)[at] - s[0]) * s[1];
      to_bias = c.t.gradient(out, n)[o];
      to_weight = to_bias * normal + c.f.gradient(out, n)[o] * tangent(s, t, normal, c.t.value(in, n), at);
    });
  }
};
