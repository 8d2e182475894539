// The operators of an engine, behind torch.ops.maml_ext: what knows its tensors. Every argument is checked, since
// anybody can call the operators, and raw pointers are handed over. `Device` is where the engine is:
//   name                     of the device, in messages
//   holds(tensor)            whether the tensor is there
//   lanes(bytes)             for which vectors of numbers of so many bytes a program is laid out
//   pairs(bytes)             whether two tasks of such numbers may go abreast
//   kReadable                whether the host can look at data: only then labels and weights are checked
//   kComputes                whether `run` writes results; they stay zeros where it does not
//   run(call, like)          `like` is a tensor there, for the engine's own memory
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>

#include "call.h"
#include "program.h"

namespace maml_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Numbers = std::vector<double>;
using Maybe = std::optional<Tensor>;
namespace e = maml_ext::engine;

// Sizes of what a call works on stay below these, so that the engine can multiply and add them up.
constexpr int64_t kFrame = int64_t(1) << 36;  // elements of the values of a task's samples
constexpr int64_t kSteps = int64_t(1) << 20;  // inner steps, rows of learning rates

// The product of sizes.
inline int64_t elements(const std::string& name, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(!__builtin_mul_overflow(product, size, &product), name, ": too large");
  return product;
}

// None passes for a tensor, as an undefined one.
template <class Device>
void check_tensor(const std::string& name, const Tensor& t) {
  STD_TORCH_CHECK(t.defined(), name, ": expected a tensor, got None");
  STD_TORCH_CHECK(Device::holds(t), name, ": expected a tensor on ", Device::name);
}

