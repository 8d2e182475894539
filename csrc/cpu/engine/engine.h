// What the engine computes, on raw pointers. One `Call` describes every operator: what is null is not given or not
// wanted. Built once for each instruction set (engine_*.cpp); `engine_for` chooses for the machine it runs on.
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

// What the engine needs of its surroundings.
struct Machine {
  int threads;
  void (*split)(int64_t count, int64_t grain, void* context, void (*run)(void*, int64_t, int64_t));
  // Memory of at least `bytes`, zeros unless the last to hold it had the same key; `give` returns it. May throw: only
  // the thread that calls the engine takes.
  void* (*take)(int64_t bytes, const int64_t (&key)[8]);
  void (*give)(void*);
  // Called, where not null, with the seconds that a rule of a layer took.
  void (*record)(int layer, int rule, double seconds);
  double (*clock)();
};

struct Engine {
  int vector_bytes;
  void (*run_float)(const Call<float>&, const Machine&);
  void (*run_double)(const Call<double>&, const Machine&);
};

extern const Engine engine_base;
#if defined(__x86_64__)
extern const Engine engine_avx2;
extern const Engine engine_avx512;
#endif

// By what the processor has, or by MAML_EXT_CPU=base|avx2|avx512 in the environment.
const Engine& engine_for_this_machine();
// Threads of `threads`, `split` as given, and memory that is kept from call to call.
Machine this_machine(int threads, void (*split)(int64_t, int64_t, void*, void (*)(void*, int64_t, int64_t)));

struct Profile {
  int layer, rule;       // the layer below 0: work beside layers (task.h)
  double seconds;
  int kind;              // of the layer; below 0 as above
  double multiply_adds;  // what the rule needs, over all samples of the pass; 0 where it is no product
};
// While it records, every rule of every layer is noted; turning it on drops what was recorded before.
void record_profile(bool on);
// At the end of a call: sets kind and multiply-adds of what it recorded.
void settle_profile(const Network& net, int64_t tasks, int64_t support, int64_t query);
int64_t profile_entries(const Profile** entries);

}  // namespace maml_ext::engine
