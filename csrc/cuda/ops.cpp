// The CUDA implementations behind torch.ops.maml_ext: checks and segments as on every device (sgd_arguments.h), then
// launches on PyTorch's current stream. Compiled in CUDA builds only.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "../sgd_arguments.h"
#include "sgd_update.h"
#include "stream.h"

#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)

namespace maml_ext {
namespace {

using namespace sgd;
using torch::stable::accelerator::DeviceGuard;

template <class scalar>
Tensors update(const Tensors& theta, const Tensors& grad, const Tensors& lr, const Sizes& sizes) {
  const auto device = grad[0].get_device_index();
  const DeviceGuard guard(device);
  const auto stream = cuda::current_stream(device);
  Tensors out = new_empty_like(grad);
  const auto segments = segments_of<scalar>(theta, grad, lr, out, {}, sizes);
  cuda::check(cuda::sgd_update(segments.data(), segments.size(), stream), "sgd_update");
  return out;
}

template <class scalar>
Tensors backward(const Tensors& cotangent, const Tensors& grad, const Tensors& lr, const Sizes& sizes, bool to_grad) {
  const auto device = grad[0].get_device_index();
  const DeviceGuard guard(device);
  const auto stream = cuda::current_stream(device);
  Tensors out = to_grad ? new_empty_like(grad) : Tensors{};
  const Tensors rate_out = new_empty_like(lr);
  const auto segments = segments_of<scalar>(cotangent, grad, lr, out, rate_out, sizes);
  const int64_t sums = cuda::backward_workspace(segments.data(), segments.size());
  // Freed on return: the allocator hands it to later work of this stream only.
  const Tensor workspace = torch::stable::new_empty(grad[0], {sums}, ScalarType::Double);
  double* sums_at = workspace.mutable_data_ptr<double>();
  cuda::check(cuda::sgd_update_backward(segments.data(), segments.size(), sums_at, stream), "sgd_update_backward");
  out.insert(out.end(), rate_out.begin(), rate_out.end());
  return out;
}

Tensors sgd_update_cuda(Tensors theta, Tensors grad, Tensors lr, Sizes sizes) {
  check("theta", theta.empty() ? grad : theta, grad, lr, sizes, true);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? update<float> : update<double>;
  return kernel(contiguous(theta), contiguous(grad), contiguous(lr), sizes);
}

Tensors sgd_update_backward_cuda(Tensors cotangent, Tensors grad, Tensors lr, Sizes sizes, bool to_grad) {
  check("cotangent", cotangent, grad, lr, sizes, true);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? backward<float> : backward<double>;
  return kernel(contiguous(cotangent), contiguous(grad), contiguous(lr), sizes, to_grad);
}

// As TORCH_CUDA_ARCH_LIST: "8.0,9.0+PTX".
std::string cuda_architectures() { return TEXT(MAML_EXT_CUDA_ARCHITECTURES); }

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CUDA, m) {
  m.impl("sgd_update", TORCH_BOX(&maml_ext::sgd_update_cuda));
  m.impl("sgd_update_backward", TORCH_BOX(&maml_ext::sgd_update_backward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_devices", TORCH_BOX(&maml_ext::cuda::devices));
  m.impl("cuda_shared_memory", TORCH_BOX(&maml_ext::cuda::shared_memory));
  m.impl("cuda_architectures", TORCH_BOX(&maml_ext::cuda_architectures));
}
