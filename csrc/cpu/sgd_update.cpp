#include "sgd_update.h"

#include <algorithm>

// The loops are built for three instruction sets and chosen at load time; plain functions only, so that nothing
// compiled for AVX-512 can be what an older processor runs.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace maml_ext {
namespace {

// Columns: 8 KiB of double accumulators, which stay in L1 beside the rows that stream through it.
constexpr int64_t kTile = 1024;

template <class scalar>
INLINE void update_run(scalar* __restrict out, const scalar* theta, const scalar* grad, const scalar* lr,
                       bool per_parameter, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = (theta ? theta[i] : 0) - lr[per_parameter ? i : 0] * grad[i];
}

// sums[i] += first[i] * grad[i], or sums[i % 8] where one sum is wanted: independent lanes that vectorise without
// reassociating what the source says. And out[i] = -lr * first[i], from the same load of first.
template <bool to_grad, class scalar>
INLINE void backward_run(double* __restrict sums, scalar* __restrict out, const scalar* first, const scalar* grad,
                         const scalar* lr, bool per_parameter, int64_t n) {
  if (per_parameter) {
    for (int64_t i = 0; i < n; i++) {
      sums[i] += double(first[i]) * double(grad[i]);
      if (to_grad) out[i] = 0 - lr[i] * first[i];
    }
    return;
  }
  const scalar rate = *lr;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; lane++) {
      sums[lane] += double(first[i + lane]) * double(grad[i + lane]);
      if (to_grad) out[i + lane] = 0 - rate * first[i + lane];
    }
  for (; i < n; i++) {
    sums[i % 8] += double(first[i]) * double(grad[i]);
    if (to_grad) out[i] = 0 - rate * first[i];
  }
}

CLONES void run(float* out, const float* theta, const float* grad, const float* lr, bool each, int64_t n) {
  update_run(out, theta, grad, lr, each, n);
}
CLONES void run(double* out, const double* theta, const double* grad, const double* lr, bool each, int64_t n) {
  update_run(out, theta, grad, lr, each, n);
}
CLONES void run_back(double* sums, float* out, const float* first, const float* grad, const float* lr, bool each,
                     int64_t n) {
  out ? backward_run<true>(sums, out, first, grad, lr, each, n)
      : backward_run<false>(sums, out, first, grad, lr, each, n);
}
CLONES void run_back(double* sums, double* out, const double* first, const double* grad, const double* lr, bool each,
                     int64_t n) {
  out ? backward_run<true>(sums, out, first, grad, lr, each, n)
      : backward_run<false>(sums, out, first, grad, lr, each, n);
}

}  // namespace

template <class scalar>
void sgd_update(const std::vector<Segment<scalar>>& segments, int64_t begin, int64_t end) {
  for (const auto& s : segments) {
    const int64_t last = std::min(end, s.elements());
    for (int64_t position = std::max<int64_t>(begin, 0); position < last;) {
      const int64_t row = position / s.size, column = position % s.size;
      const int64_t n = std::min(s.size - column, last - position), at = row * s.pitch + column;
      run(s.out + at, s.first ? s.first + at : nullptr, s.grad + at, s.per_parameter ? s.lr + column : s.lr,
          s.per_parameter, n);
      position += n;
    }
    begin -= s.elements();
    end -= s.elements();
    if (end <= 0) break;
  }
}

template <class scalar>
std::vector<Tile> tiles_of(const std::vector<Segment<scalar>>& segments) {
  std::vector<Tile> tiles;
  for (size_t s = 0; s < segments.size(); s++)
    for (int64_t column = 0; column < segments[s].size; column += kTile)
      tiles.push_back({int64_t(s), column, std::min(column + kTile, segments[s].size), 0});
  return tiles;
}

template <class scalar>
void sgd_update_backward(const std::vector<Segment<scalar>>& segments, std::vector<Tile>& tiles, int64_t begin,
                         int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    Tile& tile = tiles[t];
    const auto& s = segments[tile.segment];
    const int64_t n = tile.end - tile.begin;
    double sums[kTile];
    std::fill_n(sums, s.per_parameter ? n : 8, 0.0);
    for (int64_t row = 0; row < s.rows; row++) {
      const int64_t at = row * s.pitch + tile.begin;
      run_back(sums, s.out ? s.out + at : nullptr, s.first + at, s.grad + at,
               s.per_parameter ? s.lr + tile.begin : s.lr, s.per_parameter, n);
    }
    if (s.per_parameter)
      for (int64_t i = 0; i < n; i++) s.rate_out[tile.begin + i] = scalar(-sums[i]);
    else
      for (int lane = 0; lane < 8; lane++) tile.sum += sums[lane];
  }
}

template <class scalar>
void finish_rate_gradient(const std::vector<Segment<scalar>>& segments, const std::vector<Tile>& tiles) {
  std::vector<double> totals(segments.size());
  for (const Tile& tile : tiles) totals[tile.segment] += tile.sum;
  for (size_t s = 0; s < segments.size(); s++)
    if (!segments[s].per_parameter) *segments[s].rate_out = scalar(-totals[s]);
}

#define INSTANTIATE(scalar)                                                                                     \
  template void sgd_update(const std::vector<Segment<scalar>>&, int64_t, int64_t);                              \
  template std::vector<Tile> tiles_of(const std::vector<Segment<scalar>>&);                                     \
  template void sgd_update_backward(const std::vector<Segment<scalar>>&, std::vector<Tile>&, int64_t, int64_t); \
  template void finish_rate_gradient(const std::vector<Segment<scalar>>&, const std::vector<Tile>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace maml_ext
