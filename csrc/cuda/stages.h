// The rules of the layers. Each is written once, for numbers D: on plain numbers it gives values and gradients, on
// Duals their tangents too, which is the Hessian-vector product (forward over reverse, one pass for both).
//
//   forward    values of the input -> values before and behind the activation
//   backward   the gradient at the value before the activation -> the gradient before the activation of the stage
//              below, and of the parameters
//
// A stage's activation is applied where its argument is stored, and its derivative where the gradient behind it is: so
// there is one barrier a layer, each way.
#pragma once

#include "block.h"

namespace maml_ext::cuda {

// A call, not inlined at the many places that need it: ten activations are most of a kernel's code.
template <class T>
CALLED Jet<T> jet_of(Activation which, T x, T a, T b) {
  Jet<T> jet;
  with_activation(which, [&](auto activation) { jet = decltype(activation)::template at<T>(x, a, b); });
  return jet;
}

template <class T>
struct Stages {
  const Plan& plan;
  Memory<T> memory;

  template <class D>
  INLINE Array<D> value(int at) const {  // `at`: for one sample
    const int offset = at * plan.chunk;
    return {memory.values + offset, is_dual<D> ? memory.tangents + offset : nullptr};
  }
  template <class D>
  INLINE Array<D> gradient(int side) const {
    return Array<D>{memory.gradients, memory.gradient_tangents}.from(side * memory.apart);
  }
  template <class D>
  INLINE Array<D> parameters(int at) const {
    return Array<D>{memory.parameters, memory.direction}.from(at);
  }
  // Of a Dual the tangent is wanted, and the value only where the learning rates have a gradient.
  template <class D>
  INLINE void add_to_slope(int i, D g) const {
    memory.slope[i] += result_of(g);
    if (is_dual<D> && plan.keeps_value) memory.value_slope[i] += value_of(g);
  }

  // A function of x, by its value and derivative there.
  template <class D>
  static INLINE D function_of(D x, T value, T derivative) {
    if constexpr (is_dual<D>)
      return D(value, derivative * x.tangent);
    else
      return value;
  }
  template <class D>
  static INLINE D activated(const Stage& s, D x) {
    const Jet<T> jet = jet_of<T>(s.activation, value_of(x), T(s.a), T(s.b));
    return function_of(x, jet.value, jet.first);
  }
  template <class D>
  static INLINE D slope_of_activation(const Stage& s, D x) {
    const Jet<T> jet = jet_of<T>(s.activation, value_of(x), T(s.a), T(s.b));
    return function_of(x, jet.first, jet.second);
  }

  // Element (n, i) of what a stage computes is stored: its activation.
  template <class D>
  INLINE void activate(const Stage& s, int n, int i) const {
    if (s.activation == kIdentity) return;
    const int at = n * Stage::pitch(s.outputs) + i;
    value<D>(s.out).set(at, activated(s, value<D>(s.before).at(at)));
  }
  // Element (n, i) of the gradient behind `stage` is stored in g: it becomes that before its activation.
  template <class D>
  INLINE void descend(int stage, Array<D> g, int n, int i) const {
    if (stage < 0 || plan.stage[stage].activation == kIdentity) return;
    const Stage& s = plan.stage[stage];
    const int at = n * Stage::pitch(s.outputs) + i;
    g.set(at, g.at(at) * slope_of_activation(s, value<D>(s.before).at(at)));
  }

  // Linear layers: y = x W^T + b.

  template <class D>
  INLINE void linear_forward(const Stage& s, int count) const {
    const int pitch = Stage::pitch(s.inputs), out_pitch = Stage::pitch(s.outputs);
    const Array<D> x = value<D>(s.in), y = value<D>(s.before), weight = parameters<D>(s.weight);
    product<D>(
        count, s.outputs, s.inputs, [&](int n, int k) { return x.at(n * pitch + k); },
        [&](int j, int k) { return weight.at(j * pitch + k); },
        [&](int n, int j, D sum) { y.set(n * out_pitch + j, s.bias < 0 ? sum : sum + parameters<D>(s.bias).at(j)); },
        [&](int n, int j) { activate<D>(s, n, j); });
  }

  template <class D>
  INLINE void linear_backward(const Stage& s, int below, int count, Array<D> g, Array<D> to) const {
    const int pitch = Stage::pitch(s.inputs), out_pitch = Stage::pitch(s.outputs);
    const Array<D> x = value<D>(s.in), weight = parameters<D>(s.weight);
    // The bias is the weight of one more input, which is always 1.
    const int weights = s.learns_weight ? s.inputs : 0;
    if (s.learns_weight || s.learns_bias)
      product<D>(
          weights + s.learns_bias, s.outputs, count,
          [&](int i, int n) { return i < weights ? x.at(n * pitch + i) : D(1); },
          [&](int j, int n) { return g.at(n * out_pitch + j); },
          [&](int i, int j, D sum) { add_to_slope(i < weights ? s.weight + j * pitch + i : s.bias + j, sum); },
          [](int, int) {});
    if (s.moves)
      product<D>(
          count, s.inputs, s.outputs, [&](int n, int j) { return g.at(n * out_pitch + j); },
          [&](int i, int j) { return weight.at(j * pitch + i); },
          [&](int n, int i, D sum) { to.set(n * pitch + i, sum); }, [&](int n, int i) { descend(below, to, n, i); });
  }

  // Layer and group norm: y = gamma x^ + beta with x^ = r (x - mean) over the features of a group; a warp takes a group
  // of a sample. With h = gamma gy and means over the group, gx = r (h - mean(h) - x^ mean(h x^)).

