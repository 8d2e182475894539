// The CPU engine behind torch.ops.maml_ext.
#include "../engine/operators.h"

#include "engine/engine.h"

namespace maml_ext {
namespace {

void split(int64_t count, int64_t grain, void* context, void (*run)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(context, begin, end); });
}

struct Cpu {
  static constexpr const char* name = "the CPU";
  static constexpr bool kReadable = true;
  static constexpr bool kComputes = true;
  static bool holds(const Tensor& t) { return t.is_cpu(); }
  static int64_t lanes(int64_t bytes) { return e::engine_for_this_machine().vector_bytes / bytes; }
  static bool pairs(int64_t bytes) { return bytes == 4; }

  template <class T>
  static void run(const e::Call<T>& call, const Tensor&) {
    const e::Machine machine = e::this_machine(int(torch::stable::get_num_threads()), &split);
    const e::Engine& engine = e::engine_for_this_machine();
    if constexpr (sizeof(T) == 4)
      engine.run_float(call, machine);
    else
      engine.run_double(call, machine);
    if (machine.record) e::settle_profile(*call.net, call.tasks, call.support.samples, call.query.samples);
  }
};

int64_t vector_bytes() { return e::engine_for_this_machine().vector_bytes; }

void record(bool on) { e::record_profile(on); }

// What was recorded: [entries, (kind of layer or work beside layers, rule, seconds, multiply-adds)].
Tensor recorded(Tensor like) {
  STD_TORCH_CHECK(like.is_cpu() && like.scalar_type() == ScalarType::Double,
                  "like: expected float64 on the CPU");
  const e::Profile* entries;
  const int64_t count = e::profile_entries(&entries);
  const Tensor result = torch::stable::new_empty(like, {count, 4});
  double* to = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < count; i++) {
    to[4 * i] = entries[i].kind;
    to[4 * i + 1] = entries[i].rule;
    to[4 * i + 2] = entries[i].seconds;
    to[4 * i + 3] = entries[i].multiply_adds;
  }
  return result;
}

}  // namespace
}  // namespace maml_ext

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CPU, m) {
  maml_ext::Operators<maml_ext::Cpu>::implement(m);
  m.impl("recorded", TORCH_BOX(&maml_ext::recorded));
}

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&maml_ext::vector_bytes));
  m.impl("record", TORCH_BOX(&maml_ext::record));
}
