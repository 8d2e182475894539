#include "sgd_update.h"

namespace maml_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSegments = 40;        // in a launch: what fits into the 4 KB of kernel parameters of every CUDA version
constexpr int64_t kMostBlocks = 2048;  // for a segment: some waves of the largest device; threads loop from there on
constexpr int64_t kMostPieces = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : x > high ? high : x; }

// A launch's segments, passed by value. Segment s has the blocks [first_block[s], first_block[s + 1]).
template <class scalar>
struct Batch {
  Segment<scalar> segments[kSegments];
  int64_t sums[kSegments];  // where the sums of a segment's pieces begin in the workspace
  int pieces[kSegments];
  int first_block[kSegments + 1];
  bool aligned[kSegments];  // whether groups of columns begin on 16 bytes in every row and array
};
static_assert(sizeof(Batch<float>) <= 4000 && sizeof(Batch<double>) <= 4000);

// What is loaded and stored at once: 16 bytes.
template <class scalar>
constexpr int kLanes = 16 / sizeof(scalar);

template <class scalar>
struct alignas(16) Lanes {
  scalar at[kLanes<scalar>];
};

// Kernels.

template <class scalar>
__device__ __forceinline__ int segment_of_block(const Batch<scalar>& batch) {
  int s = 0;
  while (int(blockIdx.x) >= batch.first_block[s + 1]) s++;
  return s;
}

// Positions start, start + step, ... of rows x size in a row: a thread's way through a segment, one division long.
struct Walk {
  int64_t row, column, row_step, column_step, size;

  __device__ __forceinline__ Walk(int64_t start, int64_t step, int64_t size)
      : row(start / size), column(start % size), row_step(step / size), column_step(step % size), size(size) {}

  __device__ __forceinline__ void next() {
    row += row_step;
    column += column_step;
    if (column < size) return;
    column -= size;
    row++;
  }
};

// The `count` scalars from p on, zeros behind them.
template <class scalar>
__device__ __forceinline__ Lanes<scalar> load(const scalar* p, int64_t count, bool aligned) {
  if (aligned && count >= kLanes<scalar>) return *reinterpret_cast<const Lanes<scalar>*>(p);
  Lanes<scalar> result;
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; i++) result.at[i] = i < count ? p[i] : 0;
  return result;
}

// Stores the first `count` of them.
template <class scalar>
__device__ __forceinline__ void store(scalar* p, const Lanes<scalar>& lanes, int64_t count, bool aligned) {
  if (aligned && count >= kLanes<scalar>) {
    *reinterpret_cast<Lanes<scalar>*>(p) = lanes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; i++)
    if (i < count) p[i] = lanes.at[i];
}

// In groups of 16 bytes, the last of a row perhaps shorter.
template <class scalar>
__device__ __forceinline__ void update_groups(const Segment<scalar>& s, int64_t start, int64_t step) {
  const scalar rate = s.per_parameter ? 0 : *s.lr;
  for (Walk walk(start, step, (s.size + kLanes<scalar> - 1) / kLanes<scalar>); walk.row < s.rows; walk.next()) {
    const int64_t column = walk.column * kLanes<scalar>, at = walk.row * s.pitch + column, count = s.size - column;
    const Lanes<scalar> grad = load(s.grad + at, count, true);
    const Lanes<scalar> first = load(s.first ? s.first + at : s.grad, s.first ? count : 0, true);
    const Lanes<scalar> rates = load(s.per_parameter ? s.lr + column : s.grad, s.per_parameter ? count : 0, true);
    Lanes<scalar> out;
#pragma unroll
    for (int i = 0; i < kLanes<scalar>; i++)
      out.at[i] = first.at[i] - (s.per_parameter ? rates.at[i] : rate) * grad.at[i];
    store(s.out + at, out, count, true);
  }
}

// Where rows begin anywhere: neighbouring threads take neighbouring elements.
template <class scalar>
__device__ __forceinline__ void update_elements(const Segment<scalar>& s, int64_t start, int64_t step) {
  for (Walk walk(start, step, s.size); walk.row < s.rows; walk.next()) {
    const int64_t at = walk.row * s.pitch + walk.column;
    s.out[at] = (s.first ? s.first[at] : 0) - s.lr[s.per_parameter ? walk.column : 0] * s.grad[at];
  }
}

// out = first - lr * grad. Everything in registers; each array is read or written once (rates that rows share come
// from cache).
template <class scalar>
__global__ void __launch_bounds__(kThreads) update(const Batch<scalar> batch) {
  const int s = segment_of_block(batch);
  const int64_t blocks = batch.first_block[s + 1] - batch.first_block[s];
  const int64_t start = int64_t(blockIdx.x - batch.first_block[s]) * kThreads + threadIdx.x, step = blocks * kThreads;
  if (batch.aligned[s])
    update_groups(batch.segments[s], start, step);
  else
    update_elements(batch.segments[s], start, step);
}

// The sum over a block's threads, in thread 0: a tree in each warp, then the warps in order.
__device__ __forceinline__ double block_sum(double value) {
  DYNAMIC_SHARED(memory);
  double* warps = reinterpret_cast<double*>(memory);
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarps; warp++) sum += warps[warp];
  return sum;
}

