// The engine behind torch.ops.maml_ext: the file that knows its tensors. It checks every argument, since anybody can
// call the operators, and hands over raw pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "engine/engine.h"
#include "engine/program.h"

namespace maml_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Numbers = std::vector<double>;
using Maybe = std::optional<Tensor>;
namespace e = maml_ext::engine;

void split(int64_t count, int64_t grain, void* context, void (*run)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(context, begin, end); });
}

// A call being put together: what is checked stays alive in `kept` until it is done.
template <class T>
struct Request {
  e::Call<T> call{};
  std::shared_ptr<const e::Network> net;
  Tensors kept;
  Tensor like;
  std::vector<const T*> inputs;
  std::vector<T*> outputs;

  Request(e::Mode mode, const Ints& program, const Numbers& numbers, const Maybe& constants, const Tensor& theta,
          bool input_active)
      : like(theta) {
    const int64_t lanes = e::engine_for_this_machine().vector_bytes / int64_t(sizeof(T));
    net = e::network_of(program, numbers, lanes, input_active);
    call.net = net.get();
    call.mode = mode;
    STD_TORCH_CHECK(constants.has_value() == (net->constants > 0), "constants: expected ", net->constants,
                    " values, got ", constants.has_value() ? "a tensor" : "none");
    if (constants) call.constants = pointer("constants", *constants, net->constants);
  }

  // The data of a tensor of this many elements, contiguous.
  const T* pointer(const char* name, const Tensor& t, int64_t elements) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected theta's dtype");
    STD_TORCH_CHECK(t.numel() == elements, name, ": expected ", elements, " elements, got ", t.numel());
    kept.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return kept.back().template const_data_ptr<T>();
  }

  void samples(const char* name, const Tensor& x, e::Data<T>& data) {
    const e::Value& v = net->value[0];
    STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) > 0, name, ": expected [tasks, samples, ...] with a sample at least");
    if (call.query.x == nullptr && call.support.x == nullptr) call.tasks = x.size(0);
    STD_TORCH_CHECK(x.size(0) == call.tasks, name, ": expected ", call.tasks, " tasks, got ", x.size(0));
    data.samples = x.size(1);
    data.x = pointer(name, x, call.tasks * data.samples * v.c * v.h * v.w);
    STD_TORCH_CHECK(data.samples < (int64_t(1) << 40) / std::max<int64_t>(1, net->frame_sample), name,
                    ": too many samples");
  }

  const e::Value& last() const { return net->value[net->layers ? net->layer[net->layers - 1].out : 0]; }
  int64_t prediction_elements(const e::Data<T>& data) const {
    return call.tasks * data.samples * last().c * last().h * last().w;
  }

  void targets(const char* name, const Tensor& y, const Maybe& weight, e::Data<T>& data) {
    STD_TORCH_CHECK(net->loss.kind != e::kNoLoss, "program: expected one with a loss");
    if (net->loss.kind == e::kLabels) {
      STD_TORCH_CHECK(y.is_cpu() && y.scalar_type() == ScalarType::Long, name, ": expected int64 labels on the CPU");
      const int64_t count = call.tasks * data.samples * last().h * last().w;
      STD_TORCH_CHECK(y.numel() == count, name, ": expected ", count, " labels, got ", y.numel());
      kept.push_back(torch::stable::contiguous(y));
      data.labels = kept.back().template const_data_ptr<int64_t>();
      for (int64_t i = 0; i < count; i++)
        STD_TORCH_CHECK((data.labels[i] >= 0 && data.labels[i] < last().c) || data.labels[i] == net->loss.ignore_index,
                        name, ": expected labels in 0..", last().c - 1, ", got ", data.labels[i]);
    } else {
      data.y = pointer(name, y, prediction_elements(data));
    }
    if (weight) data.weight = pointer("weight", *weight, call.tasks * data.samples);
  }

  // theta or a direction of it: [P] or [T, P].
  const T* parameters(const char* name, const Tensor& t, bool& shared) {
    shared = t.dim() == 1;
    STD_TORCH_CHECK(t.dim() == 1 || (t.dim() == 2 && t.size(0) == call.tasks), name, ": expected [P] or [",
                    call.tasks, ", P]");
    return pointer(name, t, (shared ? 1 : call.tasks) * net->parameters);
  }

  void rates(const Tensor& lr, int64_t steps) {
    STD_TORCH_CHECK(steps >= 0, "steps: expected 0 or more, got ", steps);
    STD_TORCH_CHECK(steps < (int64_t(1) << 40) / std::max<int64_t>(1, net->adapted), "steps: too many");
    STD_TORCH_CHECK(lr.dim() == 2 && (lr.size(1) == 1 || lr.size(1) == net->parameters) &&
                        (lr.size(0) == 1 || lr.size(0) >= steps) && lr.size(0) > 0,
                    "lr: expected [1 or steps, 1 or ", net->parameters, "]");
    call.steps = steps;
    call.rate_rows = lr.size(0);
    call.per_parameter = lr.size(1) != 1;
    call.rates = pointer("lr", lr, lr.numel());
  }

  // A result; where it is not wanted, no elements.
  Tensor result(bool wanted, const Tensor& shape_of, T*& to, bool zeros = true) {
    const auto sizes = shape_of.sizes();
    return result(wanted, Ints(sizes.begin(), sizes.end()), to, zeros);
  }
  Tensor result(bool wanted, const Ints& sizes, T*& to, bool zeros = true) {
    if (!wanted) return torch::stable::new_empty(like, {0});
    const Tensor t = zeros ? torch::stable::new_zeros(like, sizes) : torch::stable::new_empty(like, sizes);
    to = t.template mutable_data_ptr<T>();
    return t;
  }

  void run() {
    if (call.tasks == 0) return;
    const e::Machine machine = e::this_machine(int(torch::stable::get_num_threads()), &split);
    const e::Engine& engine = e::engine_for_this_machine();
    if constexpr (sizeof(T) == 4)
      engine.run_float(call, machine);
    else
      engine.run_double(call, machine);
    if (machine.record) e::settle_profile(*net, call.tasks, call.support.samples, call.query.samples);
  }
};

