// Batch norm (or its fixed form), activation and pooling without overlap, in one: each optional, and whichever of
// them follow each other are fused. With x^ = (x - mean) r, r = 1 / sqrt(variance + eps), y = gamma x^ + beta:
//   out = pool(act(y))
// Nothing between x and out is stored: each pass reads x (and x') and computes y anew. A rule is one pass over the
// data, or two where it needs sums over the batch first. With gy the gradient at y and m the number of samples,
//   gx  = gamma r q,  q = gy - (sum gy + x^ sum(gy x^)) / m
//   x^' = r (x' - mean(x') - x^ mean(x^ x'))
// and the tangent of gx is the derivative of the first line. Fixed statistics have no such sums.
//
// A window of the pooling, with what lies between it and the next, is a tile: tiles cover x once.

template <class T, class Act, bool pooled>
struct Block {
  typedef Vec<T> V;

  // What one vector of channels needs, at whatever position.
  struct Channel {
    V mean, r, gamma, beta;
    V x_mean, x_slope;       // mean(x'), mean(x^ x')
    V gamma_t, beta_t;
    V sum, slope;            // sum gy / m, sum(gy x^) / m
    V sum_t, slope_t;
  };

  static V affine(const T* at, int64_t k, T otherwise) { return at ? load<T>(at + k) : splat<T>(otherwise); }

  static Channel channel(const Context<T>& c, const Layer& l, int64_t k, bool tangent) {
    Channel ch{};
    if (l.statistics == kNoStatistics) return ch;
    const int64_t pitch = c.in(l).pitch;
    const T* s = c.f.statistics(l) + k;
    ch.mean = load<T>(s), ch.r = load<T>(s + pitch);
    ch.gamma = affine(c.p.slot(c.net, l.weight), k, 1), ch.beta = affine(c.p.slot(c.net, l.bias), k, 0);
    ch.sum = load<T>(s + 2 * pitch), ch.slope = load<T>(s + 3 * pitch);
    if (!tangent) return ch;
    const T* t = c.t.statistics(l) + k;
    ch.x_mean = load<T>(t), ch.x_slope = load<T>(t + pitch);
    ch.sum_t = load<T>(t + 2 * pitch), ch.slope_t = load<T>(t + 3 * pitch);
    ch.gamma_t = affine(c.d.slot(c.net, l.weight), k, 0), ch.beta_t = affine(c.d.slot(c.net, l.bias), k, 0);
    return ch;
  }

  // An element's x^, y and their tangents.
  struct Element {
    V normal, y, normal_t, y_t;
  };
  static INLINE Element element(const Layer& l, const Channel& ch, const T* x, const T* x_t) {
    Element e;
    const V value = load<T>(x), tangent = x_t ? load<T>(x_t) : V{};
    if (l.statistics == kNoStatistics) return {value, value, tangent, tangent};
    e.normal = (value - ch.mean) * ch.r;
    e.y = ch.gamma * e.normal + ch.beta;
    e.normal_t = ch.r * (tangent - ch.x_mean - e.normal * ch.x_slope);
    e.y_t = ch.gamma_t * e.normal + ch.gamma * e.normal_t + ch.beta_t;
    return e;
  }
  static INLINE Jet<T> act(const Layer& l, V y) { return Act::template at<T>(y, T(l.a), T(l.b)); }

  // Calls f(n, row of out, channel k) for every line of vectors: parallel over samples.
  template <class F>
  static void lines(const Context<T>& c, const Layer& l, F f) {
    const Value &in = c.in(l), &out = c.out(l);
    c.crew.each(c.f.count, in.h * in.w * in.pitch, [&](int64_t n) {
      for (int64_t y = 0; y < out.h; y++)
        for (int64_t k = 0; k < out.pitch; k += kLanes<T>) f(n, y, k);
    });
  }