// sum += first * grad of a group, and out = -lr * first from the same load of first, if it is wanted.
template <class scalar>
__device__ __forceinline__ void group_back(const Segment<scalar>& s, int64_t at, int64_t count, bool aligned,
                                           const Lanes<scalar>& rates, double* sum) {
  const Lanes<scalar> first = load(s.first + at, count, aligned), grad = load(s.grad + at, count, aligned);
  Lanes<scalar> out;
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; i++) {
    sum[i] += double(first.at[i]) * double(grad.at[i]);
    out.at[i] = 0 - rates.at[i] * first.at[i];
  }
  if (s.out) store(s.out + at, out, count, aligned);
}

// One rate for all: every piece is a block, which takes every pieces-th 256 groups.
template <class scalar>
__device__ __forceinline__ void sum_of_piece(const Segment<scalar>& s, int piece, int pieces, bool aligned,
                                             double* sums) {
  Lanes<scalar> rates;
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; i++) rates.at[i] = *s.lr;
  double lanes[kLanes<scalar>] = {};
  const int64_t groups = (s.size + kLanes<scalar> - 1) / kLanes<scalar>;
  for (Walk walk(int64_t(piece) * kThreads + threadIdx.x, int64_t(pieces) * kThreads, groups); walk.row < s.rows;
       walk.next()) {
    const int64_t column = walk.column * kLanes<scalar>;
    group_back(s, walk.row * s.pitch + column, s.size - column, aligned, rates, lanes);
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; i++) sum += lanes[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (pieces == 1)
    *s.rate_out = scalar(-sum);
  else
    sums[piece] = sum;
}

// A rate a column: a piece is some rows, over which a thread sums the columns of a group; blocks share its columns.
template <class scalar>
__device__ __forceinline__ void sums_of_columns(const Segment<scalar>& s, int block, int blocks, int pieces,
                                                bool aligned, double* sums) {
  const int piece = block % pieces;
  const int64_t begin = s.rows * piece / pieces, end = s.rows * (piece + 1) / pieces;
  const int64_t step = int64_t(blocks / pieces) * kThreads * kLanes<scalar>;
  for (int64_t column = (int64_t(block / pieces) * kThreads + threadIdx.x) * kLanes<scalar>; column < s.size;
       column += step) {
    const Lanes<scalar> rates = load(s.lr + column, s.size - column, aligned);
    double sum[kLanes<scalar>] = {};
    for (int64_t row = begin; row < end; row++)
      group_back(s, row * s.pitch + column, s.size - column, aligned, rates, sum);
#pragma unroll
    for (int i = 0; i < kLanes<scalar>; i++) {
      if (column + i >= s.size) break;
      if (pieces == 1)
        s.rate_out[column + i] = scalar(-sum[i]);
      else
        sums[piece * s.size + column + i] = sum[i];
    }
  }
}

// out = -lr * first, and sums of pieces: results where a segment is one piece, else doubles in the workspace. Sums and
// rates are in registers, the sums of a block's warps in 64 bytes of shared memory.
template <class scalar>
__global__ void __launch_bounds__(kThreads) backward(const Batch<scalar> batch, double* workspace) {
  const int s = segment_of_block(batch);
  const int block = blockIdx.x - batch.first_block[s], blocks = batch.first_block[s + 1] - batch.first_block[s];
  double* sums = workspace + batch.sums[s];
  if (batch.segments[s].per_parameter)
    sums_of_columns(batch.segments[s], block, blocks, batch.pieces[s], batch.aligned[s], sums);
  else
    sum_of_piece(batch.segments[s], block, blocks, batch.aligned[s], sums);
}

// Adds up the pieces, in order for a rate a column, by the same tree for one rate: reads at most
// kMostPieces doubles a rate.
template <class scalar>
__global__ void __launch_bounds__(kThreads)
    finish_rate_gradient(const Batch<scalar> batch, const double* workspace) {
  const int s = segment_of_block(batch);
  const Segment<scalar>& segment = batch.segments[s];
  const double* sums = workspace + batch.sums[s];
  double sum = 0;
  if (segment.per_parameter) {
    const int64_t column = int64_t(blockIdx.x - batch.first_block[s]) * kThreads + threadIdx.x;
    if (column >= segment.size) return;
    for (int piece = 0; piece < batch.pieces[s]; piece++) sum += sums[piece * segment.size + column];
    segment.rate_out[column] = scalar(-sum);
  } else {
    for (int piece = threadIdx.x; piece < batch.pieces[s]; piece += kThreads) sum += sums[piece];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *segment.rate_out = scalar(-sum);
  }
}

// Launches.

bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class scalar>
bool aligned_rows(const Segment<scalar>& s) {
  return on_16_bytes(s.first) && on_16_bytes(s.grad) && on_16_bytes(s.out) &&
         (s.rows == 1 || s.pitch % kLanes<scalar> == 0) && (!s.per_parameter || on_16_bytes(s.lr));
}

