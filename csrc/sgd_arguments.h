// The arguments of sgd_update and sgd_update_backward, checked and taken apart into segments: what the bindings of all
// devices share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "segment.h"

namespace maml_ext::sgd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

// Whether lr has a rate for each of `sizes`, rather than for each parameter.
inline bool per_tensor(const Tensor& lr, const Tensor& grad, const Sizes& sizes) {
  return lr.dim() == 1 && !sizes.empty() && lr.numel() == int64_t(sizes.size()) &&
         lr.numel() != grad.size(grad.dim() - 1);
}

inline void check_like(const char* name, const Tensor& t, const Tensor& like, bool on_cuda, size_t i) {
  if (on_cuda) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                    ": expected tensors on one CUDA device, which tensor ", i, " is not on");
  } else {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected tensors on the CPU, which tensor ", i, " is not");
  }
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected one dtype, which tensor ", i, " is not of");
}

// What maml_ext/ops/sgd.py checks for the devices without kernels.
inline void check(const char* name, const Tensors& first, const Tensors& grad, const Tensors& lr, const Sizes& sizes,
                  bool on_cuda) {
  STD_TORCH_CHECK(!first.empty() && first.size() == grad.size() && first.size() == lr.size(),
                  "grad, lr: expected 1 or more tensors, as many as in ", name, ", got ", grad.size(), " and ",
                  lr.size());
  const ScalarType dtype = first[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name, ": expected float32 or float64");
  int64_t total = 0;
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(size >= 0 && !__builtin_add_overflow(total, size, &total), "sizes: expected 0 or more, got ", size);
  for (size_t i = 0; i < grad.size(); i++) {
    check_like(name, first[i], first[0], on_cuda, i);
    check_like("grad", grad[i], first[0], on_cuda, i);
    check_like("lr", lr[i], first[0], on_cuda, i);
    const auto shape = grad[i].sizes(), rates = lr[i].sizes();
    STD_TORCH_CHECK(first[i].sizes().equals(shape), "grad: expected shapes like ", name, ", not so at ", i);
    STD_TORCH_CHECK(sizes.empty() || (!shape.empty() && shape.back() == total),
                    "sizes: expected a sum of the last dimension of tensor ", i, ", got ", total);
    STD_TORCH_CHECK(per_tensor(lr[i], grad[i], sizes) ||
                        (rates.size() <= shape.size() && std::equal(rates.rbegin(), rates.rend(), shape.rbegin())),
                    "lr: expected a scalar, [", sizes.size(), "] or the last dimensions of tensor ", i);
  }
}

template <class scalar>
scalar* data_of(const Tensors& tensors, size_t i) {
  return tensors.empty() ? nullptr : tensors[i].mutable_data_ptr<scalar>();
}

template <class scalar>
scalar* advanced(scalar* p, int64_t by) {
  return p ? p + by : p;
}

// Tensor i as segments. Tensors are contiguous.
template <class scalar>
void add_segments(std::vector<Segment<scalar>>& segments, const Tensors& first, const Tensor& grad, const Tensor& lr,
                  const Tensors& out, const Tensors& rate_out, size_t i, const Sizes& sizes) {
  const scalar* f = first.empty() ? nullptr : first[i].const_data_ptr<scalar>();
  const auto* g = grad.const_data_ptr<scalar>();
  const auto* r = lr.const_data_ptr<scalar>();
  scalar *const o = data_of<scalar>(out, i), *const q = data_of<scalar>(rate_out, i);
  const int64_t elements = grad.numel();
  if (per_tensor(lr, grad, sizes)) {
    const int64_t pitch = grad.size(grad.dim() - 1), rows = pitch ? elements / pitch : 0;
    for (size_t s = 0, at = 0; s < sizes.size(); at += sizes[s++])
      segments.push_back(
          {advanced(f, at), g + at, r + s, advanced(o, at), advanced(q, s), rows, sizes[s], pitch, false});
  } else {
    const int64_t size = lr.dim() ? lr.numel() : elements;
    segments.push_back({f, g, r, o, q, size ? elements / size : 0, size, size, lr.dim() > 0});
  }
}

// All tensors as segments. What is null in them (segment.h) is an empty list here.
template <class scalar>
std::vector<Segment<scalar>> segments_of(const Tensors& first, const Tensors& grad, const Tensors& lr,
                                         const Tensors& out, const Tensors& rate_out, const Sizes& sizes) {
  std::vector<Segment<scalar>> segments;
  for (size_t i = 0; i < grad.size(); i++)
    add_segments(segments, first, grad[i], lr[i], out, rate_out, i, sizes);
  return segments;
}

template <class scalar>
int64_t elements_of(const std::vector<Segment<scalar>>& segments) {
  int64_t elements = 0;
  for (const auto& s : segments) elements += s.elements();
  return elements;
}

inline Tensors contiguous(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return result;
}

inline Tensors new_empty_like(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(torch::stable::new_empty(t, t.sizes()));
  return result;
}

}  // namespace maml_ext::sgd
