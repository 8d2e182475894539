// 3x3 convolutions with stride 1 by Winograd's F(2x2, 3x3): 16 multiplications for 2 x 2 positions in place of 36. With
//   U = G w G^T      the filter at 16 points           V = B^T x B   a tile of 4 x 4 inputs, 2 apart
//   Y = A y^ A^T     a tile of 2 x 2 gradients
// the rules are, each a product over channels or tiles for every point,
//   y  = A^T (sum over channels of U V) A           at the positions of the output, or with the flipped filter and y^
//                                                   in place of x, of the input: its gradient
//   w^ = G^T (sum over tiles of V Y) G              the same V: this is the adjoint of the line above
// and tangents add a second term before the last transform, as in contract.h.
//
// A block of tiles is transformed, multiplied and transformed back on the stack, 250 KiB that stay in L2; the filter at
// its points, and sums for its gradient, are in Context::scratch. A tile costs 16 C K multiply-adds, and moves
// 16 (C + K) numbers out of L1 and back. Halos reach as far as the last tile does, so that tiles over the edge of an
// image read zeros (Builder::lay_out). Differences of inputs round a little: in float32 the error is 0.5 to 1.5 times
// that of direct sums. That of F(4x4, 3x3) is 3 to 9 times theirs, by the points it uses: too much.

template <class T>
struct Winograd {
  typedef Vec<T> V;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kTiles = 120 / sizeof(T);  // of a block: 30 rows are 5 blocks of 6 in product.h, or 3 of 10
  static constexpr int64_t kFewTiles = 5;             // of a block, at least, where threads share them
  static constexpr int64_t kChannels = 64;            // of a block, at most; more are taken in turns
  static constexpr int64_t kPlane = kTiles * kChannels + L;  // of a block at one point; no power of two

  // Transforms of one dimension: `from` numbers `in_step` apart to `to` numbers.
  struct OfData {  // B^T
    static constexpr int from = 4, to = 4;
    static INLINE void apply(const V* d, int step, V* r, int to_step) {
      r[0] = d[0] - d[2 * step];
      r[to_step] = d[step] + d[2 * step];
      r[2 * to_step] = d[2 * step] - d[step];
      r[3 * to_step] = d[step] - d[3 * step];
    }
  };
  struct ToResult {  // A^T
    static constexpr int from = 4, to = 2;
    static INLINE void apply(const V* m, int step, V* r, int to_step) {
      r[0] = m[0] + m[step] + m[2 * step];
      r[to_step] = m[step] - m[2 * step] - m[3 * step];
    }
  };
  struct OfGradient {  // A
    static constexpr int from = 2, to = 4;
    static INLINE void apply(const V* y, int step, V* r, int to_step) {
      r[0] = y[0];
      r[to_step] = y[0] + y[step];
      r[2 * to_step] = y[0] - y[step];
      r[3 * to_step] = -y[step];
    }
  };
  struct OfFilter {  // G
    static constexpr int from = 3, to = 4;
    static INLINE void apply(const V* g, int step, V* r, int to_step) {
      const V half = (g[0] + g[2 * step]) * T(0.5), middle = g[step] * T(0.5);
      r[0] = g[0];
      r[to_step] = half + middle;
      r[2 * to_step] = half - middle;
      r[3 * to_step] = g[2 * step];
    }
  };
  struct ToFilter {  // G^T
    static constexpr int from = 4, to = 3;
    static INLINE void apply(const V* u, int step, V* r, int to_step) {
      const V half = (u[step] + u[2 * step]) * T(0.5);
      r[0] = u[0] + half;
      r[to_step] = (u[step] - u[2 * step]) * T(0.5);
      r[2 * to_step] = u[3 * step] + half;
    }
  };
  // Along both dimensions.
  template <class F>
  static INLINE void transform(const V* in, V* out) {
    V half[F::to * F::from];
#pragma GCC unroll 4
    for (int x = 0; x < F::from; x++) F::apply(in + x, F::from, half + x, F::from);
#pragma GCC unroll 4
    for (int y = 0; y < F::to; y++) F::apply(half + y * F::from, 1, out + y * F::to, 1);
  }

  // The tiles of all samples in a row.
  struct Grid {
    int64_t high, wide, all;
    Grid(const Value& v, int64_t samples) : high((v.h + 1) / 2), wide((v.w + 1) / 2), all(samples * high * wide) {}
  };
  struct Place {
    int64_t n, y, x;  // the sample; its position in the image
    INLINE Place(const Grid& g, int64_t tile)
        : n(tile / (g.high * g.wide)), y(tile / g.wide % g.high * 2), x(tile % g.wide * 2) {}
    INLINE int64_t offset(const Value& v) const { return n * v.image + y * v.row + x * v.pitch; }
  };

