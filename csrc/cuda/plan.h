// A network as the kernels execute it: a chain of layers that one thread block runs for one task, in shared memory.
//
// A Plan travels as a kernel parameter, which lies in constant memory: every thread reads the same word of it at a
// time. What a block keeps where is decided here, by `Memory::carve`, and nowhere else: the host counts with it, the
// kernels take their pointers from it.
#pragma once

#include <cstdint>
#include <string>

#include "../engine/call.h"
#include "platform.h"

namespace maml_ext::cuda {

using namespace engine;

constexpr int kLayers = 16, kSlots = 40;  // parameters of a kernel are limited to 4 KiB
constexpr int kThreads = 256, kWarp = 32;
constexpr int kMaximumElements = 1 << 16;  // more than any shared memory holds; products of two stay within an int64

enum StageKind : int { kLinear, kGroupNorm, kElementwise };

// A layer and the activation behind it (kIdentity: none). Values are [samples][pitch] with the pitch odd, so that
// threads that take one sample each read different banks of shared memory; likewise rows of weights.
struct Stage {
  StageKind kind;
  Activation activation;
  int inputs, outputs;  // features
  int in, before, out;  // where values are in a frame, for one sample: its input, before and behind the activation
  int saved, groups;    // norms: where mean and 1 / deviation of each group are
  int weight, bias;     // where in the vector of parameters, -1: absent
  bool learns_weight, learns_bias;  // not constants
  bool moves;                       // a gradient at the input is wanted
  double a, b;                      // of the activation
  double eps, scale, shift;         // of the norm; kElementwise: scale x + shift, where before != in

  HOST_DEVICE static int pitch(int features) { return features | 1; }
};

// A stretch of theta (or of the constants), `count` elements in rows, and where it is in the block's vector of
// parameters, where the pitch of rows is odd.
struct Stretch {
  int64_t source;
  int at, count, columns;
  uint32_t inverse;  // 2^32 / columns, rounded up: by it a product takes the place of a division; exact up to 2^16

  HOST_DEVICE int place(int i) const {
    return at + i + (columns % 2 ? 0 : int(uint64_t(uint32_t(i)) * inverse >> 32));
  }
};

struct Plan {
  int stages, stretches, fixed_stretches;  // the stretches of theta first
  int adapted, fixed;                      // elements of the block's vector: of theta, of the constants behind it
  int features, outputs;                   // of a sample and of its prediction
  int frame, widest;                       // elements of a frame for one sample; the largest pitch
  int64_t parameters, constants;
  LossKind loss;
  int64_t ignore_index;
  int class_weight;  // where in the vector of parameters, -1: absent
  double loss_parameter;
  // Of the call:
  int chunk;  // samples that are in memory at a time
  bool backward, dual, keeps_value;
  Stage stage[kLayers];
  Stretch stretch[kSlots];
};

// What a block has in shared memory, in numbers of T.
template <class T>
struct Memory {
  T *parameters, *direction;  // theta and the constants; a direction of theta, 0 for the constants
  T *slope, *value_slope;     // gradient of theta: of a dual pass its tangent, and the value where it is wanted
  T *values, *tangents;       // a frame for each sample of a chunk
  // Gradients at the values of a layer and of the one before it, which take turns: the second lies `apart` from the
  // first. (Two pointers to choose from would no longer be known to the compiler to be to shared memory.)
  T *gradients, *gradient_tangents;
  int apart;
  T* sums;  // of each warp

  // Returns the bytes needed; with `counts` that is all.
  template <bool counts>
  HOST_DEVICE static int64_t carve(const Plan& plan, unsigned char* base, Memory& memory) {
    int64_t used = 0;
    auto take = [&](int64_t count) {
      T* array = nullptr;
      if constexpr (!counts) array = (T*)(base + used);
      used += count * int64_t(sizeof(T));
      if constexpr (!counts) poison(base + used, kGap);
      used += kGap;
      return array;
    };
    const int64_t all = plan.adapted + plan.fixed, chunk = plan.chunk;
    memory.parameters = take(all);
    memory.direction = take(plan.dual ? all : 0);
    memory.slope = take(plan.backward ? plan.adapted : 0);
    memory.value_slope = take(plan.keeps_value ? plan.adapted : 0);
    memory.values = take(plan.frame * chunk);
    memory.tangents = take(plan.dual ? plan.frame * chunk : 0);
    const int64_t extent = plan.widest * chunk;
    memory.apart = int(extent) + kGap / int(sizeof(T));
    memory.gradients = take(plan.backward ? extent : 0);
    take(plan.backward ? extent : 0);
    memory.gradient_tangents = take(plan.dual ? extent : 0);
    take(plan.dual ? extent : 0);
    memory.sums = take(kThreads / kWarp);
    return used;
  }
};

// Puts the plan of a network together, or says why there is none.
std::string plan_of(const Network& net, Plan& plan);

// Chooses what depends on the call, of numbers of so many bytes: whether there are gradients, and how many samples are
// worked on at a time in `available` bytes of shared memory. Returns the bytes needed, or says why it does not fit.
struct Size {
  int64_t bytes;
  int threads;
  std::string misfit;
};
Size size_of(Plan& plan, Mode mode, bool wants_rates, bool first_order, int64_t samples, int number_bytes,
             int64_t available);

// Why the kernels cannot run a network, whatever the call; "" if they can. (What needs most is a Hessian-vector product
// with gradients of the rates.)
std::string misfit_of(const Network& net, int number_bytes, int64_t available);

}  // namespace maml_ext::cuda
