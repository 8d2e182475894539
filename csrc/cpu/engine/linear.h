// The products of contract.h for linear layers on vectors: a sample is a row, rows are evenly spaced. Small networks
// are made of these, and what they spend beside products counts: rows need no tables, and the gradient of a filter that
// no other layer reads is not stored but goes into the step it is for (Sink), and a ReLU behind or before the layer is
// taken where results are stored (Layer::rectifies, gates).

// C = from + scale * sum over terms and k of A[row * a_row + k * a_step] * B[k * b_row ...], like product.h's.
template <class T>
struct Dense {
  T* c;
  int64_t c_row;
  const T* from;        // null: zeros
  int64_t from_row;     // 0: the same for every row, such as the bias
  T scale;
  int64_t rows, inner, a_row, a_step, b_row;
  struct {
    const T *a, *b;
  } term[2];
  int terms;
  const T* gate;        // values of a ReLU, at rows c_row apart, that C goes through; C itself: they are its results
};

// What a ReLU with the value `gate`, before or behind it, makes of a value or a gradient. NaN stays NaN.
template <class T>
INLINE Vec<T> gated(Vec<T> gate, Vec<T> v) {
  return gate <= Vec<T>{} ? Vec<T>{} : v;
}

// Rows [row, end), M at a time, of W vectors in registers. An element of A is the numbers of all `abreast` tasks.
template <class T, int abreast, int M, int W>
__attribute__((noinline)) void dense_rows(const Dense<T>& p, int64_t row, int64_t end, int64_t column) {
  const int64_t inner = p.inner, a_row = p.a_row, a_step = p.a_step, b_row = p.b_row;
  for (; row < end; row += M) {
    Vec<T> sum[M][W] = {};
    for (int g = 0; g < p.terms; g++) {
      const T *a = p.term[g].a + row * a_row, *b = p.term[g].b + column;
#pragma GCC unroll 2
      for (int64_t k = 0; k < inner; k++) {
        Vec<T> bs[W];
#pragma GCC unroll 5
        for (int w = 0; w < W; w++) bs[w] = load<T>(b + w * kLanes<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const Vec<T> as = spread<T, abreast>(a + m * a_row);
#pragma GCC unroll 5
          for (int w = 0; w < W; w++) sum[m][w] += as * bs[w];
        }
        a += a_step;
        b += b_row;
      }
    }
    const Vec<T> scale = splat<T>(p.scale);
    auto finish = [&](auto through) ALWAYS {
      const T* from = p.from ? p.from + row * p.from_row + column : kZeros<T>;
      const int64_t from_row = p.from ? p.from_row : 0, c_row = p.c_row;
      T* c = p.c + row * c_row + column;
      const T* gate = (p.gate ? p.gate : p.c) + row * c_row + column;
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
#pragma GCC unroll 5
        for (int w = 0; w < W; w++) {
          constexpr int L = kLanes<T>;
          store<T>(c + w * L, through(load<T>(from + w * L) + scale * sum[m][w], gate + w * L));
        }
        c += c_row, from += from_row, gate += c_row;
        IN_ORDER(c);
        IN_ORDER(from);
        IN_ORDER(gate);
      }
    };
    if (!p.gate)
      finish([](Vec<T> v, const T*) ALWAYS { return v; });
    else if (p.gate == p.c)
      finish([](Vec<T> v, const T*) ALWAYS { return gated<T>(v, v); });
    else
      finish([](Vec<T> v, const T* gate) ALWAYS { return gated<T>(load<T>(gate), v); });
  }
}

template <class T, int abreast, int W, int M = kBlockRows[W]>
INLINE void dense_blocks(const Dense<T>& p, int64_t each, int64_t row, int64_t end, int64_t column) {
  if (each == M)
    dense_rows<T, abreast, M, W>(p, row, end, column);
  else if constexpr (M > 1)
    dense_blocks<T, abreast, W, M - 1>(p, each, row, end, column);
}

// Rows [row, end) in blocks of nearly equal size, as panel_product has them.
template <class T, int abreast, int W>
void dense_panel(const Dense<T>& p, int64_t row, int64_t end, int64_t column) {
  const uint32_t rows = end - row, blocks = (rows + kBlockRows[W] - 1) / kBlockRows[W], each = rows / blocks;
  const int64_t cut = row + int64_t(rows - each * blocks) * (each + 1);
  if (cut > row) dense_blocks<T, abreast, W>(p, each + 1, row, cut, column);
  if (cut < end) dense_blocks<T, abreast, W>(p, each, cut, end, column);
}

