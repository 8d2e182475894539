// What the bindings of CUDA kernels need of a device: its stream, errors as exceptions, its limits.
#pragma once

#include <cstdint>

#include "platform.h"

namespace maml_ext::cuda {

// Raises a RuntimeError with the error's name and meaning where it is one; `what` was being done.
void check(cudaError_t error, const char* what);

// PyTorch's current stream on a device.
cudaStream_t current_stream(int64_t device);

// Devices that this build can use: none on any error, as without a driver.
int64_t devices();

// Bytes of shared memory that a block may opt in to.
int64_t shared_memory(int64_t device);

}  // namespace maml_ext::cuda
