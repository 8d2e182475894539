// The CUDA kernels and the host code that launches them, run on the CPU: the operators of maml_ext once more, in a
// library of their own, on CPU tensors. Beside them, how to run: a Python module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/run.h"

namespace {

using namespace maml_ext;
int64_t available = 232448;  // of an H100

struct Emulated {
  static constexpr const char* name = "the CPU";
  static constexpr bool kReadable = false;
  static constexpr bool kComputes = true;
  static bool holds(const Tensor& t) { return t.is_cpu(); }
  static int64_t lanes(int64_t) { return 1; }
  static bool pairs(int64_t) { return false; }
  template <class T>
  static void run(const e::Call<T>& call, const Tensor& like) {
    cuda::run(call, like, available, nullptr);
  }
};

// What a block of `meta` is and keeps where, for gradients of theta alone: what benchmarks/gpu_counts.py counts with.
pybind11::object plan_of_meta(const std::vector<int64_t>& program, const std::vector<double>& numbers, int64_t samples,
                              int number_bytes, int64_t shared) {
  using pybind11::arg;
  const auto net = e::network_of(program, numbers, 1, false);
  cuda::Plan plan;
  std::string misfit = cuda::plan_of(*net, plan);
  cuda::Size size{};
  if (misfit.empty()) {
    size = cuda::size_of(plan, e::kMeta, false, false, samples, number_bytes, shared);
    misfit = size.misfit;
  }
  if (!misfit.empty()) return pybind11::str(misfit);
  pybind11::list stages, stretches;
  for (int i = 0; i < plan.stages; i++) {
    const cuda::Stage& s = plan.stage[i];
    stages.append(pybind11::dict(arg("linear") = s.kind == cuda::kLinear, arg("inputs") = s.inputs,
                                 arg("outputs") = s.outputs, arg("input_pitch") = cuda::Stage::pitch(s.inputs),
                                 arg("output_pitch") = cuda::Stage::pitch(s.outputs), arg("bias") = s.bias >= 0,
                                 arg("activated") = s.activation != e::kIdentity, arg("learns") = s.learns_weight,
                                 arg("learns_bias") = s.learns_bias, arg("moves") = s.moves));
  }
  for (int i = 0; i < plan.stretches; i++)
    stretches.append(plan.stretch[i].count);
  return pybind11::dict(arg("shared_bytes") = size.bytes, arg("threads") = size.threads, arg("chunk") = plan.chunk,
                        arg("parameters") = plan.parameters, arg("vector") = plan.adapted,
                        arg("features") = plan.features, arg("outputs") = plan.outputs,
                        arg("labels") = plan.loss == e::kLabels, arg("stages") = stages,
                        arg("stretches") = stretches, arg("steps_of_a_launch") = cuda::kStepsOfALaunch,
                        arg("threads_of_a_sum") = cuda::kThreads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maml_ext_emulated, CPU, m) { Operators<Emulated>::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maml_ext_emulated, CompositeExplicitAutograd, m) {
  m.impl("cuda_misfit", TORCH_BOX(&cuda::misfit));
}

PYBIND11_MODULE(emulated, m) {
  m.def("order", [](const std::string& order, uint64_t seed) {
    emulation::order(order == "forward"   ? emulation::Order::kForward
                     : order == "reverse" ? emulation::Order::kReverse
                                          : emulation::Order::kShuffled,
                     seed);
  });
  m.def("launches", [] { return emulation::counters().launches; });
  m.def("barriers", [] {  // of the block that met most of them; starts anew
    return std::exchange(emulation::counters().barriers, 0);
  });
  m.def("plan_of_meta", plan_of_meta);
  m.def("shared_memory", [](int64_t bytes) { available = bytes; });
}
