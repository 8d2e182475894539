// The problems that engine_driver.cpp runs: programs as integers, and inputs whose every array has its exact size on
// the heap, where AddressSanitizer sees what lies behind it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/engine/program.h"

namespace {

using namespace maml_ext;
using namespace maml_ext::cuda;

// Numbers from -1 to 1, always the same.
class Random {
 public:
  double operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return double(state_ >> 40) / (1 << 23) - 1;
  }
  template <class T>
  std::vector<T> numbers(int64_t count, double low = -1, double high = 1) {
    std::vector<T> result(count);
    for (T& x : result) x = T(low + (high - low) * ((*this)() + 1) / 2);
    return result;
  }

 private:
  uint64_t state_ = 1;
};

// A chain of layers as the integers of maml_ext/program.py.
class Program {
 public:
  int64_t inputs, outputs, parameters = 0, constants = 0;
  LossKind loss_kind = kMse;

  explicit Program(int64_t inputs) : inputs(inputs), outputs(inputs) {}

  Program& linear(int64_t features, bool bias = true, bool frozen = false) {
    const int64_t weight = place(features * outputs, frozen), offset = bias ? place(features, frozen) : -1;
    outputs = features;
    return layer(kContract, {features, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, weight, offset});
  }
  Program& norm(int64_t groups, bool affine = true) {
    const int64_t weight = affine ? place(outputs, false) : -1, bias = affine ? place(outputs, false) : -1;
    return layer(kNorm, {kSample, groups, 0, weight, bias, -1, -1}, 1e-5);
  }
  Program& activation(engine::Activation which, double a = 0, double b = 0) {
    return layer(kActivation, {which}, a, b);
  }
  Program& scale(double factor, double shift) { return layer(kCombine, {0}, factor, shift); }
  Program& loss(LossKind kind, double parameter = 0, bool class_weights = false, int64_t ignore_index = -100) {
    loss_kind = kind;
    loss_ = {kind, ignore_index, class_weights ? place(outputs, true) : -1, 0};
    loss_parameter_ = parameter;
    return *this;
  }
  int64_t layers() const { return int64_t(numbers_.size()) / 2; }

  std::shared_ptr<const Network> network(bool input_active) const {
    std::vector<int64_t> program{1, parameters, constants, inputs, 1, 1, layers()};
    program.insert(program.end(), layers_.begin(), layers_.end());
    program.insert(program.end(), loss_.begin(), loss_.end());
    std::vector<double> numbers = numbers_;
    numbers.insert(numbers.end(), {loss_parameter_, 0});
    return engine::network_of(program, numbers, 1, input_active);
  }

 private:
  std::vector<int64_t> layers_, loss_{kMse, -100, -1, 0};
  std::vector<double> numbers_;
  double loss_parameter_ = 0;

  int64_t place(int64_t count, bool constant) {
    int64_t& end = constant ? constants : parameters;
    end += count;
    return constant ? -(end - count + 2) : end - count;
  }
  Program& layer(Kind kind, std::vector<int64_t> attributes, double a = 0, double b = 0) {
    attributes.resize(engine::kLayerInts - 3);
    layers_.insert(layers_.end(), {kind, layers(), -1});
    layers_.insert(layers_.end(), attributes.begin(), attributes.end());
    numbers_.insert(numbers_.end(), {a, b});
    return *this;
  }
};

enum Weights { kNone, kGiven, kDerived };  // of samples: kGiven has a 0, kDerived gradients
enum Rates { kOne, kEachStep, kEachParameter, kEachOfBoth };

struct Case {
  std::string name;
  Program program;
  int64_t tasks = 3, support = 5, query = 7, steps = 2;
  int64_t chunk = 0;  // samples in memory at a time; 0: what fits
  Weights weights = kNone;
  Rates rates = kOne;
  bool shared = true;  // theta
  bool gradients = true;  // by rates, samples and targets
  bool first_order = false;

  bool adapts() const { return steps && program.parameters; }
  int64_t rate_rows() const { return rates == kEachStep || rates == kEachOfBoth ? steps : 1; }
  bool per_parameter() const { return rates == kEachParameter || rates == kEachOfBoth; }
  int64_t rate_columns() const { return per_parameter() ? program.parameters : 1; }
};

// An array with a direction in which the numbers may move.
template <class T>
struct Leaf {
  std::vector<T> value, direction;
};

