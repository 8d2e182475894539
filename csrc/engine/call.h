// What an engine computes, on raw pointers. One `Call` describes every operator: what is null is not given or not
// wanted.
#pragma once

#include <cstdint>

#include "network.h"

namespace maml_ext::engine {

enum Mode : int {
  kPredict,       // predictions of `query`
  kPull,          // gradients of (cotangent . prediction)
  kPullTangent,   // their derivative along (theta_t, x_t); and the tangent of the prediction
  kScore,         // loss on `query` and its gradients
  kScoreTangent,  // the derivative of the gradients along (theta_t, x_t, y_t, weight_t)
  kAdapt,         // theta_1 .. theta_K on `support`
  kAdjoint,       // from the cotangents of theta_1 .. theta_K: the adjoint recursion
  kMeta,          // adapt on `support`, score on `query`, the adjoint recursion: all while it is in cache
};

// Samples of all tasks, in PyTorch's layout: x [T, N, ...], y like the predictions, or labels, weight [T, N].
template <class T>
struct Data {
  int64_t samples;
  const T *x, *y, *weight;
  const int64_t* labels;
  const T *x_t, *y_t, *weight_t;         // directions
  T *to_x, *to_y, *to_weight;            // gradients, or their tangents; [T, N, ...] like the data, zeros before
};

template <class T>
struct Call {
  const Network* net;
  Mode mode;
  int64_t tasks;
  const T *theta, *theta_t, *constants;  // [T, P], or [P] where shared
  bool shared, shared_t;
  Data<T> support, query;
  const T* cotangent;                    // of the predictions, [T, N, ...]
  // the inner loop
  int64_t steps;
  const T* rates;                        // [rate_rows, 1 or P]; one row for all steps, or one for each
  int64_t rate_rows;
  bool per_parameter, first_order;
  const T* const* trajectory;            // kAdjoint: theta_1 .. theta_{K-1} at least, each [T, P]
  const T* const* cotangents;            // kAdjoint: K pointers, null where the meta-loss does not depend on it
  T* const* to_trajectory;               // kAdapt: theta_1 .. theta_K
  // results
  T* prediction;                         // [T, N, ...]: of kPredict; its tangent (kPullTangent)
  T* loss;                               // [T]
  T* to_theta;                           // [T, P], or their sum over tasks [P] where `reduce`
  bool reduce;
  T* to_rates;                           // like rates, summed over tasks
};

}  // namespace maml_ext::engine