  // Calls f(offset in x, number in the window or -1) for the elements of tile (y, x).
  template <class F>
  static INLINE void tile(const Layer& l, const Value& in, const Value& out, int64_t y, int64_t x, F f) {
    if (!pooled) return f(y * in.row + x * in.pitch, 0);
    const int64_t top = y * l.sh, bottom = y + 1 == out.h ? in.h : top + l.sh;
    const int64_t left = x * l.sw, right = x + 1 == out.w ? in.w : left + l.sw;
    for (int64_t i = top; i < bottom; i++)
      for (int64_t j = left; j < right; j++)
        f(i * in.row + j * in.pitch, i - top < l.kh && j - left < l.kw ? int((i - top) * l.kw + j - left) : -1);
  }

  // The number of the window's largest element: the first of equals, and the last NaN, as in PyTorch.
  static INLINE V winner(const Layer& l, const Channel& ch, const Value& in, const Value& out, int64_t y, int64_t x,
                         const T* line) {
    V best = splat<T>(-__builtin_huge_val()), which{};
    tile(l, in, out, y, x, [&](int64_t at, int number) {
      if (number < 0) return;
      const V z = act(l, element(l, ch, line + at, nullptr).y).value;
      const auto wins = (z > best) | (z != z);
      best = wins ? z : best;
      which = wins ? splat<T>(T(number)) : which;
    });
    return which;
  }

  // The part of the gradient at out that reaches an element of the tile.
  static INLINE V share(const Layer& l, V gradient, V which, int number) {
    if (!pooled) return gradient;
    if (number < 0) return V{};
    return l.average ? gradient / T(l.divisor) : (which == splat<T>(T(number)) ? gradient : V{});
  }

  // Per-channel sums of two quantities over the batch: f(n, y, k, first, second) adds up a line; sums of lines, then
  // of samples. The totals, divided by `by`, go to a and b.
  template <class F>
  static void sums(const Context<T>& c, const Layer& l, const Frame<T>& frame, T* a, T* b, double by, F f) {
    const Value &in = c.in(l), &out = c.out(l);
    const int64_t pitch = in.pitch;
    T* partial = frame.statistics(l) + 4 * pitch;
    c.crew.each(c.f.count, in.h * in.w * pitch, [&](int64_t n) {
      for (int64_t k = 0; k < pitch; k += kLanes<T>) {
        V first{}, second{};
        for (int64_t y = 0; y < out.h; y++) {
          V one{}, two{};
          f(n, y, k, one, two);
          first += one, second += two;
        }
        store<T>(partial + n * 2 * pitch + k, first);
        store<T>(partial + (n * 2 + 1) * pitch + k, second);
      }
    });
    for (int64_t k = 0; k < pitch; k++) {
      double first = 0, second = 0;
      for (int64_t n = 0; n < c.f.count; n++)
        first += partial[n * 2 * pitch + k], second += partial[(n * 2 + 1) * pitch + k];
      a[k] = T(first / by), b[k] = T(second / by);
    }
  }

  static double batch(const Context<T>& c, const Layer& l) { return double(c.f.count) * c.in(l).h * c.in(l).w; }

  static void statistics(const Context<T>& c, const Layer& l) {
    const Value& in = c.in(l);
    T *mean = c.f.statistics(l), *r = mean + in.pitch;
    if (l.statistics == kFixed) {
      const T *m = c.p.slot(c.net, l.mean), *variance = c.p.slot(c.net, l.variance);
      for (int64_t k = 0; k < in.pitch; k++) mean[k] = r[k] = 0;
      for (int64_t k = 0; k < in.c; k++) mean[k] = m[k], r[k] = T(1 / __builtin_sqrt(double(variance[k]) + l.eps));
      return;
    }
    // Sums of x - shift and its square: with shift an element of the channel, nothing cancels.
    const T* shift = c.f.value(in);
    sums(c, l, c.f, mean, r, batch(c, l), [&](int64_t n, int64_t y, int64_t k, V& first, V& second) {
      const V from = load<T>(shift + k);
      for (int64_t x = 0; x < c.out(l).w; x++)
        tile(l, in, c.out(l), y, x, [&](int64_t at, int) {
          const V d = load<T>(c.f.value(in, n) + k + at) - from;
          first += d, second += d * d;
        });
    });
    for (int64_t k = in.c; k < in.pitch; k++) mean[k] = r[k] = 0;  // the padding stays finite
    for (int64_t k = 0; k < in.c; k++) {
      const double d = mean[k], variance = larger(0.0, double(r[k]) - d * d);
      mean[k] = T(shift[k] + d);
      r[k] = T(1 / __builtin_sqrt((r[k] != r[k] ? double(r[k]) : variance) + l.eps));
    }
  }

