// Pooling with padding, overlap or dilation, and adaptive average pooling: whatever a Block cannot take in.
// Linear once the largest elements are known: the tangent rules are the plain ones on tangents.

template <class T>
struct Pool {
  struct Window {
    int64_t begin, end, step;  // of the input, within its bounds
    int64_t counted;           // elements along this axis that an average divides by
  };

  static INLINE Window window(const Layer& l, bool high, int64_t i, int64_t in, int64_t out) {
    if (l.kind == kAverage) {
      const int64_t begin = i * in / out, end = ((i + 1) * in + out - 1) / out;
      return {begin, end, 1, end - begin};
    }
    const int64_t size = high ? l.kh : l.kw, step = high ? l.dh : l.dw, pad = high ? l.top : l.left;
    int64_t begin = i * (high ? l.sh : l.sw) - pad, end = begin + (size - 1) * step + 1;
    const int64_t padded = smaller(end, in + pad) - begin;
    while (begin < 0) begin += step;
    end = smaller(end, in);
    const int64_t span = l.count_padding ? padded : larger<int64_t>(0, end - begin);
    return {begin, end, step, (span + step - 1) / step};
  }

  // Calls f(n, offset in out, window, window, offset of channels) for every vector of the output.
  template <class F>
  static void windows(const Context<T>& c, const Layer& l, F f) {
    const Value &in = c.in(l), &out = c.out(l);
    c.crew.each(c.f.count, in.h * in.w * in.pitch, [&](int64_t n) {
      for (int64_t y = 0; y < out.h; y++) {
        const Window high = window(l, true, y, in.h, out.h);
        for (int64_t x = 0; x < out.w; x++) {
          const Window wide = window(l, false, x, in.w, out.w);
          for (int64_t k = 0; k < out.pitch; k += kLanes<T>) f(n, y * out.row + x * out.pitch + k, high, wide, k);
        }
      }
    });
  }

  static INLINE T divisor(const Layer& l, const Window& high, const Window& wide) {
    return T(l.divisor ? l.divisor : larger<int64_t>(1, high.counted * wide.counted));
  }
  static INLINE bool averages(const Layer& l) { return l.kind == kAverage || l.average; }

  // Calls f(offset, which part of a gradient belongs here) for the elements of a window.
  template <class F>
  static INLINE void shares(const Context<T>& c, const Layer& l, int64_t n, const Window& high, const Window& wide,
                            int64_t k, F f) {
    const Value& in = c.in(l);
    const Vec<T> one = splat<T>(1), part = one / divisor(l, high, wide);
    const T* from = c.f.value(in, n) + k;
    Vec<T> best = splat<T>(-__builtin_huge_val()), which{};
    T number = 0;
    if (!averages(l))
      for (int64_t y = high.begin; y < high.end; y += high.step)
        for (int64_t x = wide.begin; x < wide.end; x += wide.step, number += 1) {
          const Vec<T> z = load<T>(from + y * in.row + x * in.pitch);
          const auto wins = (z > best) | (z != z);
          best = wins ? z : best;
          which = wins ? splat<T>(number) : which;
        }
    number = 0;
    for (int64_t y = high.begin; y < high.end; y += high.step)
      for (int64_t x = wide.begin; x < wide.end; x += wide.step, number += 1)
        f(y * in.row + x * in.pitch + k, averages(l) ? part : which == splat<T>(number) ? one : Vec<T>{});
  }

  // A share of 0 takes nothing, not even of infinity: the select keeps NaN out.
  static INLINE Vec<T> scaled(Vec<T> share, Vec<T> x) { return share == Vec<T>{} ? Vec<T>{} : share * x; }

  static void pull(const Context<T>& c, const Layer& l, const Frame<T>& data) {
    windows(c, l, [&](int64_t n, int64_t at, const Window& high, const Window& wide, int64_t k) {
      Vec<T> sum{};
      shares(c, l, n, high, wide, k,
             [&](int64_t from, Vec<T> share) { sum += scaled(share, load<T>(data.value(c.in(l), n) + from)); });
      store<T>(data.value(c.out(l), n) + at, sum);
    });
  }

  static void push(const Context<T>& c, const Layer& l, const Frame<T>& data) {
    const Value &in = c.in(l), &out = c.out(l);
    if (!c.net.needs_gradient[l.in]) return;
    if (!l.accumulate[0])
      c.crew.each(c.f.count, in.h * in.row / 4, [&](int64_t n) {
        for (int64_t y = 0; y < in.h; y++)
          for (int64_t i = 0; i < in.w * in.pitch; i++) data.gradient(in, n)[y * in.row + i] = 0;
      });
    windows(c, l, [&](int64_t n, int64_t at, const Window& high, const Window& wide, int64_t k) {
      const Vec<T> g = load<T>(data.gradient(out, n) + at);
      shares(c, l, n, high, wide, k,
             [&](int64_t to, Vec<T> share) { put<T>(data.gradient(in, n) + to, scaled(share, g), true); });
    });
  }

  static void forward(const Context<T>& c, const Layer& l) { pull(c, l, c.f); }
  static void backward(const Context<T>& c, const Layer& l) { push(c, l, c.f); }
  static void tangent_forward(const Context<T>& c, const Layer& l) { pull(c, l, c.t); }
  static void tangent_backward(const Context<T>& c, const Layer& l) { push(c, l, c.t); }
};