template <class T>
struct Set {
  int64_t samples = 0;
  Leaf<T> x, y, weight;
  std::vector<int64_t> labels;
};

template <class T>
struct Inputs {
  Leaf<T> theta, rates;
  std::vector<T> constants, cotangent;
  std::vector<std::vector<T>> cotangents;  // of theta_1 .. theta_K; empty where there is none
  Set<T> support, query;

  explicit Inputs(const Case& c) {
    Random random;
    const Program& p = c.program;
    auto leaf = [&](int64_t count, double low, double high) {
      return Leaf<T>{random.numbers<T>(count, low, high), random.numbers<T>(count)};
    };
    auto set = [&](int64_t samples) {
      Set<T> set{samples, leaf(c.tasks * samples * p.inputs, -1, 1), {}, {}, {}};
      if (p.loss_kind == kLabels)
        for (int64_t i = 0; i < c.tasks * samples; i++) set.labels.push_back(i * 7 % 5 % p.outputs);
      else
        set.y = leaf(c.tasks * samples * p.outputs, 0, 1);
      if (c.weights) set.weight = leaf(c.tasks * samples, 0.5, 2);
      if (c.weights == kGiven) set.weight.value[samples - 1] = 0;
      return set;
    };
    theta = leaf((c.shared ? 1 : c.tasks) * p.parameters, -0.7, 0.7);
    rates = leaf(c.rate_rows() * c.rate_columns(), 0.05, 0.15);
    constants = random.numbers<T>(p.constants, 0.3, 1);
    support = set(c.support);
    query = set(c.query);
    cotangent = random.numbers<T>(c.tasks * c.query * p.outputs);
    for (int64_t k = 0; k < c.steps; k++)
      cotangents.push_back(random.numbers<T>(k % 2 || k == c.steps - 1 ? c.tasks * p.parameters : 0));
  }
};

std::vector<Case> cases() {
  const Program narrow = Program(3).linear(37).activation(kTanh).linear(5);
  const Program tiny = Program(1).linear(3).activation(kTanh).linear(1);
  const Program sinusoids = Program(1).linear(40).activation(kRelu).linear(40).activation(kRelu).linear(1);
  const Program norms = Program(3).norm(1).linear(33).norm(1).activation(kTanh).linear(5);
  const Program groups = Program(3).linear(70, true, true).norm(2, false).activation(kGelu).linear(3, false);
  const Program alone = Program(33).activation(kSin).scale(1.5, -0.2).activation(kElu, 0.7).norm(3);
  std::vector<Case> all;
  auto add = [&](const char* name, const Program& program) -> Case& { return all.emplace_back(Case{name, program}); };
  {
    Case& c = add("labels", Program(norms).loss(kLabels, 0.1, true, 1));
    c.weights = kGiven;
    c.chunk = 2;
    c.gradients = false;
  }
  {
    Case& c = add("sinusoids", sinusoids);
    c.tasks = 2;
    c.chunk = 3;
  }
  {
    Case& c = add("each rate", narrow);
    c.weights = kGiven;
    c.rates = kEachOfBoth;
    c.shared = false;
  }
  {
    Case& c = add("soft labels", Program(3).linear(33).activation(kSilu).linear(3).loss(kSoftLabels, 0.2, true));
    c.weights = kDerived;
    c.rates = kEachStep;
    c.chunk = 4;
  }
  {
    Case& c = add("groups", Program(groups).loss(kBinary));
    c.tasks = c.support = 1;
    c.rates = kEachParameter;
  }
  {
    Case& c = add("no gradients", Program(narrow).scale(0.5, 0.1));
    c.gradients = false;
    c.rates = kEachParameter;
    c.steps = 3;
  }
  add("first order", narrow).first_order = true;
  {
    Case& c = add("first order alone", narrow);
    c.first_order = true;
    c.gradients = false;
  }
  add("activations", Program(alone).activation(kSoftplus, 2, 3).loss(kHuber, 0.3)).support = 9;
  add("no layers", Program(3));
  {
    Case& c = add("no steps", narrow);
    c.steps = 0;
    c.shared = false;
  }
  {
    Case& c = add("many steps", tiny);
    c.tasks = 1;
    c.steps = kStepsOfALaunch + 2;
  }
  return all;
}

}  // namespace
