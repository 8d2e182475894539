// The CPU implementations behind torch.ops.maml_ext: the one file here that knows tensors. It checks every
// argument (the operators can be called directly), makes them contiguous and splits the work over torch's threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "sgd_update.h"

namespace maml_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kGrain = 32768;  // elements a thread at least: below it, starting threads costs more

// Whether lr has a rate for each of `sizes`, rather than for each parameter.
bool per_tensor(const Tensor& lr, const Tensor& grad, const Sizes& sizes) {
  return lr.dim() == 1 && !sizes.empty() && lr.numel() == int64_t(sizes.size()) &&
         lr.numel() != grad.size(grad.dim() - 1);
}

void check_like(const char* name, const Tensor& t, const Tensor& like, size_t i) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected tensors on the CPU, which tensor ", i, " is not");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected one dtype, which tensor ", i, " is not of");
}

// What maml_ext/ops/sgd.py checks for the devices without kernels.
void check(const char* name, const Tensors& first, const Tensors& grad, const Tensors& lr, const Sizes& sizes) {
  STD_TORCH_CHECK(!first.empty() && first.size() == grad.size() && first.size() == lr.size(),
                  "grad, lr: expected 1 or more tensors, as many as in ", name, ", got ", grad.size(), " and ",
                  lr.size());
  const ScalarType dtype = first[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name, ": expected float32 or float64");
  int64_t total = 0;
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(size >= 0 && !__builtin_add_overflow(total, size, &total), "sizes: expected 0 or more, got ", size);
  for (size_t i = 0; i < grad.size(); i++) {
    check_like(name, first[i], first[0], i);
    check_like("grad", grad[i], first[0], i);
    check_like("lr", lr[i], first[0], i);
    const auto shape = grad[i].sizes(), rates = lr[i].sizes();
    STD_TORCH_CHECK(first[i].sizes() == shape, "grad: expected shapes like ", name, ", not so at ", i);
    STD_TORCH_CHECK(sizes.empty() || (!shape.empty() && shape.back() == total),
                    "sizes: expected a sum of the last dimension of tensor ", i, ", got ", total);
    STD_TORCH_CHECK(per_tensor(lr[i], grad[i], sizes) ||
                        (rates.size() <= shape.size() && std::equal(rates.rbegin(), rates.rend(), shape.rbegin())),
                    "lr: expected a scalar, [", sizes.size(), "] or the last dimensions of tensor ", i);
  }
}

// Tensor i as segments; results lie in `out`, which is like grad or like lr. Tensors are contiguous.
template <class scalar>
void add_segments(std::vector<Segment<scalar>>& segments, const Tensor* first, const Tensor& grad, const Tensor& lr,
                  const Tensor& out, bool out_like_lr, const Sizes& sizes) {
  const auto* f = first ? first->const_data_ptr<scalar>() : nullptr;
  const auto* g = grad.const_data_ptr<scalar>();
  const auto* r = lr.const_data_ptr<scalar>();
  auto* o = out.mutable_data_ptr<scalar>();
  const int64_t elements = grad.numel();
  if (per_tensor(lr, grad, sizes)) {
    const int64_t pitch = grad.size(grad.dim() - 1), rows = pitch ? elements / pitch : 0;
    for (size_t s = 0, at = 0; s < sizes.size(); at += sizes[s++])
      segments.push_back({f ? f + at : f, g + at, r + s, out_like_lr ? o + s : o + at, rows, sizes[s], pitch, false});
  } else {
    const int64_t size = lr.dim() ? lr.numel() : elements;
    segments.push_back({f, g, r, o, size ? elements / size : 0, size, size, lr.dim() > 0});
  }
}

template <class scalar>
int64_t elements_of(const std::vector<Segment<scalar>>& segments) {
  int64_t elements = 0;
  for (const auto& s : segments) elements += s.elements();
  return elements;
}

Tensors contiguous(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return result;
}

Tensors new_empty_like(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(torch::stable::new_empty(t, t.sizes()));
  return result;
}

template <class scalar>
Tensors update(const Tensors& theta, const Tensors& grad, const Tensors& lr, const Sizes& sizes) {
  Tensors out = new_empty_like(grad);
  std::vector<Segment<scalar>> segments;
  for (size_t i = 0; i < grad.size(); i++)
    add_segments(segments, theta.empty() ? nullptr : &theta[i], grad[i], lr[i], out[i], false, sizes);
  torch::stable::parallel_for(0, elements_of(segments), kGrain,
                              [&](int64_t begin, int64_t end) { sgd_update(segments, begin, end); });
  return out;
}

template <class scalar>
Tensors rate_gradient(const Tensors& cotangent, const Tensors& grad, const Tensors& lr, const Sizes& sizes) {
  Tensors out = new_empty_like(lr);
  std::vector<Segment<scalar>> segments;
  for (size_t i = 0; i < grad.size(); i++)
    add_segments(segments, &cotangent[i], grad[i], lr[i], out[i], true, sizes);
  auto tiles = tiles_of(segments);
  const int64_t a_tile = elements_of(segments) / std::max<int64_t>(1, tiles.size());
  torch::stable::parallel_for(0, tiles.size(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a_tile)),
                              [&](int64_t begin, int64_t end) { sgd_rate_gradient(segments, tiles, begin, end); });
  finish_rate_gradient(segments, tiles);
  return out;
}

Tensors sgd_update_cpu(Tensors theta, Tensors grad, Tensors lr, Sizes sizes) {
  check("theta", theta.empty() ? grad : theta, grad, lr, sizes);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? update<float> : update<double>;
  return kernel(contiguous(theta), contiguous(grad), contiguous(lr), sizes);
}

Tensors sgd_rate_gradient_cpu(Tensors cotangent, Tensors grad, Tensors lr, Sizes sizes) {
  check("cotangent", cotangent, grad, lr, sizes);
  const auto kernel = grad[0].scalar_type() == ScalarType::Float ? rate_gradient<float> : rate_gradient<double>;
  return kernel(contiguous(cotangent), contiguous(grad), contiguous(lr), sizes);
}

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CPU, m) {
  m.impl("sgd_update", TORCH_BOX(&maml_ext::sgd_update_cpu));
  m.impl("sgd_rate_gradient", TORCH_BOX(&maml_ext::sgd_rate_gradient_cpu));
}
