// What the kernels of the SGD update work on, on every device.
#pragma once

#include <cstdint>

namespace maml_ext {

// `rows` runs of `size` consecutive elements, `pitch` apart, with either one rate for all of them or `size` rates
// that every row shares. A flat [T, P] with a rate per tensor is n segments of T rows; a list is a segment a tensor.
template <class scalar>
struct Segment {
  const scalar* first;  // theta (sgd_update; null: zeros) or the cotangent (sgd_update_backward)
  const scalar* grad;
  const scalar* lr;
  scalar* out;       // laid out like grad: the updated theta, or grad's gradient (null where it is not wanted)
  scalar* rate_out;  // like lr: its gradient (sgd_update: null)
  int64_t rows, size, pitch;
  bool per_parameter;

  int64_t elements() const { return rows * size; }
};

}  // namespace maml_ext
