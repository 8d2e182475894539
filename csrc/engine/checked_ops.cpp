// The operators without an engine: all that is checked of programs and tensors, and the results, zeros to be written to.
// What runs programs by kernels that are written in Python (kernels/) begins with these.
#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace maml_ext {
namespace {

struct Anywhere {
  static constexpr const char* name = "a device";
  static constexpr bool kReadable = false;
  static constexpr bool kComputes = false;
  static bool holds(const Tensor& t) { return t.is_cuda() || t.is_cpu(); }
  static int64_t lanes(int64_t) { return 1; }
  static bool pairs(int64_t) { return false; }

  template <class T>
  static void run(const e::Call<T>&, const Tensor&) {}
};

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CompositeExplicitAutograd, m) {
  maml_ext::Operators<maml_ext::Anywhere>::implement(m, "checked_");
}
