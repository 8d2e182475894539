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
    V mean, r, gamma;
    V scale, shift;          // y = scale x + shift
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
    ch.gamma = affine(c.p.slot(c.net, l.weight), k, 1), ch.scale = ch.gamma * ch.r;
    ch.shift = affine(c.p.slot(c.net, l.bias), k, 0) - ch.scale * ch.mean;
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
  static INLINE Element element(const Layer& l, const Channel& ch, V x, V x_t) {
    if (l.statistics == kNoStatistics) return {x, x, x_t, x_t};
    Element e;
    e.normal = (x - ch.mean) * ch.r;
    e.y = ch.scale * x + ch.shift;
    e.normal_t = ch.r * (x_t - ch.x_mean - e.normal * ch.x_slope);
    e.y_t = ch.gamma_t * e.normal + ch.gamma * e.normal_t + ch.beta_t;
    return e;
  }
  static INLINE Jet<T> act(const Layer& l, V y) { return Act::template at<T>(y, T(l.a), T(l.b)); }

  // A piece of the work: elements [begin, end) of row y of out, sample n, the vector of channels at k.
  struct Piece {
    int64_t n, y, k, begin, end;
  };
  // Calls f(piece) for all pieces of half a sample. Those of all channels follow each other, and are short: so memory
  // is read nearly in its order, and what a channel needs is in registers for a while.
  template <class F>
  static INLINE void pieces(const Value& out, int64_t half, F f) {
    constexpr int64_t kLength = 8;
    const int64_t n = half / kHalves, from = half % kHalves;
    for (int64_t y = out.h * from / kHalves; y < out.h * (from + 1) / kHalves; y++)
      for (int64_t x = 0; x < out.w; x += kLength)
        for (int64_t k = 0; k < out.pitch; k += kLanes<T>) f(Piece{n, y, k, x, smaller(out.w, x + kLength)});
  }
  // All halves, in parallel.
  template <class F>
  static void halves(const Context<T>& c, const Layer& l, F f) {
    const Value& in = c.in(l);
    c.crew.each(c.f.count * kHalves, in.h * in.w * in.pitch / kHalves, f);
  }

  // Calls f(offset in x, number in the window or -1) for the elements of tile (y, x).
  template <class F>
  static INLINE void tile(const Layer& l, const Value& in, const Value& out, int64_t y, int64_t x, F f) {
    if (!pooled) return f(y * in.row + x * in.pitch, 0);
    const bool whole = (y + 1 < out.h || in.h == 2 * out.h) && (x + 1 < out.w || in.w == 2 * out.w);
    if (l.kh == 2 && l.kw == 2 && l.sh == 2 && l.sw == 2 && whole) {  // what nearly every network has
      const int64_t at = 2 * (y * in.row + x * in.pitch);
      f(at, 0), f(at + in.pitch, 1), f(at + in.row, 2), f(at + in.row + in.pitch, 3);
      return;
    }
    const int64_t top = y * l.sh, bottom = y + 1 == out.h ? in.h : top + l.sh;
    const int64_t left = x * l.sw, right = x + 1 == out.w ? in.w : left + l.sw;
    for (int64_t i = top; i < bottom; i++)
      for (int64_t j = left; j < right; j++)
        f(i * in.row + j * in.pitch, i - top < l.kh && j - left < l.kw ? int((i - top) * l.kw + j - left) : -1);
  }

  // What a rule passes over in a piece: channel k of x, of x' (null: 0) and their places.
  struct Line {
    const Layer& l;
    const Value &in, &out;
    Channel ch;
    const T *x, *x_t;
    int64_t y;

    INLINE Element element(int64_t at) const {
      return Block::element(l, ch, load<T>(x + at), x_t ? load<T>(x_t + at) : V{});
    }
  };
  static INLINE Line line(const Context<T>& c, const Layer& l, const Piece& p, bool tangent) {
    const Value &in = c.in(l), &out = c.out(l);
    const bool moving = tangent && c.net.has_tangent[l.in];
    const T *x = c.f.value(in, p.n) + p.k, *x_t = moving ? c.t.value(in, p.n) + p.k : nullptr;
    return {l, in, out, channel(c, l, p.k, tangent), x, x_t, p.y};
  }
  static INLINE int64_t row(const Value& out, const Piece& p) { return p.y * out.row + p.k; }

  // The window's largest element, the first of equals, and the last NaN, as in PyTorch.
  struct Winner {
    V number, x, x_t;
  };
  static INLINE Winner winner(const Line& s, int64_t x) {
    V best = splat<T>(-__builtin_huge_val());
    Winner w{};
    tile(s.l, s.in, s.out, s.y, x, [&](int64_t at, int number) ALWAYS {
      if (number < 0) return;
      const V value = load<T>(s.x + at), z = act(s.l, Block::element(s.l, s.ch, value, V{}).y).value;
      const auto wins = (z > best) | (z != z);
      best = wins ? z : best;
      w.number = wins ? splat<T>(T(number)) : w.number;
      w.x = wins ? value : w.x;
      if (s.x_t) w.x_t = wins ? load<T>(s.x_t + at) : w.x_t;
    });
    return w;
  }

  // From the gradient g at out (and its tangent) to the gradient gy at y: calls f(offset in x, element, gy, gy') for
  // what g reaches: with max pooling the winners alone, and then there is no one offset. `every`: for all, with zeros.
  template <bool every, class F>
  static INLINE void spread(const Line& s, int64_t x, V g, V g_t, F f) {
    auto reach = [&](const Element& e, V& gy, V& gy_t) ALWAYS {
      const Jet<T> jet = act(s.l, e.y);
      gy = jet.first * g;
      gy_t = jet.second * e.y_t * g + jet.first * g_t;
    };
    V gy{}, gy_t{};
    if (pooled && !s.l.average) {
      const Winner w = winner(s, x);
      const Element won = element(s.l, s.ch, w.x, w.x_t);
      reach(won, gy, gy_t);
      if constexpr (every)
        tile(s.l, s.in, s.out, s.y, x, [&](int64_t at, int number) ALWAYS {
          const auto here = w.number == splat<T>(T(number));
          f(at, s.element(at), here ? gy : V{}, here ? gy_t : V{});
        });
      else
        f(0, won, gy, gy_t);
      return;
    }
    const V part = splat<T>(pooled ? T(1) / T(s.l.divisor) : T(1));
    g *= part, g_t *= part;
    tile(s.l, s.in, s.out, s.y, x, [&](int64_t at, int number) ALWAYS {
      const Element e = s.element(at);
      if (number >= 0)
        reach(e, gy, gy_t);
      else if (every)
        gy = gy_t = V{};
      else
        return;
      f(at, e, gy, gy_t);
    });
  }

  // Per-channel sums of two quantities over half a sample: f(piece, first, second) adds up a piece.
  template <class F>
  static INLINE void sum(const Context<T>& c, const Layer& l, const Frame<T>& frame, int64_t half, F f) {
    const int64_t pitch = c.in(l).pitch;
    T* total = frame.statistics(l) + (4 + half * 2) * pitch;
    for (int64_t k = 0; k < 2 * pitch; k++) total[k] = 0;
    pieces(c.out(l), half, [&](const Piece& p) ALWAYS {
      V first{}, second{};
      f(p, first, second);
      put<T>(total + p.k, first, true);
      put<T>(total + pitch + p.k, second, true);
    });
  }
  // Over the batch: the totals, divided by `by`, go to a and b.
  template <class F>
  static void sums(const Context<T>& c, const Layer& l, const Frame<T>& frame, T* a, T* b, double by, F f) {
    const int64_t pitch = c.in(l).pitch;
    const T* partial = frame.statistics(l) + 4 * pitch;
    halves(c, l, [&](int64_t half) { sum(c, l, frame, half, f); });
    for (int64_t k = 0; k < pitch; k++) {
      double first = 0, second = 0;
      for (int64_t half = 0; half < c.f.count * kHalves; half++)
        first += partial[half * 2 * pitch + k], second += partial[(half * 2 + 1) * pitch + k];
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
    if (!l.deferred) halves(c, l, [&](int64_t half) { measure(c, l, half); });
    const T* partial = r + 3 * in.pitch;
    for (int64_t k = in.c; k < in.pitch; k++) mean[k] = r[k] = 0;  // the padding stays finite
    for (int64_t k = 0; k < in.c; k++) {
      const int64_t all = c.f.count * kHalves;
      double sum = 0, squares = 0;
      for (int64_t half = 0; half < all; half++) {
        const Part p = part(c, l, half);
        if (p.size > 0) sum += p.size * double(p.shift[k]) + partial[half * 2 * in.pitch + k];
      }
      const double center = sum / batch(c, l);
      for (int64_t half = 0; half < all; half++) {
        const Part p = part(c, l, half);
        if (p.size == 0) continue;
        const double first = partial[half * 2 * in.pitch + k], off = p.shift[k] + first / p.size - center;
        squares += partial[(half * 2 + 1) * in.pitch + k] - first * first / p.size + p.size * off * off;
      }
      mean[k] = T(center);
      r[k] = T(1 / __builtin_sqrt(larger(0.0, squares / batch(c, l)) + l.eps));
    }
  }
  // Half a sample: how many elements a channel has there, and one of them, which is subtracted before anything is
  // squared, so that nothing cancels.
  struct Part {
    double size;
    const T* shift;
  };
  static Part part(const Context<T>& c, const Layer& l, int64_t half) {
    const Value& in = c.in(l);
    const Lines lines = lines_of(c.out(l).h, l.sh, in.h, half);
    return {double((lines.end - lines.begin) * in.w), c.f.value(in, half / kHalves) + lines.begin * in.row};
  }
  // Its sums of x - shift and of the squares, the first part of `forward`.
  static void measure(const Context<T>& c, const Layer& l, int64_t half) {
    if (l.statistics != kBatch) return;
    const Value &in = c.in(l), &out = c.out(l);
    const T* shift = part(c, l, half).shift;
    sum(c, l, c.f, half, [&](const Piece& p, V& first, V& second) ALWAYS {
      const V from = load<T>(shift + p.k);
      for (int64_t x = p.begin; x < p.end; x++)
        tile(l, in, out, p.y, x, [&](int64_t at, int) ALWAYS {
          const V d = load<T>(c.f.value(in, p.n) + p.k + at) - from;
          first += d, second += d * d;
        });
    });
  }

  // An activation alone: one flat loop. Calls f(offset in x, offset in out) for every vector.
  static INLINE bool alone(const Layer& l) { return !pooled && l.statistics == kNoStatistics; }
  template <class F>
  static INLINE void flat(const Context<T>& c, const Layer& l, F f) {
    const Value &in = c.in(l), &out = c.out(l);
    if (in.image == out.image && in.halo_h + in.halo_w + out.halo_h + out.halo_w == 0) {
      const int64_t size = in.h * in.row, all = c.f.count * size;  // of a sample: whole vectors
      if (size == in.image && all < 65536) {
        for (int64_t i = 0; i < all; i += kLanes<T>) f(i, i);
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
    const V part = splat<T>(pooled && l.average ? T(1) / T(l.divisor) : T(1));
    auto write = [&](const Piece& p) ALWAYS {
      const Line s = line(c, l, p, false);
      T* to = c.f.value(out, p.n) + row(out, p);
      for (int64_t x = p.begin; x < p.end; x++) {
        V result = pooled && !l.average ? splat<T>(-__builtin_huge_val()) : V{};
        tile(l, in, out, p.y, x, [&](int64_t at, int number) ALWAYS {
          if (number < 0) return;
          const V z = act(l, s.element(at).y).value;
          if (!pooled)
            result = z;
          else if (l.average)
            result += z;
          else
            result = (z > result) | (z != z) ? z : result;
        });
        store<T>(to + x * out.pitch, result * part);
      }
    };
    halves(c, l, [&](int64_t half) { pieces(out, half, write); });
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
    const bool normed = l.statistics != kNoStatistics;
    if (normed) {
      T* saved = c.f.statistics(l);
      sums(c, l, c.f, saved + 2 * in.pitch, saved + 3 * in.pitch, 1,
           [&](const Piece& p, V& first, V& second) ALWAYS {
             const Line s = line(c, l, p, false);
             const T* g = c.f.gradient(out, p.n) + row(out, p);
             for (int64_t x = p.begin; x < p.end; x++)
               spread<false>(s, x, load<T>(g + x * out.pitch), V{}, [&](int64_t, const Element& e, V gy, V) ALWAYS {
                 first += gy, second += gy * e.normal;
               });
           });
      finish(c, l, saved, 2);
    }
    if (c.net.needs_gradient[l.in] && !l.deferred)
      halves(c, l, [&](int64_t half) { write_gradient(c, l, half); });
  }
  // The gradient at in for half a sample: the last part of `backward`.
  static void write_gradient(const Context<T>& c, const Layer& l, int64_t half) {
    const Value &in = c.in(l), &out = c.out(l);
    const bool normed = l.statistics != kNoStatistics;
    pieces(out, half, [&](const Piece& p) ALWAYS {
      const Line s = line(c, l, p, false);
      const T* g = c.f.gradient(out, p.n) + row(out, p);
      T* to = c.f.gradient(in, p.n) + p.k;
      for (int64_t x = p.begin; x < p.end; x++)
        spread<true>(s, x, load<T>(g + x * out.pitch), V{}, [&](int64_t at, const Element& e, V gy, V) ALWAYS {
          if (normed) gy = s.ch.scale * (gy - s.ch.sum - e.normal * s.ch.slope);
          put<T>(to + at, gy, l.accumulate[0]);
        });
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
        sums(c, l, c.t, t, t + in.pitch, batch(c, l), [&](const Piece& p, V& first, V& second) ALWAYS {
          const Line s = line(c, l, p, true);
          for (int64_t x = p.begin; x < p.end; x++)
            tile(l, in, out, p.y, x, [&](int64_t at, int) ALWAYS {
              const V tangent = load<T>(s.x_t + at);
              first += tangent, second += tangent * s.element(at).normal;
            });
        });
      else
        for (int64_t k = 0; k < 2 * in.pitch; k++) t[k] = 0;
    }
    auto write = [&](const Piece& p) ALWAYS {
      const Line s = line(c, l, p, true);
      T* to = c.t.value(out, p.n) + row(out, p);
      for (int64_t x = p.begin; x < p.end; x++) {
        V result{};
        spread<false>(s, x, splat<T>(1), V{}, [&](int64_t, const Element& e, V gy, V) ALWAYS { result += gy * e.y_t; });
        store<T>(to + x * out.pitch, result);
      }
    };
    halves(c, l, [&](int64_t half) { pieces(out, half, write); });
  }

  static void tangent_backward(const Context<T>& c, const Layer& l) {
    const Value &in = c.in(l), &out = c.out(l);
    if (alone(l)) {
      const T *x = c.f.value(in), *x_t = c.t.value(in), *g = c.f.gradient(out), *g_t = c.t.gradient(out);
      T* gx_t = c.t.gradient(in);
      const bool add = l.accumulate[0];
      flat(c, l, [&](int64_t i, int64_t o) {
        const Jet<T> jet = act(l, load<T>(x + i));
        V sum = jet.first * load<T>(g_t + o);
        if constexpr (Act::kCurved) sum += jet.second * load<T>(x_t + i) * load<T>(g + o);
        put<T>(gx_t + i, sum, add);
      });
      return;
    }
    if (l.statistics != kNoStatistics) {
      T* saved = c.t.statistics(l);
      sums(c, l, c.t, saved + 2 * in.pitch, saved + 3 * in.pitch, 1,
           [&](const Piece& p, V& first, V& second) ALWAYS {
             const Line s = line(c, l, p, true);
             const T *g = c.f.gradient(out, p.n) + row(out, p), *g_t = c.t.gradient(out, p.n) + row(out, p);
             for (int64_t x = p.begin; x < p.end; x++)
               spread<false>(s, x, load<T>(g + x * out.pitch), load<T>(g_t + x * out.pitch),
                             [&](int64_t, const Element& e, V gy, V gy_t) ALWAYS {
                               first += gy_t, second += gy_t * e.normal + gy * e.normal_t;
                             });
           });
      finish(c, l, saved, 2);
    }
    if (c.net.needs_gradient[l.in] && !l.deferred)
      halves(c, l, [&](int64_t half) { write_tangent(c, l, half); });
  }
  static void write_tangent(const Context<T>& c, const Layer& l, int64_t half) {
    const Value &in = c.in(l), &out = c.out(l);
    pieces(out, half, [&](const Piece& p) ALWAYS {
      const Line s = line(c, l, p, true);
      const Channel& ch = s.ch;
      const T *g = c.f.gradient(out, p.n) + row(out, p), *g_t = c.t.gradient(out, p.n) + row(out, p);
      T* to = c.t.gradient(in, p.n) + p.k;
      const V scale_t = ch.gamma_t * ch.r - ch.scale * ch.r * ch.x_slope;
      for (int64_t x = p.begin; x < p.end; x++)
        spread<true>(s, x, load<T>(g + x * out.pitch), load<T>(g_t + x * out.pitch),
                     [&](int64_t at, const Element& e, V gy, V gy_t) ALWAYS {
                       if (l.statistics != kNoStatistics) {
                         const V q = gy - ch.sum - e.normal * ch.slope;
                         const V q_t = gy_t - ch.sum_t - e.normal_t * ch.slope - e.normal * ch.slope_t;
                         gy_t = scale_t * q + ch.scale * q_t;
                       }
                       put<T>(to + at, gy_t, l.accumulate[0]);
                     });
    });
  }
};