// For one task, or for A of them abreast: then a channel is A numbers wide.
template <class T, int A>
struct Linear {
  typedef typename Contract<T>::Term Term;

  // Rows [row, end) of vectors [first, first + width) of C.
  static void part(const Dense<T>& p, int64_t row, int64_t end, int64_t first, int64_t width) {
    switch (width) {
      case 1: return dense_panel<T, A, 1>(p, row, end, first * kLanes<T>);
      case 2: return dense_panel<T, A, 2>(p, row, end, first * kLanes<T>);
      case 3: return dense_panel<T, A, 3>(p, row, end, first * kLanes<T>);
      case 4: return dense_panel<T, A, 4>(p, row, end, first * kLanes<T>);
      default: return dense_panel<T, A, kWidest>(p, row, end, first * kLanes<T>);
    }
  }
  // All of C, whose rows are `vectors` long.
  static void multiply(const Context<T>& c, const Dense<T>& p, int64_t vectors) {
    constexpr int64_t kRows = 48;
    if (p.rows <= kRows && vectors <= kWidest) return part(p, 0, p.rows, 0, vectors);
    const int64_t chunks = (p.rows + kRows - 1) / kRows, panels = (vectors + kWidest - 1) / kWidest;
    c.crew.each(chunks * panels, p.rows / chunks * vectors / panels * kLanes<T> * p.inner * p.terms, [&](int64_t i) {
      const int64_t chunk = i / panels, panel = i % panels, first = vectors * panel / panels;
      part(p, p.rows * chunk / chunks, p.rows * (chunk + 1) / chunks, first, vectors * (panel + 1) / panels - first);
    });
  }

  // A row for each sample: to (+)= bias + sum over terms of data * filter, through a ReLU where `gate` is not null.
  static void samples(const Context<T>& c, int64_t group, const Rows& rows, const Value& result, T* to,
                      const Value& operand, const Term* terms, int count, const T* bias, bool accumulate,
                      const T* gate) {
    constexpr int64_t kCache = 24 * 1024 / sizeof(T);  // elements of filter kept in L1, as in contract.h
    const int64_t vectors = result.pitch / kLanes<T>;
    if (A == 1 && c.f.count > 2 * kBlockRows[4] && operand.c * smaller<int64_t>(vectors, 4) * kLanes<T> > kCache) {
      Contract<T>::positions(c, group, rows, result, to, operand, operand.c, terms, count, bias, accumulate);
      if (gate)
        c.crew.each(c.f.count, result.pitch, [&](int64_t n) {
          for (int64_t i = n * result.image; i < n * result.image + result.pitch; i += kLanes<T>)
            store<T>(to + i, gated<T>(load<T>(gate + i), load<T>(to + i)));
        });
      return;
    }
    Dense<T> p{to, result.image, accumulate ? to : bias, accumulate ? result.image : 0, 1,
               c.f.count, operand.c, operand.image, A, result.pitch, {}, count, gate};
    for (int s = 0; s < count; s++) p.term[s] = {terms[s].data, terms[s].filter};
    multiply(c, p, vectors);
  }

  // The filter of a narrow layer lies along the input. Here a sample's product with a row is a sum over lanes, of as
  // many samples at once as a vector has lanes.
  static void narrow_forward(const Context<T>& c, const Layer& l, T* to, const Term* terms, int count, const T* bias) {
    constexpr int L = kLanes<T>;
    const Value &in = c.in(l), &out = c.out(l);
    const int64_t last = (in.c * A - 1) / L * L;
    typename Simd<T>::Int real;
    for (int i = 0; i < L; i++) real[i] = last + i < in.c * A ? -1 : 0;
    for (int64_t o = 0; o < out.c; o++)
      for (int64_t n = 0; n < c.f.count; n += L / A) {
        const int64_t samples = smaller<int64_t>(L / A, c.f.count - n);
        Vec<T> sum[L / A];
        for (int i = 0; i < L / A; i++) {
          sum[i] = Vec<T>{};
          if (i < samples)
            for (int s = 0; s < count; s++) {
              const T *data = terms[s].data + (n + i) * in.image, *filter = terms[s].filter + o * in.pitch;
              for (int64_t k = 0; k < last; k += L) sum[i] += load<T>(data + k) * load<T>(filter + k);
              // What is in the padding, a NaN of an earlier call perhaps, does not count.
              sum[i] += select<T>(real, load<T>(data + last) * load<T>(filter + last), Vec<T>{});
            }
        }
        T total[L];
        store<T>(total, spread<T, A>(bias ? bias + o * A : kZeros<T>) + sums_of_lanes<T, A>(sum));
        for (int i = 0; i < samples; i++)
          __builtin_memcpy(to + (n + i) * out.image + o * A, total + i * A, A * sizeof(T));
      }
  }