// An operator of torch for which its stable headers have no function.
template <class... Arguments>
Tensor call_torch(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Samples and targets as an operator gets them; its arguments are called prefix + "x" and so on.
struct Set {
  std::string prefix;
  const Tensor &x, &y;
  const Maybe& weight;

  std::string name(const char* which) const { return prefix + which; }
};

// A call being put together: what is checked stays alive in `kept` until it is done.
template <class Device, class T>
struct Request {
  e::Call<T> call{};
  std::shared_ptr<const e::Network> net;
  Tensor theta;
  Tensors kept, results;
  std::vector<const T*> inputs;
  std::vector<T*> outputs;

  Request(e::Mode mode, const Ints& program, const Numbers& numbers, const Maybe& constants,
          const Tensor& theta, bool input_active)
      : theta(theta) {
    net = e::network_of(program, numbers, Device::lanes(sizeof(T)), input_active, Device::pairs(sizeof(T)));
    call.net = net.get();
    call.mode = mode;
    call.tasks = -1;
    STD_TORCH_CHECK(constants.has_value() == (net->constants > 0), "constants: expected ", net->constants,
                    " values, got ", constants.has_value() ? "a tensor" : "none");
    if (constants) call.constants = pointer("constants", *constants, net->constants);
  }

  // The data of a tensor of this many elements, contiguous.
  const T* pointer(const std::string& name, const Tensor& t, int64_t count) {
    check_tensor<Device>(name, t);
    STD_TORCH_CHECK(t.scalar_type() == theta.scalar_type(), name, ": expected theta's dtype");
    STD_TORCH_CHECK(t.get_device_index() == theta.get_device_index(), name, ": expected a tensor on theta's device");
    STD_TORCH_CHECK(t.numel() == count, name, ": expected ", count, " elements, got ", t.numel());
    kept.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return kept.back().template const_data_ptr<T>();
  }

  // The first samples say how many tasks there are.
  void samples(const std::string& name, const Tensor& x, e::Data<T>& data) {
    const e::Value& v = net->value[0];
    check_tensor<Device>(name, x);
    STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) > 0, name,
                    ": expected [tasks, samples, ...] with a sample at least");
    if (call.tasks < 0) call.tasks = x.size(0);
    STD_TORCH_CHECK(x.size(0) == call.tasks, name, ": expected ", call.tasks, " tasks, got ", x.size(0));
    data.samples = x.size(1);
    STD_TORCH_CHECK(data.samples <= kFrame / (net->frame_sample + net->frame_saved_sample), name,
                    ": too many samples");
    data.x = pointer(name, x, elements(name, {call.tasks, data.samples, v.c, v.h, v.w}));
  }

  const e::Value& last() const { return net->value[net->layers ? net->layer[net->layers - 1].out : 0]; }

  // A tensor like the predictions; one number a sample.
  const T* predictions(const std::string& name, const Tensor& t, const e::Data<T>& data) {
    return pointer(name, t, elements(name, {call.tasks, data.samples, last().c, last().h, last().w}));
  }
  const T* weights(const std::string& name, const Tensor& t, const e::Data<T>& data) {
    return pointer(name, t, elements(name, {call.tasks, data.samples}));
  }

  const int64_t* labels(const std::string& name, const Tensor& y, const e::Data<T>& data) {
    check_tensor<Device>(name, y);
    STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long, name, ": expected int64 labels");
    const int64_t count = elements(name, {call.tasks, data.samples, last().h, last().w}), classes = last().c;
    STD_TORCH_CHECK(y.numel() == count, name, ": expected ", count, " labels, got ", y.numel());
    STD_TORCH_CHECK(y.get_device_index() == theta.get_device_index(), name, ": expected a tensor on theta's device");
    kept.push_back(torch::stable::contiguous(y));
    const int64_t* values = kept.back().template const_data_ptr<int64_t>();
    for (int64_t i = 0; Device::kReadable && i < count; i++)
      STD_TORCH_CHECK((values[i] >= 0 && values[i] < classes) || values[i] == net->loss.ignore_index, name,
                      ": expected labels in 0..", classes - 1, ", got ", values[i]);
    return values;
  }

  // theta or a direction of it: [P] or [T, P].
  const T* parameters(const char* name, const Tensor& t, bool& shared) {
    check_tensor<Device>(name, t);
    shared = t.dim() == 1;
    STD_TORCH_CHECK(t.dim() == 1 || (t.dim() == 2 && t.size(0) == call.tasks), name, ": expected [P] or [",
                    call.tasks, ", P]");
    return pointer(name, t, elements(name, {shared ? 1 : call.tasks, net->parameters}));
  }

  // theta as `meta` gets it: one tensor [P] or [T, P], or the parameters in their order, of which a copy is made.
  void assemble(const Tensors& parts) {
    int64_t count = 0;
    for (const Tensor& part : parts) {
      check_tensor<Device>("theta", part);
      STD_TORCH_CHECK(part.scalar_type() == theta.scalar_type(), "theta: expected tensors of one dtype");
      STD_TORCH_CHECK(part.get_device_index() == theta.get_device_index(), "theta: expected tensors on one device");
      STD_TORCH_CHECK(!__builtin_add_overflow(count, part.numel(), &count), "theta: too large");
    }
    if (parts.size() == 1 && (theta.dim() == 1 || count != net->parameters)) return;
    STD_TORCH_CHECK(count == net->parameters, "theta: expected ", net->parameters, " elements, got ", count);
    if constexpr (Device::kReadable) {
      theta = torch::stable::new_empty(theta, {count});
      T* to = theta.template mutable_data_ptr<T>();
      for (const Tensor& part : parts) {
        const Tensor flat = part.is_contiguous() ? part : torch::stable::contiguous(part);
        to = std::copy_n(flat.template const_data_ptr<T>(), flat.numel(), to);
      }
    } else if constexpr (Device::kComputes) {
      Tensors flat;
      for (const Tensor& part : parts) flat.push_back(torch::stable::reshape(part, {-1}));
      theta = call_torch("aten::cat", "", flat, int64_t(0));
    } else {
      theta = torch::stable::new_empty(theta, {count});  // which nobody reads
    }
  }

  // What every call has: samples and parameters; and where there is a loss, targets and their weights.
  void inputs_of(const Tensor& x) {
    samples("x", x, call.query);
    call.theta = parameters("theta", theta, call.shared);
  }
  void problem(const Set& set, e::Data<T>& data) {
    STD_TORCH_CHECK(net->loss.kind != e::kNoLoss, "program: expected one with a loss");
    samples(set.name("x"), set.x, data);
    if (!call.theta) call.theta = parameters("theta", theta, call.shared);
    if (net->loss.kind == e::kLabels)
      data.labels = labels(set.name("y"), set.y, data);
    else
      data.y = predictions(set.name("y"), set.y, data);
    if (!set.weight) return;
    data.weight = weights(set.name("weight"), *set.weight, data);
    if (Device::kReadable) check_some_weight(set.name("weight"), data);
  }

  void rates(const Tensor& lr, int64_t steps) {
    check_tensor<Device>("lr", lr);
    STD_TORCH_CHECK(steps >= 0 && steps <= kSteps && steps <= kFrame / std::max<int64_t>(1, net->adapted),
                    "steps: expected 0 or more, and not too many, got ", steps);
    STD_TORCH_CHECK(lr.dim() == 2 && (lr.size(1) == 1 || lr.size(1) == net->parameters) &&
                        (lr.size(0) == 1 || lr.size(0) >= steps) && lr.size(0) > 0 && lr.size(0) <= kSteps,
                    "lr: expected [1 or ", steps, ", 1 or ", net->parameters, "]");
    call.steps = steps;
    call.rate_rows = lr.size(0);
    call.per_parameter = lr.size(1) != 1;
    call.rates = pointer("lr", lr, lr.numel());
  }

  // Adds a result, of zeros.
  void add(const Ints& sizes, T*& to) {
    using torch::stable::new_empty, torch::stable::new_zeros;
    results.push_back(Device::kReadable ? new_empty(theta, sizes) : new_zeros(theta, sizes));
    to = results.back().template mutable_data_ptr<T>();
    if (Device::kReadable) std::fill_n(to, results.back().numel(), T(0));
  }
  void add_like(const Tensor& t, T*& to) {
    const auto sizes = t.sizes();
    add(Ints(sizes.begin(), sizes.end()), to);
  }
  void add_of_parameters(T*& to) { add({call.tasks, net->parameters}, to); }

  // The gradients by x, y and weight that there are; `wanted` are their three flags.
  void add_gradients(const int64_t* wanted, const Set& set, e::Data<T>& data) {
    if (wanted[0]) add_like(set.x, data.to_x);
    if (wanted[1] && net->loss.kind != e::kLabels) add_like(set.y, data.to_y);
    if (wanted[2] && set.weight) add({call.tasks, data.samples}, data.to_weight);
  }

  // Samples of weight 0 are left out, and some have to be left.
  void check_some_weight(const std::string& name, const e::Data<T>& data) {
    for (int64_t t = 0; t < call.tasks; t++) {
      int64_t n = 0;
      while (n < data.samples && data.weight[t * data.samples + n] == 0) n++;
      STD_TORCH_CHECK(n < data.samples, name, ": expected one that is not 0 in every task, got none in task ",
                      t);
    }
  }

  // A sample of weight 0 is left out of batch norm's statistics, except where the gradient by its weight is
  // wanted: the loss would depend on what else is asked for.
  void check_weights(const e::Data<T>& data) {
    if (!net->batch_statistics || !data.weight || !(data.to_weight || data.weight_t)) return;
    for (int64_t i = 0; i < call.tasks * data.samples; i++)
      STD_TORCH_CHECK(data.weight[i] != 0, "weight: expected none of 0 where norms are over the batch and "
                      "gradients by weights are wanted");
  }

  Tensors run() {
    if (call.tasks == 0) return results;
    // To first order gradients by the support set stay zeros, also where 0 times what an engine finds would be NaN.
    if (call.first_order) call.support.to_x = call.support.to_y = call.support.to_weight = nullptr;
    if (Device::kReadable) {
      check_weights(call.support);
      check_weights(call.query);
    }
    Device::run(call, theta);
    return results;
  }

  // Losses, and gradients of their sum, become the mean and its gradients. Of no tasks that is NaN, and zeros.
  Tensors average() {
    if constexpr (Device::kReadable) {
      const T* const losses = call.loss;
      double sum = 0;
      for (int64_t t = 0; t < call.tasks; t++) sum += losses[t];
      results[0] = torch::stable::new_empty(theta, {});
      *results[0].template mutable_data_ptr<T>() = T(sum / double(call.tasks));
      for (size_t i = 1; i < results.size(); i++) {
        T* const gradient = results[i].template mutable_data_ptr<T>();
        const int64_t count = call.tasks ? results[i].numel() : 0;
        for (int64_t k = 0; k < count; k++) gradient[k] /= T(call.tasks);
      }
    } else {
      results[0] = torch::stable::sum(results[0]);
      if (!Device::kComputes && call.tasks) return results;
      const Tensor divisor = torch::stable::full({}, double(call.tasks), theta.scalar_type());
      const size_t divided = call.tasks ? results.size() : 1;
      for (size_t i = 0; i < divided; i++) results[i] = call_torch("aten::div_", "Tensor", results[i], divisor);
    }
    return results;
  }
};

