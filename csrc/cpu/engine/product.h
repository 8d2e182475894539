// The one product everything linear is made of: C[r] (+)= sum over segments, taps s and k of
//     A[r][tap_a[s] + k * a_step] * B[tap_b[s] + k * b_step]
// where a row of B and C is `panels` vectors long and the elements of A are broadcast.
//
// Forward, A is the input at the positions of the output, a tap is one of the filter, k runs over channels. The
// input gradient is the same over the output's gradient and the transposed filter. For the filter gradient a row is
// a (tap, channel) of the input, a tap is one line of an image and k runs along it. Tangents concatenate: for
// [x' x] [W; W'] there are two segments, and the accumulators are stored once.
// Included by each build of the engine inside its anonymous namespace: see build.h.

template <class T>
struct Segment {
  const T* a;
  const T* b;
  int64_t taps;
  const int64_t* tap_a;
  const int64_t* tap_b;
};

template <class T>
struct Product {
  T* c;
  const int32_t* c_rows;   // null: row r is at r * c_step
  int64_t c_step;
  const int32_t* a_rows;
  int64_t rows, vectors;
  int64_t inner, a_step, b_step;
  const T* start;          // what every row of C starts from, such as the bias; null: zeros
  bool accumulate;         // or from what is there
  Segment<T> segment[2];
  int segments;
};

// Rows of accumulators for each width, such that they, a row of B and one element of A fit the registers.
#if MAML_VECTOR_BYTES == 64
constexpr int kBlockRows[kWidest + 1] = {0, 12, 10, 8, 6, 5};
#elif defined(__aarch64__)
constexpr int kBlockRows[kWidest + 1] = {0, 8, 8, 6, 6};
#else
constexpr int kBlockRows[kWidest + 1] = {0, 6, 5, 3, 2};
#endif

template <class T, int M, int W>
__attribute__((noinline)) void block_product(const Product<T>& p, int64_t row, int64_t column) {
  Vec<T> sum[M][W] = {};
  for (int g = 0; g < p.segments; g++) {
    const Segment<T>& segment = p.segment[g];
    const T* a[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) a[m] = segment.a + p.a_rows[row + m];
    const int64_t inner = p.inner, a_step = p.a_step, b_step = p.b_step;
    for (int64_t s = 0; s < segment.taps; s++) {
      int64_t at = segment.tap_a[s];
      const T* b = segment.b + segment.tap_b[s] + column;
      for (int64_t k = 0; k < inner; k++) {
        Vec<T> bs[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) bs[w] = load<T>(b + w * kLanes<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const Vec<T> as = splat<T>(a[m][at]);
#pragma GCC unroll 4
          for (int w = 0; w < W; w++) sum[m][w] += as * bs[w];
        }
        at += a_step;
        b += b_step;
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    T* c = p.c + (p.c_rows ? p.c_rows[row + m] : (row + m) * p.c_step) + column;
    const T* start = p.accumulate ? c : p.start ? p.start + column : nullptr;
#pragma GCC unroll 4
    for (int w = 0; w < W; w++)
      store<T>(c + w * kLanes<T>, load_or_zero<T>(start ? start + w * kLanes<T> : nullptr) + sum[m][w]);
  }
}

template <class T, int W, int M = kBlockRows[W]>
INLINE void block_of_rows(const Product<T>& p, int64_t rows, int64_t row, int64_t column) {
  if (rows == M)
    block_product<T, M, W>(p, row, column);
  else if constexpr (M > 1)
    block_of_rows<T, W, M - 1>(p, rows, row, column);
}

// All rows of the vectors [first, first + W): in blocks of nearly equal size.
template <class T, int W>
void panel_product(const Product<T>& p, int64_t first) {
  const int64_t blocks = (p.rows + kBlockRows[W] - 1) / kBlockRows[W], each = p.rows / blocks;
  int64_t larger_ones = p.rows - each * blocks;
  for (int64_t row = 0; row < p.rows;) {
    const int64_t rows = each + (larger_ones-- > 0);
    block_of_rows<T, W>(p, rows, row, first * kLanes<T>);
    row += rows;
  }
}

// Vectors [begin, end) of every row.
template <class T>
void product(const Product<T>& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t left = end - begin;
    const int64_t width = left == 5 ? 3 : left < 4 ? left : 4;
    switch (width) {
      case 1: panel_product<T, 1>(p, begin); break;
      case 2: panel_product<T, 2>(p, begin); break;
      case 3: panel_product<T, 3>(p, begin); break;
      default: panel_product<T, 4>(p, begin);
    }
    begin += width;
  }
}

// Which lanes interleave the lower halves of two vectors, and the upper.
template <class T>
struct Interleaving {
  typename Simd<T>::Int low, high;
};
template <class T>
INLINE Interleaving<T> interleaving() {
  Interleaving<T> result;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; i++) {
    result.low[i] = i / 2 + (i % 2) * kLanes<T>;
    result.high[i] = result.low[i] + kLanes<T> / 2;
  }
  return result;
}

// Transposes a tile of L vectors in registers. Interleaving the halves of the list, log2(L) times, moves the index of
// a lane to where the index of its vector was: always the same two shuffles.
template <class T>
INLINE void transpose_tile(Vec<T>* v) {
  constexpr int L = kLanes<T>;
  const Interleaving<T> lanes = interleaving<T>();
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) next[i] = __builtin_shuffle(v[i / 2], v[i / 2 + L / 2], i % 2 ? lanes.high : lanes.low);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) v[i] = next[i];
  }
}

// Of L vectors, the sum of the lanes of each: half as many vectors in each of log2(L) rounds. Where A tasks are abreast,
// of L / A vectors for each of them.
template <class T, int A = 1>
INLINE Vec<T> sums_of_lanes(Vec<T>* v) {
  typedef typename Whole<T, A>::Type U;  // its sums are of T
  constexpr int L = kLanes<U>;
  const Interleaving<U> lanes = interleaving<U>();
#pragma GCC unroll 4
  for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++)
      v[i] = (Vec<T>)__builtin_shuffle((Vec<U>)v[i], (Vec<U>)v[i + half], lanes.low) +
             (Vec<T>)__builtin_shuffle((Vec<U>)v[i], (Vec<U>)v[i + half], lanes.high);
  return v[0];
}

// out[c][r] = in[r][c]. `rows` of `in` may be fewer than whole vectors; the columns of both are padded to those.
template <class T>
void transpose(const T* in, int64_t in_step, T* out, int64_t out_step, int64_t rows, int64_t columns) {
  typedef T Moved __attribute__((may_alias));  // T may be two numbers in one
  constexpr int L = kLanes<T>;
  if (columns <= L / 4) {
    for (int64_t c = 0; c < columns; c++) {
      for (int64_t r = 0; r < rows; r++) ((Moved*)out)[c * out_step + r] = ((const Moved*)in)[r * in_step + c];
      for (int64_t r = rows; r < out_step; r++) ((Moved*)out)[c * out_step + r] = 0;
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L) {
      Vec<T> tile[L];
      const int64_t count = smaller<int64_t>(L, rows - r), lines = smaller<int64_t>(L, columns - c);
      // Numbers of registers are constants: a loop that ends early would keep the tile in memory.
      const T* from = in + r * in_step + c;
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        tile[i] = i < count ? load<T>(from) : Vec<T>{};
        from += in_step;
        IN_ORDER(from);
      }
      transpose_tile<T>(tile);
      T* to = out + c * out_step + r;
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        if (i < lines) store<T>(to, tile[i]);
        to += out_step;
        IN_ORDER(to);
      }
    }
}
