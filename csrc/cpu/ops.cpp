// The CPU implementations behind torch.ops.maml_ext: the one file here that knows tensors. It checks every
// argument (the operators can be called directly), makes them contiguous and splits the work over torch's threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>

#include "sgd_update.h"

namespace maml_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kGrain = 32768;  // elements a thread at least: below it, starting threads costs more

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t d = 0; d < t.dim(); d++) shape[d] = t.size(d);
  return shape;
}

void check_like(const char* name, const Tensor& t, const Tensor& grad, int64_t i) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected tensors on the CPU, which tensor ", i, " is not");
  STD_TORCH_CHECK(t.scalar_type() == grad.scalar_type(), name, ": expected one dtype, which that of tensor ", i,
                  " is not");
}

// True where lr has one rate for each of `sizes`, which lie along the last dimension of grad.
bool per_tensor(const Tensor& lr, const Tensor& grad, const std::vector<int64_t>& sizes) {
  return lr.dim() == 1 && lr.numel() == int64_t(sizes.size()) &&
         (grad.dim() == 0 || grad.size(grad.dim() - 1) != lr.numel());
}

void check(const char* first_name, const Tensors& first, const Tensors& grad, const Tensors& lr,
           const std::vector<int64_t>& sizes, bool first_may_be_empty) {
  STD_TORCH_CHECK(!grad.empty() && lr.size() == grad.size() &&
                      (first.size() == grad.size() || (first_may_be_empty && first.empty())),
                  "expected lists of one length, 1 or more, got ", first.size(), ", ", grad.size(), " and ", lr.size());
  const ScalarType dtype = grad[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "grad: expected float32 or float64, got another dtype");
  for (size_t i = 0; i < grad.size(); i++) {
    check_like("grad", grad[i], grad[0], i);
    check_like("lr", lr[i], grad[0], i);
    if (!first.empty()) {
      check_like(first_name, first[i], grad[0], i);
      STD_TORCH_CHECK(shape_of(first[i]) == shape_of(grad[i]), first_name,
                      ": expected equal shapes, which those of tensors ", i, " are not");
    }
    if (per_tensor(lr[i], grad[i], sizes)) {
      int64_t sum = 0;
      for (const int64_t size : sizes) {
        STD_TORCH_CHECK(size >= 0 && !__builtin_add_overflow(sum, size, &sum), "sizes: expected 0 or more, got ", size);
      }
      STD_TORCH_CHECK(grad[i].dim() > 0 && sum == grad[i].size(grad[i].dim() - 1),
                      "sizes: expected a sum of the last dimension of tensor ", i, ", got ", sum);
    } else {
      const auto rates = shape_of(lr[i]), shape = shape_of(grad[i]);
      STD_TORCH_CHECK(rates.size() <= shape.size() && std::equal(rates.rbegin(), rates.rend(), shape.rbegin()),
                      "lr: expected a scalar, [", sizes.size(), "] or trailing dimensions of tensor ", i);
    }
  }
}

// The segments of tensor i; results lie in `out`. Tensors are contiguous.
template <class scalar>
void add_segments(std::vector<Segment<scalar>>& segments, const Tensor* first, const Tensor& grad, const Tensor& lr,
                  Tensor& out, bool out_like_lr, const std::vector<int64_t>& sizes) {
  const auto* f = first ? static_cast<const scalar*>(first->const_data_ptr()) : nullptr;
  const auto* g = static_cast<const scalar*>(grad.const_data_ptr());
  const auto* r = static_cast<const scalar*>(lr.const_data_ptr());
  auto* o = static_cast<scalar*>(out.mutable_data_ptr());
  if (!per_tensor(lr, grad, sizes)) {
    const bool each = lr.dim() > 0;
    const int64_t size = each ? lr.numel() : grad.numel();
    segments.push_back({f, g, r, o, size ? grad.numel() / size : 0, size, size, each});
    return;
  }
  const int64_t pitch = grad.size(grad.dim() - 1), rows = pitch ? grad.numel() / pitch : 0;
  for (size_t s = 0, at = 0; s < sizes.size(); at += sizes[s++])
    segments.push_back(
        {f ? f + at : nullptr, g + at, r + s, out_like_lr ? o + s : o + at, rows, sizes[s], pitch, false});
}

Tensors contiguous(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(torch::stable::contiguous(t));
  return result;
}

Tensors empty_like(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(torch::stable::empty_like(t));
  return result;
}

template <class scalar>
Tensors update(const Tensors& theta, const Tensors& grad, const Tensors& lr, const std::vector<int64_t>& sizes) {
  Tensors out = empty_like(grad);
  std::vector<Segment<scalar>> segments;
  for (size_t i = 0; i < grad.size(); i++)
    add_segments(segments, theta.empty() ? nullptr : &theta[i], grad[i], lr[i], out[i], false, sizes);
  int64_t total = 0;
  for (const auto& s : segments) total += s.elements();
  torch::stable::parallel_for(0, total, kGrain,
                              [&](int64_t begin, int64_t end) { sgd_update(segments, begin, end); });
  return out;
}

template <class scalar>
Tensors rate_gradient(const Tensors& cotangent, const Tensors& grad, const Tensors& lr,
                      const std::vector<int64_t>& sizes) {
  Tensors out = empty_like(lr);
  std::vector<Segment<scalar>> segments;
  for (size_t i = 0; i < grad.size(); i++)
    add_segments(segments, &cotangent[i], grad[i], lr[i], out[i], true, sizes);
  auto tiles = tiles_of(segments);
  int64_t total = 0;
  for (const auto& s : segments) total += s.elements();
  const int64_t grain = std::max<int64_t>(1, kGrain * int64_t(tiles.size()) / std::max<int64_t>(1, total));
  torch::stable::parallel_for(0, int64_t(tiles.size()), grain,
                              [&](int64_t begin, int64_t end) { sgd_rate_gradient(segments, tiles, begin, end); });
  finish_rate_gradient(segments, tiles);
  return out;
}

Tensors sgd_update_cpu(Tensors theta, Tensors grad, Tensors lr, std::vector<int64_t> sizes) {
  check("theta", theta, grad, lr, sizes, true);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? update<float> : update<double>;
  return kernel(contiguous(theta), contiguous(grad), contiguous(lr), sizes);
}

Tensors sgd_rate_gradient_cpu(Tensors cotangent, Tensors grad, Tensors lr, std::vector<int64_t> sizes) {
  check("cotangent", cotangent, grad, lr, sizes, false);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? rate_gradient<float> : rate_gradient<double>;
  return kernel(contiguous(cotangent), contiguous(grad), contiguous(lr), sizes);
}

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CPU, m) {
  m.impl("sgd_update", TORCH_BOX(&maml_ext::sgd_update_cpu));
  m.impl("sgd_rate_gradient", TORCH_BOX(&maml_ext::sgd_rate_gradient_cpu));
}
