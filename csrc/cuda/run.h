// From a checked call on tensors of a device to launches: whether it fits, and the memory that kernels share with the
// host alone. A template of nothing but the number type: the tests run it on the CPU.
#pragma once

#include <string>

#include "../engine/operators.h"
#include "launch.h"

namespace maml_ext::cuda {

inline void check_launched(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// `available`: bytes of shared memory that a block may have.
template <class T>
void run(const Call<T>& given, const Tensor& like, int64_t available, cudaStream_t stream) {
  Call<T> call = given;
  Plan plan;
  const std::string misfit = plan_of(*call.net, plan);
  STD_TORCH_CHECK(misfit.empty(), "program: ", misfit);
  const int64_t samples = std::max(call.support.samples, call.query.samples);
  const Size size = size_of(plan, call.mode, call.to_rates, call.first_order, samples, sizeof(T), available);
  STD_TORCH_CHECK(size.misfit.empty(), "program: ", size.misfit);
  const Grid grid{call.tasks, size.bytes, size.threads, stream};

  // Freed on return: the allocator hands it to later work of the same stream only.
  Tensors held;
  auto memory = [&](bool zeros, int64_t count) {
    held.push_back(zeros ? torch::stable::new_zeros(like, {count}) : torch::stable::new_empty(like, {count}));
    return held.back().template mutable_data_ptr<T>();
  };
  const int64_t rates = call.rate_rows * (call.per_parameter ? plan.parameters : 1);
  if (call.to_rates) call.to_rates = memory(true, elements("lr", {call.tasks, rates}));
  switch (call.mode) {
    case kPredict:
    case kPull:
    case kPullTangent:
      return check_launched(run_network(plan, call, grid));
    case kScore:
    case kScoreTangent:
      return check_launched(run_score(plan, call, grid));
    case kAdapt:
      return check_launched(run_adapt(plan, call, grid));
    case kAdjoint:
      check_launched(run_adjoint(plan, call, grid));
      break;
    case kMeta: {
      const int64_t all = elements("theta", {call.tasks, plan.parameters});
      T* const trajectory = memory(false, elements("steps", {call.steps, all}));
      T* const lambda = call.reduce ? memory(false, all) : call.to_theta;
      check_launched(run_meta(plan, call, trajectory, lambda, grid));
      if (call.reduce) check_launched(sum_tasks(lambda, given.to_theta, call.tasks, plan.parameters, stream));
    }
  }
  if (call.to_rates) check_launched(sum_tasks(call.to_rates, given.to_rates, call.tasks, rates, stream));
}

// Why the kernels cannot run a program, for any call, on a device whose blocks have so much shared memory; "" if they
// can.
inline std::string misfit(Ints program, Numbers numbers, int64_t element_size, int64_t shared_memory) {
  STD_TORCH_CHECK(element_size == 4 || element_size == 8, "element_size: expected 4 or 8, got ", element_size);
  return misfit_of(*network_of(program, numbers, 1, true), int(element_size), shared_memory);
}

}  // namespace maml_ext::cuda