  template <class D, class F>
  INLINE void each_group(const Stage& s, int count, F f) const {
    const int size = s.inputs / s.groups;
#pragma unroll 1
    for (int i = warp(); i < count * s.groups; i += warps()) {
      const int n = i / s.groups, first = i % s.groups * size;
      f(n, first, size, value<D>(s.saved).from(2 * i));
    }
  }
  template <class D>
  INLINE D gamma(const Stage& s, int i) const {
    return s.weight < 0 ? D(1) : parameters<D>(s.weight).at(i);
  }

  template <class D>
  INLINE void norm_forward(const Stage& s, int count) const {
    const int pitch = Stage::pitch(s.inputs);
    const Array<D> x = value<D>(s.in), y = value<D>(s.before);
    each_group<D>(s, count, [&](int n, int first, int size, Array<D> saved) {
      D sum(0), square(0);
#pragma unroll 1
      for (int i = first + lane(); i < first + size; i += kWarp) sum = sum + x.at(n * pitch + i);
      const D mean = sum_over_warp(sum) / D(size);
#pragma unroll 1
      for (int i = first + lane(); i < first + size; i += kWarp) {
        const D d = x.at(n * pitch + i) - mean;
        square = square + d * d;
      }
      const D r = D(1) / sqrt_of(sum_over_warp(square) / D(size) + D(T(s.eps)));
      if (lane() == 0) {
        saved.set(0, mean);
        saved.set(1, r);
      }
#pragma unroll 1
      for (int i = first + lane(); i < first + size; i += kWarp) {
        const D beta = s.bias < 0 ? D(0) : parameters<D>(s.bias).at(i);
        y.set(n * pitch + i, gamma<D>(s, i) * ((x.at(n * pitch + i) - mean) * r) + beta);
        activate<D>(s, n, i);
      }
    });
  }

  template <class D>
  INLINE void norm_backward(const Stage& s, int below, int count, Array<D> g, Array<D> to) const {
    const int pitch = Stage::pitch(s.inputs);
    const Array<D> x = value<D>(s.in);
    if (s.moves)
      each_group<D>(s, count, [&](int n, int first, int size, Array<D> saved) {
        const D mean = saved.at(0), r = saved.at(1);
        D sum(0), slope(0);
#pragma unroll 1
        for (int i = first + lane(); i < first + size; i += kWarp) {
          const D h = gamma<D>(s, i) * g.at(n * pitch + i);
          sum = sum + h;
          slope = slope + h * ((x.at(n * pitch + i) - mean) * r);
        }
        sum = sum_over_warp(sum) / D(size);
        slope = sum_over_warp(slope) / D(size);
#pragma unroll 1
        for (int i = first + lane(); i < first + size; i += kWarp) {
          const D normal = (x.at(n * pitch + i) - mean) * r;
          to.set(n * pitch + i, r * (gamma<D>(s, i) * g.at(n * pitch + i) - sum - normal * slope));
          descend(below, to, n, i);
        }
      });
    if (s.learns_weight || s.learns_bias)
#pragma unroll 1
      for (int i = threadIdx.x; i < s.inputs; i += blockDim.x) {
        D weight(0), bias(0);
#pragma unroll 1
        for (int n = 0; n < count; n++) {
          const Array<D> saved = value<D>(s.saved).from(2 * (n * s.groups + i / (s.inputs / s.groups)));
          const D gy = g.at(n * pitch + i);
          weight = weight + gy * ((x.at(n * pitch + i) - saved.at(0)) * saved.at(1));
          bias = bias + gy;
        }
        if (s.learns_weight) add_to_slope(s.weight + i, weight);
        if (s.learns_bias) add_to_slope(s.bias + i, bias);
      }
  }

  // scale x + shift, or an activation by itself, before which is the stage's input.
  template <class F>
  static INLINE void each_value(const Stage& s, int count, F f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * s.inputs; i += blockDim.x)
      f(i / s.inputs, i % s.inputs, i / s.inputs * Stage::pitch(s.inputs) + i % s.inputs);
  }
  template <class D>
  INLINE void elementwise_forward(const Stage& s, int count) const {
    each_value(s, count, [&](int n, int k, int at) {
      if (s.before != s.in) value<D>(s.before).set(at, D(T(s.scale)) * value<D>(s.in).at(at) + D(T(s.shift)));
      activate<D>(s, n, k);
    });
  }
  template <class D>
  INLINE void elementwise_backward(const Stage& s, int below, int count, Array<D> g, Array<D> to) const {
    if (!s.moves) return;
    each_value(s, count, [&](int n, int k, int at) {
      to.set(at, D(T(s.scale)) * g.at(at));
      descend(below, to, n, k);
    });
  }

  template <class D>
  INLINE void forward(int count) const {
#pragma unroll 1
    for (int i = 0; i < plan.stages; i++) {
      const Stage& s = plan.stage[i];
      if (s.kind == kLinear)
        linear_forward<D>(s, count);
      else if (s.kind == kGroupNorm)
        norm_forward<D>(s, count);
      else
        elementwise_forward<D>(s, count);
      __syncthreads();
    }
  }

  // From the gradient before the last activation, on side 0. Returns the side that the gradient at the network's input
  // is on, if it is wanted.
  template <class D>
  INLINE int backward(int count) const {
    int side = 0;
#pragma unroll 1
    for (int i = plan.stages - 1; i >= 0; i--) {
      const Stage& s = plan.stage[i];
      const Array<D> g = gradient<D>(side), to = gradient<D>(1 - side);
      if (s.kind == kLinear)
        linear_backward(s, i - 1, count, g, to);
      else if (s.kind == kGroupNorm)
        norm_backward(s, i - 1, count, g, to);
      else
        elementwise_backward(s, i - 1, count, g, to);
      __syncthreads();
      if (!s.moves) break;  // nothing that is adapted comes before it
      side = 1 - side;
    }
    return side;
  }
};

}  // namespace maml_ext::cuda