// f(zero of theta's type).
template <class F>
Tensors dispatch(const Tensor& theta, F f) {
  STD_TORCH_CHECK(theta.is_cpu(), "theta: expected a tensor on the CPU");
  if (theta.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(theta.scalar_type() == ScalarType::Double, "theta: expected float32 or float64");
  return f(double());
}

void check_wanted(const Ints& wanted, size_t count) {
  STD_TORCH_CHECK(wanted.size() == count, "wanted: expected ", count, " flags, got ", wanted.size());
}

Tensors predict(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Ints prediction) {
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kPredict, program, numbers, constants, theta, false);
    r.samples("x", x, r.call.query);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    Ints sizes{x.size(0), x.size(1)};
    int64_t elements = 1;
    for (const int64_t size : prediction) {
      STD_TORCH_CHECK(size > 0 && !__builtin_mul_overflow(elements, size, &elements), "prediction: a wrong shape");
      sizes.push_back(size);
    }
    const auto& v = r.last();
    STD_TORCH_CHECK(elements == v.c * v.h * v.w, "prediction: expected a shape of ", v.c * v.h * v.w, " elements, got ",
                    elements);
    Tensors results{r.result(true, sizes, r.call.prediction)};
    r.run();
    return results;
  });
}

Tensors pull(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor cotangent, Ints wanted) {
  check_wanted(wanted, 2);
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kPull, program, numbers, constants, theta, wanted[1]);
    r.samples("x", x, r.call.query);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    r.call.cotangent = r.pointer("cotangent", cotangent, r.prediction_elements(r.call.query));
    Tensors results{r.result(wanted[0], Ints{r.call.tasks, r.net->parameters}, r.call.to_theta),
                    r.result(wanted[1], x, r.call.query.to_x)};
    r.run();
    return results;
  });
}

