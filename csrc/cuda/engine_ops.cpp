// The CUDA engine behind torch.ops.maml_ext. The one registered entry for CUDA tensors: where a network does not fit the
// kernels it says why.
#include <torch/csrc/stable/accelerator.h>

#include "run.h"
#include "stream.h"

namespace maml_ext {
namespace {

struct Cuda {
  static constexpr const char* name = "a CUDA device";
  static constexpr bool kReadable = false;
  static bool holds(const Tensor& t) { return t.is_cuda(); }
  static int64_t lanes(int64_t) { return 1; }

  template <class T>
  static void run(const e::Call<T>& call, const Tensor& like) {
    const auto device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    cuda::run(call, like, cuda::shared_memory(device), cuda::current_stream(device));
  }
};

// Why the kernels cannot run a program, for any call, on a device whose blocks have so much shared memory; "" if they can.
std::string cuda_misfit(Ints program, Numbers numbers, int64_t element_size, int64_t shared_memory) {
  STD_TORCH_CHECK(element_size == 4 || element_size == 8, "element_size: expected 4 or 8, got ", element_size);
  return cuda::misfit_of(*e::network_of(program, numbers, 1, true), int(element_size), shared_memory);
}

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CUDA, m) { maml_ext::Operators<maml_ext::Cuda>::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_misfit", TORCH_BOX(&maml_ext::cuda_misfit));
}
