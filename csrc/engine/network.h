// A network program as the engine executes it: parsed, checked, laid out for vectors of a given number of lanes.
//
// Only plain data here, no member functions and no std types: the engine is built several times for different
// instruction sets, and an inline function shared between those builds could end up as the wrong one.
#pragma once

#include <cstdint>

namespace maml_ext::engine {

enum Kind : int { kContract, kNorm, kActivation, kPool, kAverage, kReshape, kCombine, kSoftmax, kBlock, kKinds };
constexpr int64_t kHalves = 2;  // of a sample: what a block of norm, activation and pooling shares out
enum Statistics : int { kBatch, kFixed, kSample, kNoStatistics };
enum Activation : int {
  kRelu, kLeakyRelu, kElu, kGelu, kGeluTanh, kSilu, kSoftplus, kTanh, kSigmoid, kSin, kIdentity
};
enum LossKind : int { kNoLoss = -1, kMse, kHuber, kLabels, kSoftLabels, kBinary };

// A tensor of the network, channels last, one image a sample: position (y, x) of sample n starts at
// n * image + origin + y * row + x * pitch. `pitch` is the number of channels (of all tasks abreast) rounded up to
// whole vectors, and around each image is a halo of zeros as wide as the padding of the convolutions that read it: so no
// kernel has a special case for a border or a remainder. (The input of convolutions alone is not rounded up: it is read
// scalar by scalar.) What an activation puts out may have the place of its input.
struct Value {
  int64_t c, h, w;
  int64_t pitch, row, image, origin;
  int64_t halo_h, halo_w;
  int64_t at;           // of sample 0, in elements and for one sample: times the samples of the frame
  int64_t gradient_at;  // likewise of its gradient
  bool spent;           // nobody reads the value once its gradient is there, which may take its place
};

// A parameter tensor. Inside the engine filters are [taps][inputs][outputs rounded up], so that an output vector is
// contiguous, and for input gradients [taps][outputs][inputs rounded up]; per-channel vectors are rounded up. A narrow
// filter has so few outputs that vectors of them would be mostly padding: it is [outputs][inputs rounded up] for all.
enum SlotKind : int { kFilter, kChannels, kElements };
struct Slot {
  SlotKind kind;
  bool fixed;        // lies in the constants, not in theta
  int64_t source;    // where it starts there
  int64_t taps, inputs, outputs, groups;  // filter: inputs and outputs in all; channels, elements: outputs = channels
  int64_t height, width;                  // elements
  bool narrow;
  bool stepped;      // adapted, and one linear layer alone reads it: its gradient may go into the step at once
  int64_t row;                            // elements of a row of all tasks abreast, before it is rounded up
  int64_t at, extent;                     // in the engine's parameter vector
  int64_t transposed;                     // filter: where its transpose is, -1: nobody needs it
};

// One set of rows of a product: which rows of the result, which of the operand, over which taps.
struct Rows {
  int64_t count;
  const int32_t* result;
  const int32_t* operand;
  int64_t taps;
  const int64_t* tap_operand;
  const int64_t* tap_filter;
};

struct Layer {
  Kind kind;
  int in, second, out;
  double a, b, eps;  // the numbers of the program: of the activation, of the norm
  int weight, bias, mean, variance;  // slots, -1: absent
  bool writes_weight, writes_bias;   // the first in the backward pass to reach this slot: stores, others add
  bool accumulate[2];                // whether the gradient of in, second already holds something
  // windows: convolution and pooling
  int64_t kh, kw, sh, sw, top, left, dh, dw;
  bool average, count_padding;
  int64_t divisor;
  // contract
  int64_t group;          // samples a table of rows covers
  const Rows* forward;    // result: positions of out, operand: positions of in
  const Rows* backward;   // one for each phase of the stride: result: positions of in, operand: of out
  int64_t phases;
  bool linear;            // on vectors: one tap, one position
  bool rectifies;         // linear: takes what it puts out through the ReLU behind it, which works in place
  bool gates;             // linear: takes the gradient at its input through the ReLU that puts it out, in place too
  const int32_t* filter_rows;  // of in, for each row (tap, input) of the filter gradient
  bool winograd;               // by cpu/engine/winograd.h,
  bool few_rows;               // a first layer: Contract::few_rows
  int64_t slices;              // either has so many partial sums for the filter gradient, at most
  int writer;                  // of few rows: the block that reads out and is deferred, -1: none
  // norms
  Statistics statistics;
  int64_t groups;
  // block: norm, activation and pooling in one; softmax: logarithmic
  Activation activation;
  bool pooled, logarithm, multiply;
  bool deferred;                // block: writes the gradient at in when the contraction before it asks
  bool rectified, gated;        // block: a ReLU whose values, whose gradients are those of a linear layer's stores
  int64_t saved, saved_sample;  // where its statistics are in a frame, in elements: saved + samples * saved_sample
};

struct Loss {
  LossKind kind;
  int64_t ignore_index;
  int class_weight;  // slot of the constants, -1: absent
  double parameter;  // smoothing or delta
};

struct Network {
  int64_t serial;                       // no two have the same
  int64_t parameters, constants;        // P and Q, as the caller has them
  int64_t lanes;
  int64_t abreast;                      // tasks laid out side by side: channel k of the i-th is at k * abreast + i
  const Network* pairs;                 // the same program laid out for two tasks abreast, null: it gains nothing
  int layers, values, slots;
  const Layer* layer;
  const Value* value;
  const Slot* slot;
  Loss loss;
  int64_t adapted, fixed, transposed;   // extents of the engine's vectors: parameters, constants, transposed filters
  int64_t scratch;                      // elements that a rule may need beside the frames
  int64_t frame_sample, frame_saved, frame_saved_sample;  // elements of a frame: values of a sample; statistics
  int64_t frame_unspent;                // of the gradients of a sample that do not take a value's place
  bool batch_statistics;
  bool input_active;                    // the input has a gradient and a tangent
  const bool* needs_gradient;           // of each value
  const bool* has_tangent;
  int64_t work;                         // multiply-adds of a forward pass of one sample
};

// Layers x kLayerInts integers after kHeaderInts, then kLossInts; two numbers for each layer and two for the loss.
constexpr int kHeaderInts = 7, kLayerInts = 17, kLossInts = 4;

}  // namespace maml_ext::engine