  static void to_output(const Context<T>& c, const Layer& l, T* to, const Term* terms, int count, const T* bias) {
    if (c.net.slot[l.weight].narrow)
      narrow_forward(c, l, to, terms, count, bias);
    else
      samples(c, l.group, *l.forward, c.out(l), to, c.in(l), terms, count, bias, false,
              l.rectifies ? c.f.value(c.out(l)) : nullptr);
  }

  // Of f(n), four sums at a time: each waits for itself.
  template <class F>
  static INLINE Vec<T> over_samples(int64_t count, F f) {
    Vec<T> sum[4] = {};
    int64_t n = 0;
    for (; n + 4 <= count; n += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[i] += f(n + i);
    for (; n < count; n++) sum[0] += f(n);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // The gradient of `rows` rows of parameters goes where the sink says: that of row r is the sum over samples and terms
  // of a[n * a_step + r * a_row] times b[n * b_step ...], `vectors` long.
  static void gradient(const Context<T>& c, const Sink<T>& sink, int64_t rows, int64_t vectors, int64_t a_row,
                       int64_t a_step, int64_t b_step, const Term* terms, int count) {
    const int64_t pitch = vectors * kLanes<T>;
    if (rows <= 2) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < pitch; k += kLanes<T>) {
          Vec<T> total{};
          for (int s = 0; s < count; s++) {
            const T *a = terms[s].data + r * a_row, *b = terms[s].filter + k;
            total += over_samples(c.f.count, [&](int64_t n) ALWAYS { return spread<T, A>(a + n * a_step) * load<T>(b + n * b_step); });
          }
          put<T>(sink, r * pitch + k, total);
        }
      return;
    }
    Dense<T> p{sink.to, pitch, sink.from, pitch, sink.scale, rows, c.f.count, a_row, a_step, b_step, {}, count,
               nullptr};
    for (int s = 0; s < count; s++) p.term[s] = {terms[s].data, terms[s].filter};
    multiply(c, p, vectors);
  }

  // The gradients of the parameters: terms are of data and gradients; g, of which the bias' is the sum.
  static void to_parameters(const Context<T>& c, const Layer& l, const Term* terms, int count, const T* g) {
    const Value &in = c.in(l), &out = c.out(l);
    if (const Sink<T> sink = c.sink(l.weight, l.writes_weight); sink.to) {
      if (c.net.slot[l.weight].narrow) {
        Term turned[2] = {};
        for (int s = 0; s < count; s++) turned[s] = {terms[s].filter, terms[s].data};
        gradient(c, sink, out.c, in.pitch / kLanes<T>, A, out.image, in.image, turned, count);
        // Or the padding, which data may fill, would count in the next forward pass.
        for (int64_t o = 0; o < out.c; o++)
          for (int64_t k = in.c * A; k < in.pitch; k++) sink.to[o * in.pitch + k] = 0;
      } else {
        gradient(c, sink, in.c, out.pitch / kLanes<T>, A, in.image, out.image, terms, count);
      }
    }
    if (const Sink<T> sink = c.sink(l.bias, l.writes_bias); sink.to) {
      const T ones[2] = {1, 1};
      const Term term{ones, g};
      gradient(c, sink, 1, out.pitch / kLanes<T>, 0, 0, out.image, &term, 1);
    }
  }

  static void to_input(const Context<T>& c, const Layer& l, T* to, const Term* terms, int count) {
    samples(c, l.group, *l.backward, c.in(l), to, c.out(l), terms, count, nullptr, l.accumulate[0],
            l.gates ? c.f.value(c.in(l)) : nullptr);
  }
};