  // Channels [0, channels) of tiles [begin, end) at 16 points: to[point][tile][channel].
  template <class F>
  static __attribute__((noinline)) void gather(const Grid& grid, int64_t begin, int64_t end, const Value& v,
                                               const T* data, int64_t channels, T* to) {
    const int64_t pitch = padded<T>(channels);
    for (int64_t tile = begin; tile < end; tile++, to += pitch) {
      const T* from = data + Place(grid, tile).offset(v);
      for (int64_t k = 0; k < channels; k += L) {
        V in[F::from * F::from], out[16];
#pragma GCC unroll 16
        for (int i = 0; i < F::from * F::from; i++)
          in[i] = load<T>(from + i / F::from * v.row + i % F::from * v.pitch + k);
        transform<F>(in, out);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) store<T>(to + i * kPlane + k, out[i]);
      }
    }
  }

  // sums[point][tile][channel] back to the positions of `result`, which starts from `bias` or from what is there.
  static __attribute__((noinline)) void scatter(const Grid& grid, int64_t begin, int64_t end, const T* sums,
                                                const Value& result, T* to, int64_t channels, const T* bias, bool add) {
    for (int64_t tile = begin; tile < end; tile++, sums += channels) {
      const Place place(grid, tile);
      T* at = to + place.offset(result);
      const bool below = place.y + 1 < result.h, right = place.x + 1 < result.w;
      for (int64_t k = 0; k < channels; k += L) {
        V in[16], out[4];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) in[i] = load<T>(sums + i * kPlane + k);
        transform<ToResult>(in, out);
        auto put_at = [&](T* p, V v) ALWAYS { store<T>(p, load_or_zero<T>(add ? p : bias ? bias + k : nullptr) + v); };
        put_at(at + k, out[0]);
        if (right) put_at(at + result.pitch + k, out[1]);
        if (below) put_at(at + result.row + k, out[2]);
        if (below && right) put_at(at + result.row + result.pitch + k, out[3]);
      }
    }
  }

  // Filters [tap][input][pitch], each at 16 points [input][pitch] of `plane` numbers.
  static void filters(const Context<T>& c, const Term<T>* terms, int count, int64_t inputs, int64_t pitch, bool flip,
                      int64_t plane) {
    c.crew.each(count * inputs, 16 * pitch, [&](int64_t i) {
      const T* from = terms[i / inputs].filter + i % inputs * pitch;
      T* to = c.scratch + i / inputs * 16 * plane + i % inputs * pitch;
      for (int64_t k = 0; k < pitch; k += L) {
        V in[9], out[16];
#pragma GCC unroll 9
        for (int t = 0; t < 9; t++) in[t] = load<T>(from + (flip ? 8 - t : t) * inputs * pitch + k);
        transform<OfFilter>(in, out);
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++) store<T>(to + t * plane + k, out[t]);
      }
    });
  }

  // A product for each point, of matrices that lie in planes.
  static void products(Product<T> p, const T* a, int64_t a_plane, const T* b, int64_t b_plane, int64_t c_plane,
                       int64_t width) {
    static constexpr int64_t kOnce[1] = {0};
    p.c_rows = nullptr;
    p.start = nullptr;
    p.segments = 1;
    for (int point = 0; point < 16; point++, p.c += c_plane) {
      p.segment[0] = {a + point * a_plane, b + point * b_plane, 1, kOnce, kOnce};
      product<T>(p, 0, width / L);
    }
  }

  // result (+)= bias + sum of terms; the operand is read `top` and `left` before the position.
  static void positions(const Context<T>& c, const Value& result, T* to, const Value& operand, int64_t channels,
                        const Term<T>* terms, int count, const T* bias, bool accumulate, int64_t top, int64_t left,
                        bool flip) {
    const int64_t pitch = result.pitch, plane = channels * pitch + L;
    filters(c, terms, count, channels, pitch, flip, plane);
    const Grid grid(result, c.f.count);
    const int64_t panels = (pitch + kChannels - 1) / kChannels;
    const int64_t blocks = c.crew.cut((grid.all + kTiles - 1) / kTiles, grid.all / kFewTiles, panels);
    const int64_t work = 16 * (grid.all / blocks) * channels * smaller(pitch, kChannels) * count;
    c.crew.each(blocks * panels, work, [&](int64_t i) {
      alignas(64) T data[16 * kPlane], sums[16 * kPlane];
      int32_t rows[kTiles];
      const int64_t begin = grid.all * (i / panels) / blocks, end = grid.all * (i / panels + 1) / blocks;
      const int64_t from = i % panels * kChannels, width = smaller(kChannels, pitch - from);
      Product<T> p;
      p.accumulate = false;
      for (int64_t k = 0; k < channels; k += kChannels)
        for (int s = 0; s < count; s++) {
          const int64_t deep = smaller(kChannels, channels - k);
          gather<OfData>(grid, begin, end, operand, terms[s].data - top * operand.row - left * operand.pitch + k, deep,
                         data);
          for (int64_t r = 0; r < end - begin; r++) rows[r] = int32_t(r * padded<T>(deep));
          p.c = sums, p.c_step = width;
          p.a_rows = rows, p.rows = end - begin;
          p.inner = deep, p.a_step = 1, p.b_step = pitch;
          products(p, data, kPlane, c.scratch + s * 16 * plane + k * pitch + from, plane, kPlane, width);
          p.accumulate = true;
        }
      scatter(grid, begin, end, sums, result, to + from, width, bias ? bias + from : nullptr, accumulate);
    });
  }

  // to[tap][input][output] (+)= sum over terms, whose `filter` is the gradient at out. Tiles are summed in slices, the
  // slices one after the other.
  static void filter(const Context<T>& c, const Layer& l, T* to, const Term<T>* terms, int count, bool accumulate) {
    constexpr int64_t kWorth = 96;  // tiles of a slice, at least
    const Value &in = c.in(l), &out = c.out(l);
    const int64_t pitch = out.pitch, plane = in.c * pitch + L;
    const Grid grid(out, c.f.count);
    const int64_t slices = larger<int64_t>(1, smaller(l.slices, grid.all / kWorth));
    const int64_t chunks = (in.c + kChannels - 1) / kChannels, vectors = pitch / L;
    const int64_t panels = c.crew.cut((pitch + kChannels - 1) / kChannels, vectors / 2, slices * chunks);
    const int64_t work = 16 * (grid.all / slices) * smaller(in.c, kChannels) * (pitch / panels) * count;
    c.crew.each(slices * chunks * panels, work, [&](int64_t i) {
      alignas(64) T data[16 * kPlane], gradient[16 * kPlane];
      int32_t rows[kChannels];
      for (int32_t r = 0; r < kChannels; r++) rows[r] = r;
      const int64_t slice = i / panels / chunks, k = i / panels % chunks * kChannels, panel = i % panels;
      const int64_t from = vectors * panel / panels * L, width = vectors * (panel + 1) / panels * L - from;
      const int64_t deep = smaller(kChannels, in.c - k);
      const int64_t last = grid.all * (slice + 1) / slices;
      Product<T> p;
      p.c = c.scratch + slice * 16 * plane + k * pitch + from, p.c_step = pitch;
      p.a_rows = rows, p.rows = deep;
      p.a_step = padded<T>(deep), p.b_step = width;
      p.accumulate = false;
      for (int64_t begin = grid.all * slice / slices; begin < last; begin += kTiles)
        for (int s = 0; s < count; s++) {
          const int64_t end = smaller(begin + kTiles, last);
          gather<OfData>(grid, begin, end, in, terms[s].data - l.top * in.row - l.left * in.pitch + k, deep, data);
          gather<OfGradient>(grid, begin, end, out, terms[s].filter + from, width, gradient);
          p.inner = end - begin;
          products(p, data, kPlane, gradient, kPlane, plane, width);
          p.accumulate = true;
        }
    });
    c.crew.each(in.c, 16 * slices * pitch, [&](int64_t row) {
      for (int64_t k = row * pitch; k < (row + 1) * pitch; k += L) {
        V sum[16], taps[9];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sum[i] = load<T>(c.scratch + i * plane + k);
        for (int64_t slice = 1; slice < slices; slice++)
#pragma GCC unroll 16
          for (int i = 0; i < 16; i++) sum[i] += load<T>(c.scratch + (slice * 16 + i) * plane + k);
        transform<ToFilter>(sum, taps);
#pragma GCC unroll 9
        for (int t = 0; t < 9; t++) put<T>(to + t * in.c * pitch + k, taps[t], accumulate);
      }
    });
  }
};
