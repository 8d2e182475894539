// One task on one thread block: loading, the loss, a pass over its samples, the steps of the inner loop and of the
// adjoint recursion. The kernels (network.cu, score.cu, adapt.cu, meta.cu) put these together.
#pragma once

#include "stages.h"

namespace maml_ext::cuda {

template <class T>
struct Task : Stages<T> {
  using Stages<T>::plan;
  using Stages<T>::memory;
  const Call<T>& call;
  const int64_t task;

  INLINE Task(const Plan& plan, const Call<T>& call, unsigned char* shared)
      : Stages<T>{plan, {}}, call(call), task(blockIdx.x) {
    Memory<T>::template carve<false>(plan, shared, memory);
  }

  // Parameters.

  // A vector of theta's form, [T, P] or shared [P], of this task.
  INLINE const T* of_task(const T* all, bool shared) const { return all + (shared ? 0 : task * plan.parameters); }
  INLINE void load_parameters(const T* theta) const {
    each_parameter(
        plan, [&](int64_t at) { return theta[at]; }, [&](int i, int64_t, T p) { memory.parameters[i] = p; });
  }
  INLINE void load_constants() const {
    each_element(
        plan, plan.stretches, plan.fixed_stretches, [&](int64_t at) { return call.constants[at]; },
        [&](int i, int64_t, T constant) {
          memory.parameters[i] = constant;
          if (plan.dual) memory.direction[i] = 0;
        });
  }
  INLINE void load_direction() const {
    const T* const theta_t = call.theta_t ? of_task(call.theta_t, call.shared_t) : nullptr;
    each_parameter(
        plan, [&](int64_t at) { return theta_t ? in_device_memory(theta_t)[at] : T(0); },
        [&](int i, int64_t, T along) { memory.direction[i] = along; });
  }
  INLINE void clear_slopes() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < plan.adapted; i += blockDim.x) {
      memory.slope[i] = 0;
      if (plan.keeps_value) memory.value_slope[i] = 0;
    }
  }
  // What a kernel of one pass begins with, with a direction or without.
  INLINE void start(bool along) const {
    load_parameters(of_task(call.theta, call.shared));
    load_constants();
    if (along) load_direction();
    if (plan.backward) clear_slopes();
    __syncthreads();
  }
  INLINE void store_slope(T* to) const {
    each_parameter(
        plan, [](int64_t) { return 0; }, [&](int i, int64_t at, int) { to[at] = memory.slope[i]; });
  }
  // The rates of a step: one that is read once, or one for each parameter.
  struct Rates {
    const T* each;
    T one;
    INLINE T of(int64_t parameter) const { return each ? in_device_memory(each)[parameter] : one; }
  };
  INLINE Rates rates(int64_t k) const {
    const int64_t row = call.rate_rows > 1 ? k : 0;
    if (call.per_parameter) return {call.rates + row * plan.parameters, 0};
    return {nullptr, call.rates[row]};
  }

  // Samples. One of weight 0 is left out: it is read as zeros, and its gradient is 0. (Where gradients of the weights
  // are wanted it is not.)

  INLINE int64_t sample(const Data<T>& data, int64_t n) const { return task * data.samples + n; }
  // The same samples, of whose gradients none is wanted.
  static INLINE Data<T> alone(Data<T> data) {
    data.to_x = data.to_y = data.to_weight = nullptr;
    return data;
  }
  INLINE bool left_out(const Data<T>& data, int64_t n) const {
    return data.weight && !data.to_weight && !data.weight_t && in_device_memory(data.weight)[sample(data, n)] == 0;
  }
  template <class D>
  INLINE void load_samples(const Data<T>& data, int64_t first, int count) const {
    const Array<D> x = this->template value<D>(0);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * plan.features; i += blockDim.x) {
      const int n = i / plan.features, k = i % plan.features;
      const int64_t at = sample(data, first) * plan.features + i;
      D number(left_out(data, first + n) ? T(0) : data.x[at]);
      if constexpr (is_dual<D>)
        if (data.x_t) number.tangent = data.x_t[at];
      x.set(n * Stage::pitch(plan.features) + k, number);
    }
  }

  // The loss of a task: sum of w_n l_n / Z with Z = sum of w_n z_n, where z_n is 1, or for labels their class weights.

  template <class D>
  INLINE D weight(const Data<T>& data, int64_t n) const {
    if (!data.weight) return D(1);
    D w(in_device_memory(data.weight)[sample(data, n)]);
    if constexpr (is_dual<D>)
      if (data.weight_t) w.tangent = data.weight_t[sample(data, n)];
    return w;
  }
  INLINE T class_weight(int64_t k) const {
    return plan.class_weight < 0 ? T(1) : memory.parameters[plan.class_weight + k];
  }
  // -1: not counted, -2: not a class at all
  INLINE int64_t label(const Data<T>& data, int64_t n) const {
    const int64_t k = data.labels[sample(data, n)];
    return k == plan.ignore_index ? -1 : k >= 0 && k < plan.outputs ? k : -2;
  }
  INLINE T share(const Data<T>& data, int64_t n) const {
    if (plan.loss != kLabels) return 1;
    const int64_t k = label(data, n);
    return k == -1 ? T(0) : k == -2 ? T(NAN) : class_weight(k);
  }
  template <class D>
  INLINE D normaliser(const Data<T>& data) const {
    if (!data.weight && plan.loss != kLabels) return D(T(data.samples));
    D sum(0);
#pragma unroll 1
    for (int64_t n = threadIdx.x; n < data.samples; n += blockDim.x)
      if (!left_out(data, n)) sum = sum + weight<D>(data, n) * D(share(data, n));
    return sum_over_block(sum, memory.sums);
  }

  // The loss of sample first + n; its gradient times `scale` goes to gradient(0), and what is wanted to to_y, times
  // sign.
  template <class D>
  INLINE D sample_loss(const Data<T>& data, int64_t first, int n, D scale, T sign) const {
    const int pitch = Stage::pitch(plan.outputs), last = plan.stages - 1;
    const Array<D> y = this->template value<D>(last < 0 ? 0 : plan.stage[last].out).from(n * pitch);
    const Array<D> g = this->template gradient<D>(0);
    const int64_t at = sample(data, first + n) * plan.outputs;
    auto target = [&](int64_t k) {
      D number(data.y[at + k]);
      if constexpr (is_dual<D>)
        if (data.y_t) number.tangent = data.y_t[at + k];
      return number;
    };
    auto to_prediction = [&](int64_t k, D slope) { g.set(n * pitch + int(k), slope); };
    auto to_target = [&](int64_t k, D slope) {
      if (data.to_y) data.to_y[at + k] += sign * result_of(slope);
    };
    const int64_t right = plan.loss == kLabels ? label(data, first + n) : -1;
    D loss(0);
    if (left_out(data, first + n) || (plan.loss == kLabels && right < 0)) {
      loss = D(right == -2 ? T(NAN) : T(0));
#pragma unroll 1
      for (int k = 0; k < plan.outputs; k++) to_prediction(k, loss);
    } else if (plan.loss == kLabels || plan.loss == kSoftLabels) {
      loss = cross_entropy<T, D>(
          plan.outputs, right, T(plan.loss_parameter), scale, [&](int64_t k) { return y.at(int(k)); }, target,
          [&](int64_t k) { return class_weight(k); }, to_prediction, to_target);
    } else {
      const D part(T(1) / plan.outputs);
#pragma unroll 1
      for (int k = 0; k < plan.outputs; k++) {
        const auto e = element_loss(plan.loss, T(plan.loss_parameter), y.at(k), target(k));
        loss = loss + part * e.value;
        to_prediction(k, scale * part * e.by_prediction);
        to_target(k, scale * part * e.by_target);
      }
    }
#pragma unroll 1
    for (int k = 0; k < plan.outputs; k++) this->descend(last, g, n, k);
    return loss;
  }

  // Passes over the samples, a chunk of them at a time. `seed(first, count)` puts the gradient at the predictions into
  // gradient(0); slopes add up over chunks. Where all samples are in memory at once they stay there: `resident` says
  // so.
  template <class D, class Seed>
  INLINE void pass(const Data<T>& data, bool resident, T sign, Seed seed) const {
#pragma unroll 1
    for (int64_t first = 0; first < data.samples; first += plan.chunk) {
      const int count = int(smaller(int64_t(plan.chunk), data.samples - first));
      if (!resident || data.samples > plan.chunk) load_samples<D>(data, first, count);
      __syncthreads();
      this->template forward<D>(count);
      const bool backward = seed(first, count);
      __syncthreads();
      if (!backward) continue;
      const int side = this->template backward<D>(count);
      // What it reads is next written behind the barrier above.
      if (data.to_x) give_back(data, first, count, this->template gradient<D>(side), sign);
    }
  }
  template <class D>
  INLINE void give_back(const Data<T>& data, int64_t first, int count, Array<D> g, T sign) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * plan.features; i += blockDim.x) {
      const int n = i / plan.features, k = i % plan.features;
      data.to_x[sample(data, first) * plan.features + i] += sign * result_of(g.at(n * Stage::pitch(plan.features) + k));
    }
  }

  // The loss with its gradient in the slopes (and what else `data` wants), or with D a Dual their tangents. Every
  // thread gets the loss where it is `asked` for.
  template <class D>
  INLINE D score(const Data<T>& data, bool resident, bool backward, bool asked, T sign) const {
    const D each = D(1) / normaliser<D>(data);
    D total(0);
    pass<D>(data, resident, sign, [&](int64_t first, int count) {
#pragma unroll 1
      for (int n = threadIdx.x; n < count; n += blockDim.x) {
        const D scale = weight<D>(data, first + n) * each, l = sample_loss<D>(data, first, n, scale, sign);
        total = total + scale * l;
        if (data.to_weight) data.to_weight[sample(data, first + n)] += sign * result_of(l * each);
      }
      return backward;
    });
    if (asked || data.to_weight) total = sum_over_block(total, memory.sums);
    if (data.to_weight)
#pragma unroll 1
      for (int64_t n = threadIdx.x; n < data.samples; n += blockDim.x)
        data.to_weight[sample(data, n)] -= sign * result_of(total * each * D(share(data, n)));
    return total;
  }

  // theta <- theta - rate * gradient of the support loss, which is in the slopes; also into `next`, theta_{k+1} of this
  // task in device memory.
  INLINE void update(int64_t k, T* next) const {
    const Rates rate = rates(k);
    each_parameter(
        plan, [&](int64_t at) { return rate.of(at); },
        [&](int i, int64_t at, T alpha) { next[at] = memory.parameters[i] -= alpha * memory.slope[i]; });
    __syncthreads();
  }

  // lambda_{k+1} -> lambda_k = lambda_{k+1} - H (rate * lambda_{k+1}), in `lambda`, of this task in device memory; a
  // thread reads and writes the same elements of it each time. theta_k has been loaded. To first order H counts as 0:
  // the direction is, and what is left of the pass is the gradient, for that of the rates.
  INLINE void step_back(int64_t k, bool resident, T* lambda) const {
    if (!plan.dual) return;  // nobody asks for anything but lambda, which does not change
    clear_slopes();
    const Rates rate = rates(k);
    each_parameter(
        plan, [&](int64_t at) { return call.first_order ? T(0) : rate.of(at) * lambda[at]; },
        [&](int i, int64_t, T along) { memory.direction[i] = along; });
    __syncthreads();
    score<Dual<T>>(call.support, resident, true, false, -1);
    // In the same pass - lambda_{k+1} * g_k, the gradient of the rates: one for each, or their sum.
    const int64_t row = task * call.rate_rows + (call.rate_rows > 1 ? k : 0);
    T* const each = call.to_rates && call.per_parameter ? call.to_rates + row * plan.parameters : nullptr;
    T sum = 0;
    each_parameter(
        plan, [&](int64_t at) { return lambda[at]; },
        [&](int i, int64_t at, T l) {
          lambda[at] = l - memory.slope[i];
          if (!plan.keeps_value) return;
          const T change = l * memory.value_slope[i];
          if (each) in_device_memory(each)[at] -= change;
          sum += change;
        });
    if (call.to_rates && !each) {
      sum = sum_over_block(sum, memory.sums);
      if (threadIdx.x == 0) call.to_rates[row] -= sum;
    }
    __syncthreads();
  }
};

}  // namespace maml_ext::cuda
