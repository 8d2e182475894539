// The SGD update and the gradient of its learning rates on a CUDA device: launchers on raw pointers.
// They only enqueue work on `stream`, of the current device, and return the launch's error.
#pragma once

#include <cstdint>

#include "../segment.h"
#include "platform.h"

namespace maml_ext::cuda {

// out = first - lr * grad for all segments; a launch for every 48 of them.
// Moves 3 scalars an element (2 where first is null), each once.
template <class scalar>
cudaError_t sgd_update(const Segment<scalar>* segments, int64_t count, cudaStream_t stream);

// The doubles of device memory that sgd_rate_gradient keeps sums of pieces in.
template <class scalar>
int64_t rate_gradient_workspace(const Segment<scalar>* segments, int64_t count);

// out = - sum of first * grad: over rows, and over columns where one rate is for all. Sums are in double, and their
// order depends on shapes alone: the same bits on every run and device. Moves 2 scalars an element, each once.
template <class scalar>
cudaError_t sgd_rate_gradient(const Segment<scalar>* segments, int64_t count, double* workspace, cudaStream_t stream);

}  // namespace maml_ext::cuda
