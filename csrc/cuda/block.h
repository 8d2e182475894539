// What the threads of a block do together: products, sums, passes over the parameters. A thread block works on one
// task; everything it works on is in shared memory.
#pragma once

#include "plan.h"

namespace maml_ext::cuda {

#include "scalar.h"

// Numbers in memory, D or T with the tangents in an array of their own.
template <class D>
struct Array {
  using T = decltype(value_of(D()));
  T *value, *tangent;

  INLINE D at(int i) const {
    if constexpr (is_dual<D>)
      return D(value[i], tangent[i]);
    else
      return value[i];
  }
  INLINE void set(int i, D x) const {
    value[i] = value_of(x);
    if constexpr (is_dual<D>) tangent[i] = x.tangent;
  }
  INLINE Array from(int offset) const { return {value + offset, is_dual<D> ? tangent + offset : nullptr}; }
};

template <class A>
INLINE A smaller(A a, A b) {
  return a < b ? a : b;
}

INLINE int warp() { return threadIdx.x / kWarp; }
INLINE int warps() { return blockDim.x / kWarp; }
INLINE int lane() { return threadIdx.x % kWarp; }

// result(r, c) = sum over k < depth of left(r, k) * right(c, k), for r < rows and c < columns.
//
// A thread sums 2 x 2 results in registers: 4 reads of shared memory for 4 multiply-adds (of Duals 8 for 12). Its rows
// lie `down` apart and its columns `across`, so that neighbouring threads have neighbouring rows. Behind the border it
// reads what is inside and stores nothing. `store` takes the sums while they are in registers, then `finish` is called
// for the same places in a loop that is not unrolled: it may be large, as a choice of activations is.
template <class D, class Left, class Right, class Store, class Finish>
INLINE void product(int rows, int columns, int depth, Left left, Right right, Store store, Finish finish) {
  constexpr int kTile = 2;
  const int down = (rows + kTile - 1) / kTile, across = (columns + kTile - 1) / kTile;
  for (int tile = threadIdx.x; tile < down * across; tile += blockDim.x) {
    const int row = tile % down, column = tile / down;
    int r[kTile], c[kTile];
    D sum[kTile][kTile] = {};
#pragma unroll
    for (int i = 0; i < kTile; i++) {
      r[i] = smaller(row + i * down, rows - 1);
      c[i] = smaller(column + i * across, columns - 1);
    }
    for (int k = 0; k < depth; k++) {
      D a[kTile], b[kTile];
#pragma unroll
      for (int i = 0; i < kTile; i++) {
        a[i] = left(r[i], k);
        b[i] = right(c[i], k);
      }
#pragma unroll
      for (int i = 0; i < kTile; i++)
#pragma unroll
        for (int j = 0; j < kTile; j++) sum[i][j] = sum[i][j] + a[i] * b[j];
    }
#pragma unroll
    for (int i = 0; i < kTile; i++)
#pragma unroll
      for (int j = 0; j < kTile; j++)
        if (row + i * down < rows && column + j * across < columns) store(r[i], c[j], sum[i][j]);
#pragma unroll 1
    for (int i = row; i < rows; i += down)
#pragma unroll 1
      for (int j = column; j < columns; j += across) finish(i, j);
  }
}

template <class T>
INLINE T sum_over_warp(T x) {
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
template <class T>
INLINE Dual<T> sum_over_warp(Dual<T> x) {
  return {sum_over_warp(x.value), sum_over_warp(x.tangent)};
}

// The sum over the block, for every thread the same. `sums` holds a number for each warp.
template <class T>
INLINE T sum_over_block(T x, T* sums) {
  x = sum_over_warp(x);
  __syncthreads();  // the last sum has been read
  if (lane() == 0) sums[warp()] = x;
  __syncthreads();
  T total = 0;
#pragma unroll 1
  for (int w = 0; w < warps(); w++) total += sums[w];
  return total;
}
template <class T>
INLINE Dual<T> sum_over_block(Dual<T> x, T* sums) {
  return {sum_over_block(x.value, sums), sum_over_block(x.tangent, sums)};
}

// Calls use(where in the block's vector, where in theta or the constants, what `load` gave for the latter) for the
// elements of these stretches. A thread has four loads under way at a time, since a load from device memory takes as
// long as some hundred instructions; of every array it always gets the same elements.
template <class Load, class Use>
INLINE void each_element(const Plan& plan, int first, int stretches, Load load, Use use) {
  constexpr int kLoads = 4;
#pragma unroll 1
  for (int s = first; s < first + stretches; s++) {
    const Stretch& stretch = plan.stretch[s];
#pragma unroll 1
    for (int start = threadIdx.x; start < stretch.count; start += kLoads * blockDim.x) {
      decltype(load(stretch.source)) loaded[kLoads];
#pragma unroll
      for (int n = 0; n < kLoads; n++) {
        const int i = start + n * blockDim.x;
        if (i < stretch.count) loaded[n] = load(stretch.source + i);
      }
#pragma unroll
      for (int n = 0; n < kLoads; n++) {
        const int i = start + n * blockDim.x;
        if (i < stretch.count) use(stretch.place(i), stretch.source + i, loaded[n]);
      }
    }
  }
}
template <class Load, class Use>
INLINE void each_parameter(const Plan& plan, Load load, Use use) {
  each_element(plan, 0, plan.stretches, load, use);
}

}  // namespace maml_ext::cuda
