// The CUDA kernels and the host code that launches them, run on the CPU: the operators of maml_ext once more, in a
// library of their own, on CPU tensors. Beside them, how to run: a Python module.
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/run.h"

namespace {

using namespace maml_ext;
int64_t available = 232448;  // of an H100

struct Emulated {
  static constexpr const char* name = "the CPU";
  static constexpr bool kReadable = false;
  static bool holds(const Tensor& t) { return t.is_cpu(); }
  static int64_t lanes(int64_t) { return 1; }
  template <class T>
  static void run(const e::Call<T>& call, const Tensor& like) {
    cuda::run(call, like, available, nullptr);
  }
};

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
  m.def("shared_memory", [](int64_t bytes) { available = bytes; });
}