template <class Device>
struct Operators {
  // f(zero of theta's type).
  template <class F>
  static Tensors dispatch(const Tensor& theta, F f) {
    check_tensor<Device>("theta", theta);
    if (theta.scalar_type() == ScalarType::Float) return f(float());
    STD_TORCH_CHECK(theta.scalar_type() == ScalarType::Double, "theta: expected float32 or float64");
    return f(double());
  }

  static void check_wanted(const Ints& wanted, size_t count) {
    STD_TORCH_CHECK(wanted.size() == count, "wanted: expected ", count, " flags, got ", wanted.size());
  }

  static Tensors predict(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Ints prediction) {
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kPredict, program, numbers, constants, theta, false);
      r.inputs_of(x);
      const int64_t expected = r.last().c * r.last().h * r.last().w;
      Ints sizes{x.size(0), x.size(1)};
      int64_t count = 1;
      for (const int64_t size : prediction) {
        STD_TORCH_CHECK(size > 0 && !__builtin_mul_overflow(count, size, &count), "prediction: a wrong shape");
        sizes.push_back(size);
      }
      STD_TORCH_CHECK(count == expected, "prediction: expected a shape of ", expected, " elements, got ",
                      count);
      r.add(sizes, r.call.prediction);
      return r.run();
    });
  }

  static Tensors pull(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor cotangent,
               Ints wanted) {
    check_wanted(wanted, 2);
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kPull, program, numbers, constants, theta, wanted[1]);
      r.inputs_of(x);
      r.call.cotangent = r.predictions("cotangent", cotangent, r.call.query);
      if (wanted[0]) r.add_of_parameters(r.call.to_theta);
      if (wanted[1]) r.add_like(x, r.call.query.to_x);
      return r.run();
    });
  }

  static Tensors pull_tangent(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor cotangent,
                       Maybe theta_t, Maybe x_t) {
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kPullTangent, program, numbers, constants, theta, true);
      r.inputs_of(x);
      r.call.cotangent = r.predictions("cotangent", cotangent, r.call.query);
      if (theta_t) r.call.theta_t = r.parameters("theta_t", *theta_t, r.call.shared_t);
      if (x_t) r.call.query.x_t = r.pointer("x_t", *x_t, x.numel());
      r.add_like(cotangent, r.call.prediction);
      r.add_of_parameters(r.call.to_theta);
      r.add_like(x, r.call.query.to_x);
      return r.run();
    });
  }

  static Tensors score(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor y, Maybe weight,
                Ints wanted) {
    check_wanted(wanted, 4);
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kScore, program, numbers, constants, theta, wanted[1]);
      const Set set{"", x, y, weight};
      r.problem(set, r.call.query);
      r.add({r.call.tasks}, r.call.loss);
      if (wanted[0]) r.add_of_parameters(r.call.to_theta);
      r.add_gradients(&wanted[1], set, r.call.query);
      return r.run();
    });
  }

  static Tensors score_tangent(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor x, Tensor y,
                        Maybe weight, Maybe theta_t, Maybe x_t, Maybe y_t, Maybe weight_t, Ints wanted) {
    check_wanted(wanted, 3);
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kScoreTangent, program, numbers, constants, theta, x_t || wanted[0]);
      const Set set{"", x, y, weight};
      auto& data = r.call.query;
      r.problem(set, data);
      STD_TORCH_CHECK(!weight_t || weight, "weight_t: a direction of weights needs weights");
      STD_TORCH_CHECK(!y_t || r.net->loss.kind != e::kLabels, "y_t: labels have no direction");
      if (theta_t) r.call.theta_t = r.parameters("theta_t", *theta_t, r.call.shared_t);
      if (x_t) data.x_t = r.pointer("x_t", *x_t, x.numel());
      if (y_t) data.y_t = r.predictions("y_t", *y_t, data);
      if (weight_t) data.weight_t = r.weights("weight_t", *weight_t, data);
      r.add_of_parameters(r.call.to_theta);
      r.add_gradients(&wanted[0], set, data);
      return r.run();
    });
  }

  static Tensors adapt(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor lr, Tensor x, Tensor y,
                Maybe weight, int64_t steps) {
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kAdapt, program, numbers, constants, theta, false);
      r.problem({"", x, y, weight}, r.call.support);
      r.rates(lr, steps);
      r.outputs.resize(steps);
      for (auto& to : r.outputs) r.add_of_parameters(to);
      r.call.to_trajectory = r.outputs.data();
      return r.run();
    });
  }

  static Tensors adjoint(Ints program, Numbers numbers, Maybe constants, Tensor theta, Tensor lr, Tensor x, Tensor y,
                  Maybe weight, Tensors trajectory, Tensors cotangents, Ints at, bool first_order,
                  Ints wanted) {
    check_wanted(wanted, 4);
    return dispatch(theta, [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kAdjoint, program, numbers, constants, theta, wanted[1]);
      const Set set{"", x, y, weight};
      r.problem(set, r.call.support);
      r.call.first_order = first_order;
      const int64_t steps = int64_t(trajectory.size()) + 1;
      r.rates(lr, steps);
      STD_TORCH_CHECK(cotangents.size() == at.size(), "at: expected ", cotangents.size(), " steps, got ",
                      at.size());
      const int64_t parameters = elements("theta", {r.call.tasks, r.net->parameters});
      for (const Tensor& t : trajectory) r.inputs.push_back(r.pointer("trajectory", t, parameters));
      r.inputs.resize(2 * steps - 1, nullptr);
      for (size_t i = 0; i < at.size(); i++) {
        STD_TORCH_CHECK(at[i] >= 0 && at[i] < steps, "at: expected 0 to ", steps - 1, ", got ", at[i]);
        auto& cotangent = r.inputs[steps - 1 + at[i]];
        STD_TORCH_CHECK(!cotangent, "at: expected each step once, got ", at[i], " again");
        cotangent = r.pointer("cotangents", cotangents[i], parameters);
      }
      r.call.trajectory = r.inputs.data();
      r.call.cotangents = r.inputs.data() + steps - 1;
      r.add_of_parameters(r.call.to_theta);
      if (wanted[0]) r.add_like(lr, r.call.to_rates);
      r.add_gradients(&wanted[1], set, r.call.support);
      return r.run();
    });
  }

  static Tensors meta(Ints program, Numbers numbers, Maybe constants, Tensors theta, Tensor lr, Tensor support_x,
               Tensor support_y, Maybe support_weight, Tensor query_x, Tensor query_y, Maybe query_weight,
               int64_t steps, bool first_order, bool reduce, Ints wanted) {
    check_wanted(wanted, 7);
    STD_TORCH_CHECK(!theta.empty(), "theta: expected a tensor at least");
    return dispatch(theta[0], [&](auto zero) {
      Request<Device, decltype(zero)> r(e::kMeta, program, numbers, constants, theta[0], wanted[1] || wanted[4]);
      r.assemble(theta);
      const Set support{"support_", support_x, support_y, support_weight};
      const Set query{"query_", query_x, query_y, query_weight};
      r.problem(support, r.call.support);
      r.problem(query, r.call.query);
      r.rates(lr, steps);
      STD_TORCH_CHECK(!reduce || r.call.shared, "reduce: expected theta [P] or its parts, which all tasks share");
      r.call.first_order = first_order;
      r.call.reduce = reduce;
      r.add({r.call.tasks}, r.call.loss);
      if (reduce)
        r.add_like(r.theta, r.call.to_theta);
      else
        r.add_of_parameters(r.call.to_theta);
      if (wanted[0]) r.add_like(lr, r.call.to_rates);
      r.add_gradients(&wanted[1], support, r.call.support);
      r.add_gradients(&wanted[4], query, r.call.query);
      r.run();
      return reduce ? r.average() : r.results;
    });
  }

  // Under names that begin with `prefix`.
  template <class Library>
  static void implement(Library& m, const std::string& prefix = "") {
    m.impl((prefix + "predict").c_str(), TORCH_BOX(&Operators::predict));
    m.impl((prefix + "pull").c_str(), TORCH_BOX(&Operators::pull));
    m.impl((prefix + "pull_tangent").c_str(), TORCH_BOX(&Operators::pull_tangent));
    m.impl((prefix + "score").c_str(), TORCH_BOX(&Operators::score));
    m.impl((prefix + "score_tangent").c_str(), TORCH_BOX(&Operators::score_tangent));
    m.impl((prefix + "adapt").c_str(), TORCH_BOX(&Operators::adapt));
    m.impl((prefix + "adjoint").c_str(), TORCH_BOX(&Operators::adjoint));
    m.impl((prefix + "meta").c_str(), TORCH_BOX(&Operators::meta));
  }
};

}  // namespace maml_ext