Tensors pull_tangent(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor cotangent,
                     Maybe theta_t, Maybe x_t) {
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kPullTangent, program, numbers, constants, theta, true);
    r.samples("x", x, r.call.query);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    r.call.cotangent = r.pointer("cotangent", cotangent, r.prediction_elements(r.call.query));
    if (theta_t) r.call.theta_t = r.parameters("theta_t", *theta_t, r.call.shared_t);
    if (x_t) r.call.query.x_t = r.pointer("x_t", *x_t, x.numel());
    Tensors results{r.result(true, cotangent, r.call.prediction),
                    r.result(true, Ints{r.call.tasks, r.net->parameters}, r.call.to_theta),
                    r.result(true, x, r.call.query.to_x)};
    r.run();
    return results;
  });
}

Tensors score(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor y, Maybe weight,
              Ints wanted) {
  check_wanted(wanted, 4);
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kScore, program, numbers, constants, theta, wanted[1]);
    auto& data = r.call.query;
    r.samples("x", x, data);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    r.targets("y", y, weight, data);
    Tensors results{r.result(true, Ints{r.call.tasks}, r.call.loss),
                    r.result(wanted[0], Ints{r.call.tasks, r.net->parameters}, r.call.to_theta),
                    r.result(wanted[1], x, data.to_x), r.result(wanted[2] && data.y, y, data.to_y),
                    r.result(wanted[3] && weight, Ints{r.call.tasks, data.samples}, data.to_weight)};
    r.run();
    return results;
  });
}

Tensors score_tangent(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor y, Maybe weight,
                      Maybe theta_t, Maybe x_t, Maybe y_t, Maybe weight_t, Ints wanted) {
  check_wanted(wanted, 3);
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kScoreTangent, program, numbers, constants, theta, x_t || wanted[0]);
    auto& data = r.call.query;
    r.samples("x", x, data);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    r.targets("y", y, weight, data);
    if (theta_t) r.call.theta_t = r.parameters("theta_t", *theta_t, r.call.shared_t);
    if (x_t) data.x_t = r.pointer("x_t", *x_t, x.numel());
    if (y_t) data.y_t = r.pointer("y_t", *y_t, r.prediction_elements(data));
    if (weight_t) data.weight_t = r.pointer("weight_t", *weight_t, r.call.tasks * data.samples);
    STD_TORCH_CHECK(!weight_t || weight, "weight_t: a direction of weights needs weights");
    STD_TORCH_CHECK(!y_t || data.y, "y_t: labels have no direction");
    Tensors results{r.result(true, Ints{r.call.tasks, r.net->parameters}, r.call.to_theta),
                    r.result(wanted[0], x, data.to_x), r.result(wanted[1] && data.y, y, data.to_y),
                    r.result(wanted[2] && weight, Ints{r.call.tasks, data.samples}, data.to_weight)};
    r.run();
    return results;
  });
}

Tensors adapt(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor lr, Tensor x, Tensor y,
              Maybe weight, int64_t steps) {
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kAdapt, program, numbers, constants, theta, false);
    r.samples("x", x, r.call.support);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    r.targets("y", y, weight, r.call.support);
    r.rates(lr, steps);
    Tensors results;
    for (int64_t k = 0; k < steps; k++) {
      r.outputs.push_back(nullptr);
      results.push_back(r.result(true, Ints{r.call.tasks, r.net->parameters}, r.outputs.back(), false));
    }
    r.call.to_trajectory = r.outputs.data();
    r.run();
    return results;
  });
}

