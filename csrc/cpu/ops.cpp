// The CPU implementations behind torch.ops.maml_ext: checks and segments as on every device
// (sgd_arguments.h), then the work split over torch's threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../sgd_arguments.h"
#include "sgd_update.h"

namespace maml_ext {
namespace {

using namespace sgd;

constexpr int64_t kGrain = 32768;  // elements a thread at least: below it, starting threads costs more

template <class scalar>
Tensors update(const Tensors& theta, const Tensors& grad, const Tensors& lr, const Sizes& sizes) {
  Tensors out = new_empty_like(grad);
  const auto segments = segments_of<scalar>(theta, grad, lr, out, {}, sizes);
  torch::stable::parallel_for(0, elements_of(segments), kGrain,
                              [&](int64_t begin, int64_t end) { sgd_update(segments, begin, end); });
  return out;
}

template <class scalar>
Tensors backward(const Tensors& cotangent, const Tensors& grad, const Tensors& lr, const Sizes& sizes, bool to_grad) {
  Tensors out = to_grad ? new_empty_like(grad) : Tensors{};
  const Tensors rate_out = new_empty_like(lr);
  const auto segments = segments_of<scalar>(cotangent, grad, lr, out, rate_out, sizes);
  auto tiles = tiles_of(segments);
  const int64_t a_tile = elements_of(segments) / std::max<int64_t>(1, tiles.size());
  torch::stable::parallel_for(0, tiles.size(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a_tile)),
                              [&](int64_t begin, int64_t end) { sgd_update_backward(segments, tiles, begin, end); });
  finish_rate_gradient(segments, tiles);
  out.insert(out.end(), rate_out.begin(), rate_out.end());
  return out;
}

Tensors sgd_update_cpu(Tensors theta, Tensors grad, Tensors lr, Sizes sizes) {
  check("theta", theta.empty() ? grad : theta, grad, lr, sizes, false);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? update<float> : update<double>;
  return kernel(contiguous(theta), contiguous(grad), contiguous(lr), sizes);
}

Tensors sgd_update_backward_cpu(Tensors cotangent, Tensors grad, Tensors lr, Sizes sizes, bool to_grad) {
  check("cotangent", cotangent, grad, lr, sizes, false);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? backward<float> : backward<double>;
  return kernel(contiguous(cotangent), contiguous(grad), contiguous(lr), sizes, to_grad);
}

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CPU, m) {
  m.impl("sgd_update", TORCH_BOX(&maml_ext::sgd_update_cpu));
  m.impl("sgd_update_backward", TORCH_BOX(&maml_ext::sgd_update_backward_cpu));
}
