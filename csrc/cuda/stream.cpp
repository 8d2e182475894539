#include "stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace maml_ext::cuda {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// It lives in libtorch_cuda, which a CPU build of torch lacks: so it can't be linked. Where there are CUDA tensors,
// that library is loaded already.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would come up again, in somebody else's check
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int64_t device) {
  int count = 0;
  static const cudaError_t usable = cudaGetDeviceCount(&count);  // torch may be there with an older CUDA and driver
  check(usable, "CUDA kernels");
  static const CurrentStream current = find_current_stream();
  STD_TORCH_CHECK(current, "CUDA kernels need PyTorch's libtorch_cuda, which is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(int32_t(device), &stream) == 0, "no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

int64_t devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int64_t shared_memory(int64_t device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, int(device)), "cuda_shared_memory");
  return bytes;
}

}  // namespace maml_ext::cuda
