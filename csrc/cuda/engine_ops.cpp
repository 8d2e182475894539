// The CUDA engine, under private names: maml_ext/ops/cuda.py has the one entry for CUDA tensors, which chooses.
// Where a network does not fit the kernels these say why.
#include <torch/csrc/stable/accelerator.h>

#include "run.h"
#include "stream.h"

namespace maml_ext {
namespace {

struct Cuda {
  static constexpr const char* name = "a CUDA device";
  static constexpr bool kReadable = false;
  static constexpr bool kComputes = true;
  static bool holds(const Tensor& t) { return t.is_cuda(); }
  static int64_t lanes(int64_t) { return 1; }
  static bool pairs(int64_t) { return false; }

  template <class T>
  static void run(const e::Call<T>& call, const Tensor& like) {
    const auto device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    cuda::run(call, like, cuda::shared_memory(device), cuda::current_stream(device));
  }
};

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CUDA, m) { maml_ext::Operators<maml_ext::Cuda>::implement(m, "cuda_"); }

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_misfit", TORCH_BOX(&maml_ext::cuda::misfit));
}