template <class scalar>
int64_t groups_of_row(const Segment<scalar>& s) {
  return ceil_div(s.size, kLanes<scalar>);
}

// Column blocks of a segment with a rate a column.
template <class scalar>
int64_t column_blocks(const Segment<scalar>& s) {
  return between(0, ceil_div(groups_of_row(s), kThreads), kMostBlocks);
}

// Of 16 rows at least, as many as keep a device busy; or of 8 groups a thread at least.
template <class scalar>
int64_t pieces_of(const Segment<scalar>& s) {
  if (s.per_parameter) return between(1, kMostPieces / between(1, column_blocks(s), kMostPieces), ceil_div(s.rows, 16));
  return between(1, ceil_div(s.rows * groups_of_row(s), 8 * kThreads), kMostPieces);
}

template <class scalar>
int64_t sums_of(const Segment<scalar>& s) {
  const int64_t pieces = pieces_of(s);
  return pieces == 1 ? 0 : s.per_parameter ? pieces * s.size : pieces;
}

// Rows that lie side by side and share one rate are one row.
template <class scalar>
Segment<scalar> simplified(Segment<scalar> s) {
  if (s.elements() == 0 && !s.per_parameter) s.rows = 0, s.size = s.pitch = 1;
  if (s.rows > 1 && s.pitch == s.size && !s.per_parameter) s.size = s.pitch = s.elements(), s.rows = 1;
  return s;
}

template <class scalar, class... Extra>
cudaError_t launch(void (*kernel)(Batch<scalar>, Extra...), const Batch<scalar>& batch, int count, cudaStream_t stream,
                   Extra... extra) {
  if (batch.first_block[count] == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(batch.first_block[count]);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kWarps * sizeof(double);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, batch, extra...);
}

// Calls run(batch, count) for every kSegments segments; blocks_of(segment, batch, its number) fills in the rest.
template <class scalar, class BlocksOf, class Run>
cudaError_t for_batches(const Segment<scalar>* segments, int64_t count, BlocksOf blocks_of, Run run) {
  for (int64_t begin = 0; begin < count; begin += kSegments) {
    Batch<scalar> batch = {};
    const int n = int(between(0, count - begin, kSegments));
    for (int s = 0; s < n; s++) {
      batch.segments[s] = simplified(segments[begin + s]);
      batch.first_block[s + 1] = batch.first_block[s] + int(blocks_of(batch.segments[s], batch, s));
    }
    const cudaError_t error = run(batch, n);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <class scalar>
cudaError_t sgd_update(const Segment<scalar>* segments, int64_t count, cudaStream_t stream) {
  const auto blocks_of = [](const Segment<scalar>& s, Batch<scalar>& batch, int i) {
    batch.aligned[i] = aligned_rows(s);
    const int64_t positions = s.rows * (batch.aligned[i] ? groups_of_row(s) : s.size);
    return between(0, ceil_div(positions, 4 * kThreads), kMostBlocks);
  };
  return for_batches(segments, count, blocks_of, [&](const Batch<scalar>& batch, int n) {
    return launch(update<scalar>, batch, n, stream);
  });
}

template <class scalar>
int64_t backward_workspace(const Segment<scalar>* segments, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) total += sums_of(simplified(segments[i]));
  return total;
}

template <class scalar>
cudaError_t sgd_update_backward(const Segment<scalar>* segments, int64_t count, double* workspace,
                                cudaStream_t stream) {
  int64_t sums = 0;
  const auto describe = [&](const Segment<scalar>& s, Batch<scalar>& batch, int i) {
    batch.aligned[i] = aligned_rows(s);
    batch.pieces[i] = int(pieces_of(s));
    batch.sums[i] = sums;
    sums += sums_of(s);
  };
  const auto blocks_of_pieces = [&](const Segment<scalar>& s, Batch<scalar>& batch, int i) {
    describe(s, batch, i);
    return batch.pieces[i] * (s.per_parameter ? column_blocks(s) : 1);
  };
  const auto blocks_of_finish = [&](const Segment<scalar>& s, Batch<scalar>& batch, int i) {
    describe(s, batch, i);
    return batch.pieces[i] == 1 ? 0 : s.per_parameter ? ceil_div(s.size, kThreads) : 1;
  };
  const cudaError_t error = for_batches(segments, count, blocks_of_pieces, [&](const Batch<scalar>& batch, int n) {
    return launch(backward<scalar>, batch, n, stream, workspace);
  });
  if (error != cudaSuccess) return error;
  sums = 0;
  return for_batches(segments, count, blocks_of_finish, [&](const Batch<scalar>& batch, int n) {
    return launch(finish_rate_gradient<scalar>, batch, n, stream, static_cast<const double*>(workspace));
  });
}

#define INSTANTIATE(scalar)                                                                          \
  template cudaError_t sgd_update(const Segment<scalar>*, int64_t, cudaStream_t);                    \
  template int64_t backward_workspace(const Segment<scalar>*, int64_t);                              \
  template cudaError_t sgd_update_backward(const Segment<scalar>*, int64_t, double*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace maml_ext::cuda