  // An activation alone: one flat loop. Calls f(offset in x, offset in out) for every vector.
  static INLINE bool alone(const Layer& l) { return !pooled && l.statistics == kNoStatistics; }
  template <class F>
  static INLINE void flat(const Context<T>& c, const Layer& l, F f) {
    const Value &in = c.in(l), &out = c.out(l);
    if (in.image == out.image && in.halo_h + in.halo_w + out.halo_h + out.halo_w == 0) {
      const int64_t size = in.h * in.row;  // of a sample: whole vectors
      if (size == in.image && c.f.count * size < 65536) {
        for (int64_t i = 0; i < c.f.count * size; i += kLanes<T>) f(i, i);
        return;
      }
    }
    c.crew.each(c.f.count, in.h * in.row, [&](int64_t n) {
      for (int64_t y = 0; y < in.h; y++)
        for (int64_t x = 0; x < in.w * in.pitch; x += kLanes<T>)
          f(n * in.image + y * in.row + x, n * out.image + y * out.row + x);
    });
  }

  static void forward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    if (alone(l)) {
      const T* from = c.f.value(in);
      T* result = c.f.value(out);
      flat(c, l, [&](int64_t i, int64_t o) { store<T>(result + o, act(l, load<T>(from + i)).value); });
      return;
    }
    if (l.statistics != kNoStatistics) statistics(c, l);
    lines(c, l, [&](int64_t n, int64_t y, int64_t k) {
      const Channel ch = channel(c, l, k, false);
      const T* line = c.f.value(in, n) + k;
      T* to = c.f.value(out, n) + y * out.row + k;
      for (int64_t x = 0; x < out.w; x++) {
        V result = pooled && !l.average ? splat<T>(-__builtin_huge_val()) : V{};
        tile(l, in, out, y, x, [&](int64_t at, int number) {
          if (number < 0) return;
          const V z = act(l, element(l, ch, line + at, nullptr).y).value;
          if (!pooled)
            result = z;
          else if (l.average)
            result += z;
          else
            result = (z > result) | (z != z) ? z : result;
        });
        store<T>(to + x * out.pitch, pooled && l.average ? result / T(l.divisor) : result);
      }
    });
  }

  static void backward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    if (alone(l)) {
      const T *x = c.f.value(in), *g = c.f.gradient(out);
      T* gx = c.f.gradient(in);
      const bool add = l.accumulate[0];
      flat(c, l, [&](int64_t i, int64_t o) { put<T>(gx + i, act(l, load<T>(x + i)).first * load<T>(g + o), add); });
      return;
    }
    T* s = c.f.statistics(l);
    const bool normed = l.statistics != kNoStatistics;
    if (normed) {
      T *sum = s + 2 * in.pitch, *slope = s + 3 * in.pitch;
      sums(c, l, c.f, sum, slope, 1, [&](int64_t n, int64_t y, int64_t k, V& first, V& second) {
        const Channel ch = channel(c, l, k, false);
        const T *line = c.f.value(in, n) + k, *g = c.f.gradient(out, n) + y * out.row + k;
        for (int64_t x = 0; x < out.w; x++) {
          const V gradient = load<T>(g + x * out.pitch);
          const V which = pooled && !l.average ? winner(l, ch, in, out, y, x, line) : V{};
          tile(l, in, out, y, x, [&](int64_t at, int number) {
            if (number < 0) return;
            const Element e = element(l, ch, line + at, nullptr);
            const V gy = act(l, e.y).first * share(l, gradient, which, number);
            first += gy, second += gy * e.normal;
          });
        }
      });
      finish(c, l, s, 2);
    }
    if (!c.net.needs_gradient[l.in]) return;
    lines(c, l, [&](int64_t n, int64_t y, int64_t k) {
      const Channel ch = channel(c, l, k, false);
      const T *line = c.f.value(in, n) + k, *g = c.f.gradient(out, n) + y * out.row + k;
      T* to = c.f.gradient(in, n) + k;
      const V scale = ch.gamma * ch.r;
      for (int64_t x = 0; x < out.w; x++) {
        const V gradient = load<T>(g + x * out.pitch);
        const V which = pooled && !l.average ? winner(l, ch, in, out, y, x, line) : V{};
        tile(l, in, out, y, x, [&](int64_t at, int number) {
          const Element e = element(l, ch, line + at, nullptr);
          V gx = act(l, e.y).first * share(l, gradient, which, number);
          if (normed) gx = scale * (gx - ch.sum - e.normal * ch.slope);
          put<T>(to + at, gx, l.accumulate[0]);
        });
      }
    });
  }

  // Parameter gradients from the two sums at s + which * pitch; the sums become means, or vanish where fixed.
  static void finish(const Context<T>& c, const Layer& l, T* s, int which) {
    const int64_t pitch = c.in(l).pitch;
    T *sum = s + which * pitch, *slope = sum + pitch;
    T *to_bias = c.gradient(l.bias), *to_weight = c.gradient(l.weight);
    const T scale = l.statistics == kBatch ? T(1 / batch(c, l)) : 0;
    for (int64_t k = 0; k < pitch; k += kLanes<T>) {
      const V a = load<T>(sum + k), b = load<T>(slope + k);
      if (to_bias) put<T>(to_bias + k, a, !l.writes_bias);
      if (to_weight) put<T>(to_weight + k, b, !l.writes_weight);
      store<T>(sum + k, a * scale);
      store<T>(slope + k, b * scale);
    }
  }

  static void tangent_forward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    const bool moving = c.net.has_tangent[l.in];
    if (alone(l)) {
      const T *x = c.f.value(in), *x_t = c.t.value(in);
      T* result = c.t.value(out);
      flat(c, l, [&](int64_t i, int64_t o) { store<T>(result + o, act(l, load<T>(x + i)).first * load<T>(x_t + i)); });
      return;
    }
    if (l.statistics != kNoStatistics) {
      T* t = c.t.statistics(l);
      if (l.statistics == kBatch && moving)
        sums(c, l, c.t, t, t + in.pitch, batch(c, l), [&](int64_t n, int64_t y, int64_t k, V& first, V& second) {
          const Channel ch = channel(c, l, k, false);
          const T *line = c.f.value(in, n) + k, *line_t = c.t.value(in, n) + k;
          for (int64_t x = 0; x < out.w; x++)
            tile(l, in, out, y, x, [&](int64_t at, int) {
              const V tangent = load<T>(line_t + at);
              first += tangent, second += tangent * ((load<T>(line + at) - ch.mean) * ch.r);
            });
        });
      else
        for (int64_t k = 0; k < 2 * in.pitch; k++) t[k] = 0;
    }
    lines(c, l, [&](int64_t n, int64_t y, int64_t k) {
      const Channel ch = channel(c, l, k, true);
      const T *line = c.f.value(in, n) + k, *line_t = moving ? c.t.value(in, n) + k : nullptr;
      T* to = c.t.value(out, n) + y * out.row + k;
      for (int64_t x = 0; x < out.w; x++) {
        const V which = pooled && !l.average ? winner(l, ch, in, out, y, x, line) : V{};
        V result{};
        tile(l, in, out, y, x, [&](int64_t at, int number) {
          if (number < 0) return;
          const Element e = element(l, ch, line + at, line_t ? line_t + at : nullptr);
          result += share(l, act(l, e.y).first * e.y_t, which, number);
        });
        store<T>(to + x * out.pitch, result);
      }
    });
  }

  static void tangent_backward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    if (alone(l)) {
      const T *x = c.f.value(in), *x_t = c.t.value(in), *g = c.f.gradient(out), *g_t = c.t.gradient(out);
      T* gx_t = c.t.gradient(in);
      const bool add = l.accumulate[0];
      flat(c, l, [&](int64_t i, int64_t o) {
        const Jet<T> jet = act(l, load<T>(x + i));
        const V sum = jet.second * load<T>(x_t + i) * load<T>(g + o) + jet.first * load<T>(g_t + o);
        put<T>(gx_t + i, sum, add);
      });
      return;
    }
    const bool moving = c.net.has_tangent[l.in], normed = l.statistics != kNoStatistics;
    T* t = c.t.statistics(l);
    // gy and gy' of an element
    auto gradients = [&](const Element& e, V g, V g_t, V& gy, V& gy_t) {
      const Jet<T> jet = act(l, e.y);
      gy = jet.first * g;
      gy_t = jet.second * e.y_t * g + jet.first * g_t;
    };
    if (normed) {
      sums(c, l, c.t, t + 2 * in.pitch, t + 3 * in.pitch, 1, [&](int64_t n, int64_t y, int64_t k, V& first, V& second) {
        const Channel ch = channel(c, l, k, true);
        const T *line = c.f.value(in, n) + k, *line_t = moving ? c.t.value(in, n) + k : nullptr;
        const T *g = c.f.gradient(out, n) + y * out.row + k, *g_t = c.t.gradient(out, n) + y * out.row + k;
        for (int64_t x = 0; x < out.w; x++) {
          const V gradient = load<T>(g + x * out.pitch), tangent = load<T>(g_t + x * out.pitch);
          const V which = pooled && !l.average ? winner(l, ch, in, out, y, x, line) : V{};
          tile(l, in, out, y, x, [&](int64_t at, int number) {
            if (number < 0) return;
            const Element e = element(l, ch, line + at, line_t ? line_t + at : nullptr);
            V gy, gy_t;
            gradients(e, share(l, gradient, which, number), share(l, tangent, which, number), gy, gy_t);
            first += gy_t, second += gy_t * e.normal + gy * e.normal_t;
          });
        }
      });
      finish(c, l, t, 2);
    }
    if (!c.net.needs_gradient[l.in]) return;
    lines(c, l, [&](int64_t n, int64_t y, int64_t k) {
      const Channel ch = channel(c, l, k, true);
      const T *line = c.f.value(in, n) + k, *line_t = moving ? c.t.value(in, n) + k : nullptr;
      const T *g = c.f.gradient(out, n) + y * out.row + k, *g_t = c.t.gradient(out, n) + y * out.row + k;
      T* to = c.t.gradient(in, n) + k;
      const V scale = ch.gamma * ch.r, scale_t = ch.gamma_t * ch.r - scale * ch.r * ch.x_slope;
      for (int64_t x = 0; x < out.w; x++) {
        const V gradient = load<T>(g + x * out.pitch), tangent = load<T>(g_t + x * out.pitch);
        const V which = pooled && !l.average ? winner(l, ch, in, out, y, x, line) : V{};
        tile(l, in, out, y, x, [&](int64_t at, int number) {
          const Element e = element(l, ch, line + at, line_t ? line_t + at : nullptr);
          V gy, gy_t;
          gradients(e, share(l, gradient, which, number), share(l, tangent, which, number), gy, gy_t);
          if (normed) {
            const V q = gy - ch.sum - e.normal * ch.slope;
            const V q_t = gy_t - ch.sum_t - e.normal_t * ch.slope - e.normal * ch.slope_t;
            gy_t = scale_t * q + scale * q_t;
          }
          put<T>(to + at, gy_t, l.accumulate[0]);
        });
      }
    });
  }
};