Tensors adjoint(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor lr, Tensor x, Tensor y,
                Maybe weight, Tensors trajectory, Tensors cotangents, Ints at, bool first_order, Ints wanted) {
  check_wanted(wanted, 4);
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kAdjoint, program, numbers, constants, theta, wanted[1]);
    auto& data = r.call.support;
    r.samples("x", x, data);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    r.targets("y", y, weight, data);
    r.call.first_order = first_order;
    const int64_t steps = int64_t(trajectory.size()) + 1;
    r.rates(lr, steps);
    STD_TORCH_CHECK(cotangents.size() == at.size(), "at: expected ", cotangents.size(), " steps, got ", at.size());
    const int64_t parameters = r.call.tasks * r.net->parameters;
    for (const Tensor& t : trajectory) r.inputs.push_back(r.pointer("trajectory", t, parameters));
    r.inputs.resize(2 * steps - 1, nullptr);
    for (size_t i = 0; i < at.size(); i++) {
      STD_TORCH_CHECK(at[i] >= 0 && at[i] < steps, "at: expected 0 to ", steps - 1, ", got ", at[i]);
      r.inputs[steps - 1 + at[i]] = r.pointer("cotangents", cotangents[i], parameters);
    }
    r.call.trajectory = r.inputs.data();
    r.call.cotangents = r.inputs.data() + steps - 1;
    Tensors results{r.result(true, Ints{r.call.tasks, r.net->parameters}, r.call.to_theta),
                    r.result(wanted[0], lr, r.call.to_rates), r.result(wanted[1], x, data.to_x),
                    r.result(wanted[2] && data.y, y, data.to_y),
                    r.result(wanted[3] && weight, Ints{r.call.tasks, data.samples}, data.to_weight)};
    r.run();
    return results;
  });
}

Tensors meta(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor lr, Tensor support_x,
             Tensor support_y, Maybe support_weight, Tensor query_x, Tensor query_y, Maybe query_weight, int64_t steps,
             bool first_order, bool reduce, Ints wanted) {
  check_wanted(wanted, 7);
  return dispatch(theta, [&](auto zero) {
    using T = decltype(zero);
    Request<T> r(e::kMeta, program, numbers, constants, theta, wanted[1] || wanted[4]);
    auto &support = r.call.support, &query = r.call.query;
    r.samples("support_x", support_x, support);
    r.samples("query_x", query_x, query);
    r.call.theta = r.parameters("theta", theta, r.call.shared);
    STD_TORCH_CHECK(!reduce || r.call.shared, "reduce: expected theta [P], which all tasks share");
    r.targets("support_y", support_y, support_weight, support);
    r.targets("query_y", query_y, query_weight, query);
    r.rates(lr, steps);
    r.call.first_order = first_order;
    r.call.reduce = reduce;
    const Ints of_theta = reduce ? Ints{r.net->parameters} : Ints{r.call.tasks, r.net->parameters};
    auto weight = [&](bool wish, const Maybe& w, e::Data<T>& data) {
      return r.result(wish && w, Ints{r.call.tasks, data.samples}, data.to_weight);
    };
    Tensors results{r.result(true, Ints{r.call.tasks}, r.call.loss), r.result(true, of_theta, r.call.to_theta),
                    r.result(wanted[0], lr, r.call.to_rates), r.result(wanted[1], support_x, support.to_x),
                    r.result(wanted[2] && support.y, support_y, support.to_y), weight(wanted[3], support_weight, support),
                    r.result(wanted[4], query_x, query.to_x), r.result(wanted[5] && query.y, query_y, query.to_y),
                    weight(wanted[6], query_weight, query)};
    r.run();
    return results;
  });
}

int64_t vector_bytes() { return e::engine_for_this_machine().vector_bytes; }

void record(bool on) { e::record_profile(on); }

// What was recorded: [entries, (kind of layer or work beside layers, rule, seconds, multiply-adds)].
Tensor recorded(Tensor like) {
  STD_TORCH_CHECK(like.is_cpu() && like.scalar_type() == ScalarType::Double, "like: expected float64 on the CPU");
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
  m.impl("predict", TORCH_BOX(&maml_ext::predict));
  m.impl("pull", TORCH_BOX(&maml_ext::pull));
  m.impl("pull_tangent", TORCH_BOX(&maml_ext::pull_tangent));
  m.impl("score", TORCH_BOX(&maml_ext::score));
  m.impl("score_tangent", TORCH_BOX(&maml_ext::score_tangent));
  m.impl("adapt", TORCH_BOX(&maml_ext::adapt));
  m.impl("adjoint", TORCH_BOX(&maml_ext::adjoint));
  m.impl("meta", TORCH_BOX(&maml_ext::meta));
  m.impl("recorded", TORCH_BOX(&maml_ext::recorded));
}

STABLE_TORCH_LIBRARY_IMPL(maml_ext, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&maml_ext::vector_bytes));
  m.impl("record", TORCH_BOX(&maml_ext::record));
}
