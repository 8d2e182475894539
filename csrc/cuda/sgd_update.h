// The SGD update and its derivative by gradient and learning rates on a CUDA device: launchers on raw pointers.
// They only enqueue work on `stream`, of the current device, and return the launch's error.
#pragma once

#include <cstdint>

#include "../segment.h"
#include "platform.h"

namespace maml_ext::cuda {

// out = first - lr * grad for all segments; a launch for every 40 of them.
// Moves 3 scalars an element (2 where first is null), each once.
template <class scalar>
cudaError_t sgd_update(const Segment<scalar>* segments, int64_t count, cudaStream_t stream);

// The doubles of device memory that sgd_update_backward keeps sums of pieces in.
template <class scalar>
int64_t backward_workspace(const Segment<scalar>* segments, int64_t count);

// out = - lr * first, if it is wanted, and rate_out = - sum of first * grad: over rows, and over columns where one rate
// is for all. Sums are in double, and their order depends on shapes alone: the same bits on every run and device.
// Moves 3 scalars an element (2 where out is null), each once.
template <class scalar>
cudaError_t sgd_update_backward(const Segment<scalar>* segments, int64_t count, double* workspace,
                                cudaStream_t stream);

}  // namespace maml_ext::cuda
