// Runs every launcher of csrc/cuda on a handful of small problems, on the CPU, without torch.
//
//     engine_driver orders <shuffles>   the same bits forward, in reverse and in random orders of threads and blocks
//     engine_driver once                forward alone, doubles alone: ThreadSanitizer is slow to make threads
//     engine_driver gradients           derivatives against finite differences
//
// Exit status 3, and a line, at a difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cuda/sgd_update.h"
#include "problems.h"

namespace {

constexpr int64_t kAvailable = 232448;  // bytes of shared memory, of an H100

void require(bool right, const std::string& what) {
  if (right) return;
  std::printf("differs: %s\n", what.c_str());
  std::exit(3);
}

void require(cudaError_t error, const std::string& what) { require(error == cudaSuccess, what + ": error"); }

// What launches gave, by name, in order. (A deque: its arrays stay where they are.)
template <class T>
struct Result {
  std::string name;
  std::vector<T> numbers;
  bool may_vanish;
};
template <class T>
struct Results {
  std::deque<Result<T>> all;

  T* add(const std::string& name, int64_t count, bool may_vanish = false) {
    all.push_back({name, std::vector<T>(count), may_vanish});
    return all.back().numbers.data();
  }
  const std::vector<T>* find(const std::string& name) const {
    for (const auto& result : all)
      if (result.name == name) return &result.numbers;
    return nullptr;
  }
  const std::vector<T>& operator[](const std::string& name) const {
    const std::vector<T>* found = find(name);
    require(found != nullptr, "there is no " + name);
    return *found;
  }
};

// One operator on one case.
template <class T>
struct Launch {
  const Case& c;
  const Inputs<T>& in;
  Results<T>& results;
  const std::string name;
  const Program& program = c.program;
  std::shared_ptr<const Network> net;
  Plan plan;
  Call<T> call{};
  std::deque<std::vector<T>> scratch;

  Launch(const Case& c, const Inputs<T>& in, Results<T>& results, std::string name, Mode mode, bool input_active)
      : c(c), in(in), results(results), name(name), net(program.network(input_active)) {
    require(plan_of(*net, plan).empty(), c.name + ": no plan");
    call.net = net.get();
    call.mode = mode;
    call.tasks = c.tasks;
    call.theta = in.theta.value.data();
    call.shared = call.shared_t = c.shared;
    call.constants = in.constants.data();
  }

  T* result(const std::string& what, int64_t count, bool may_vanish = false) {
    return results.add(name + " " + what, count, may_vanish);
  }
  T* temporary(int64_t count, T value) {
    scratch.emplace_back(count, value);
    return scratch.back().data();
  }
  T* to_theta() { return result("theta", c.tasks * program.parameters); }

  Data<T> samples(const Set<T>& set) const {
    Data<T> d{};
    d.samples = set.samples;
    d.x = set.x.value.data();
    return d;
  }
  Data<T> data(const Set<T>& set, bool gradients, bool directions, const std::string& of, bool may_vanish = false) {
    Data<T> d = samples(set);
    if (program.loss_kind == kLabels)
      d.labels = set.labels.data();
    else
      d.y = set.y.value.data();
    if (c.weights) d.weight = set.weight.value.data();
    if (directions) {
      d.x_t = set.x.direction.data();
      if (d.y) d.y_t = set.y.direction.data();
      if (c.weights == kDerived) d.weight_t = set.weight.direction.data();
    }
    if (gradients) {
      d.to_x = result(of + "x", set.x.value.size(), may_vanish);
      if (d.y) d.to_y = result(of + "y", set.y.value.size(), may_vanish);
      if (c.weights == kDerived) d.to_weight = result(of + "weight", set.weight.value.size(), may_vanish);
    }
    return d;
  }

  void set_rates(bool gradient) {
    call.steps = c.steps;
    call.rates = in.rates.value.data();
    call.rate_rows = c.rate_rows();
    call.per_parameter = c.per_parameter();
    call.first_order = c.first_order;
    if (gradient) call.to_rates = temporary(c.tasks * in.rates.value.size(), 0);
  }

  Grid grid() {
    const int64_t samples = std::max(call.support.samples, call.query.samples);
    auto size = [&](int64_t samples, int64_t available) {
      return size_of(plan, call.mode, call.to_rates, call.first_order, samples, sizeof(T), available);
    };
    const int64_t available = c.chunk ? size(c.chunk, kAvailable).bytes : kAvailable;
    const Size chosen = size(samples, available);
    require(chosen.misfit.empty() && (!c.chunk || plan.chunk < samples), c.name + ": " + chosen.misfit);
    return {c.tasks, chosen.bytes, chosen.threads, nullptr};
  }

  void launch(cudaError_t (*run)(const Plan&, const Call<T>&, Grid)) {
    const Grid chosen = grid();
    require(run(plan, call, chosen), c.name + " " + name);
  }
  // To the sum over tasks of what is there for each of them.
  void sum(const T* from, const std::string& what, int64_t count, bool may_vanish = false) {
    require(sum_tasks(from, result(what, count, may_vanish), c.tasks, count, nullptr), c.name + " sum_tasks");
  }
  void sum_rates() {
    if (call.to_rates) sum(call.to_rates, "rates", in.rates.value.size(), !c.adapts());
  }
};

template <class T>
void run_networks(const Case& c, const Inputs<T>& in, Results<T>& results) {
  {
    Launch<T> l(c, in, results, "predict", kPredict, false);
    l.call.query = l.samples(in.query);
    l.call.prediction = l.result("prediction", in.cotangent.size());
    l.launch(run_network<T>);
  }
  for (const bool gradients : {false, true}) {
    Launch<T> l(c, in, results, gradients ? "pull" : "pull theta alone", kPull, gradients);
    l.call.query = l.samples(in.query);
    l.call.cotangent = in.cotangent.data();
    l.call.to_theta = l.to_theta();
    if (gradients) l.call.query.to_x = l.result("x", in.query.x.value.size());
    l.launch(run_network<T>);
  }
  Launch<T> l(c, in, results, "pull_tangent", kPullTangent, true);
  l.call.query = l.samples(in.query);
  l.call.query.x_t = in.query.x.direction.data();
  l.call.theta_t = in.theta.direction.data();
  l.call.cotangent = in.cotangent.data();
  l.call.prediction = l.result("prediction", in.cotangent.size());
  l.call.to_theta = l.to_theta();
  l.call.query.to_x = l.result("x", in.query.x.value.size(), !c.program.parameters);
  l.launch(run_network<T>);
}

template <class T>
void run_scores(const Case& c, const Inputs<T>& in, Results<T>& results) {
  for (const bool gradients : {false, true}) {
    Launch<T> l(c, in, results, gradients ? "score" : "score alone", kScore, gradients);
    l.call.query = l.data(in.query, gradients, false, "");
    l.call.loss = l.result("loss", c.tasks);
    if (gradients) l.call.to_theta = l.to_theta();
    l.launch(run_score<T>);
  }
  Launch<T> l(c, in, results, "score_tangent", kScoreTangent, true);
  l.call.query = l.data(in.query, true, true, "");
  l.call.theta_t = in.theta.direction.data();
  l.call.to_theta = l.to_theta();
  l.launch(run_score<T>);
}

template <class T>
void run_inner_loop(const Case& c, const Inputs<T>& in, Results<T>& results) {
  std::vector<T*> thetas;
  {
    Launch<T> l(c, in, results, "adapt", kAdapt, false);
    l.call.support = l.data(in.support, false, false, "");
    l.set_rates(false);
    for (int64_t k = 1; k <= c.steps; k++)
      thetas.push_back(l.result(std::to_string(k), c.tasks * c.program.parameters));
    l.call.to_trajectory = thetas.data();
    l.launch(run_adapt<T>);
  }
  if (!c.steps) return;
  const std::vector<const T*> trajectory(thetas.begin(), thetas.end());
  std::vector<const T*> cotangents;
  for (const auto& cotangent : in.cotangents) cotangents.push_back(cotangent.empty() ? nullptr : cotangent.data());
  Launch<T> l(c, in, results, "adjoint", kAdjoint, c.gradients);
  l.set_rates(c.gradients);
  l.call.support = l.data(in.support, c.gradients, false, "", c.first_order || !c.adapts());
  l.call.trajectory = trajectory.data();
  l.call.cotangents = cotangents.data();
  l.call.to_theta = l.to_theta();
  l.launch(run_adjoint<T>);
  l.sum_rates();
}

template <class T>
void run_whole(const Case& c, const Inputs<T>& in, Results<T>& results) {
  Launch<T> l(c, in, results, "meta", kMeta, c.gradients);
  const int64_t all = c.tasks * c.program.parameters;
  l.set_rates(c.gradients);
  l.call.loss = l.result("loss", c.tasks);
  l.call.support = l.data(in.support, c.gradients, false, "support ", c.first_order || !c.adapts());
  l.call.query = l.data(in.query, c.gradients, false, "query ");
  T* const lambda = c.shared ? l.temporary(all, NAN) : l.to_theta();
  const Grid grid = l.grid();
  require(run_meta(l.plan, l.call, l.temporary(c.steps * all, NAN), lambda, grid), c.name + " meta");
  if (c.shared) l.sum(lambda, "theta", c.program.parameters);
  l.sum_rates();
}

template <class T>
Results<T> run_all(const Case& c, const Inputs<T>& in) {
  Results<T> results;
  run_networks(c, in, results);
  run_scores(c, in, results);
  run_inner_loop(c, in, results);
  run_whole(c, in, results);
  return results;
}

// The update and its derivative: rows apart and side by side, odd sizes, arrays that begin anywhere.
template <class T>
Results<T> run_sgd_update(int64_t more) {
  Random random;
  Results<T> results;
  std::deque<std::vector<T>> arrays;
  auto array = [&](int64_t count, int64_t skip) {
    arrays.push_back(random.numbers<T>(count + skip));
    return arrays.back().data() + skip;
  };
  struct Shape {
    int64_t rows, size, gap;
    bool per_parameter, first;
    int64_t skip;
  };
  std::vector<Shape> shapes{{1, 8399, 0, false, true, 0}, {1, 4195, 0, false, true, 1}, {37, 5, 0, true, true, 0},
                            {35, 6, 2, true, true, 0},     {3, 7, 1, false, false, 0},    {3, 70, 3, true, true, 1},
                            {1, 1, 0, true, false, 0}};
  for (int64_t i = 0; i < more; i++)
    shapes.push_back({1, i % 9, 0, i % 2 == 0, true, i % 3 == 0});
  std::vector<Segment<T>> updates, derivatives, rates_only;
  for (const Shape& s : shapes) {
    const int64_t pitch = s.size + s.gap, extent = s.rows ? (s.rows - 1) * pitch + s.size : 0;
    const std::string name = std::to_string(updates.size());
    const int64_t rates = s.per_parameter ? s.size : 1;
    T *const first = array(extent, s.skip), *const grad = array(extent, s.skip), *const lr = array(rates, s.skip);
    Segment<T> segment{first, grad, lr, nullptr, nullptr, s.rows, s.size, pitch, s.per_parameter};
    segment.rate_out = results.add("gradient of rates alone " + name, rates, s.size == 0);
    rates_only.push_back(segment);
    segment.rate_out = results.add("gradient of rates " + name, rates, s.size == 0);
    segment.out = results.add("gradient of grad " + name, extent);
    derivatives.push_back(segment);
    if (!s.first) segment.first = nullptr;
    segment.out = results.add("sgd_update " + name, extent);
    updates.push_back(segment);
  }
  require(sgd_update(updates.data(), updates.size(), nullptr), "sgd_update");
  for (auto* segments : {&derivatives, &rates_only}) {
    std::vector<double> workspace(backward_workspace(segments->data(), segments->size()), NAN);
    require(sgd_update_backward(segments->data(), segments->size(), workspace.data(), nullptr), "sgd_update_backward");
  }
  for (size_t i = 0; i < updates.size(); i++) {
    const Segment<T>&update = updates[i], &derivative = derivatives[i];
    std::vector<double> expected(update.per_parameter ? update.size : 1);
    for (int64_t at = 0, r = 0; r < update.rows; at += update.pitch - update.size, r++)
      for (int64_t k = 0; k < update.size; k++, at++) {
        const int64_t rate = update.per_parameter ? k : 0;
        const double out = (update.first ? update.first[at] : 0) - double(update.lr[rate]) * update.grad[at];
        require(std::abs(update.out[at] - out) < 1e-6, "sgd_update " + std::to_string(i) + " and a loop");
        const double to_grad = -double(update.lr[rate]) * derivative.first[at];
        require(std::abs(derivative.out[at] - to_grad) < 1e-6, "gradient of grad " + std::to_string(i) + " and a loop");
        expected[rate] -= double(derivative.first[at]) * derivative.grad[at];
      }
    for (size_t k = 0; k < expected.size(); k++) {
      const T found = derivative.rate_out[k];
      require(found == rates_only[i].rate_out[k], "gradients of rates, alone or not " + std::to_string(i));
      require(std::abs(found - expected[k]) < 1e-5 * (1 + std::abs(expected[k])),
              "gradient of rates " + std::to_string(i) + " and a loop");
    }
  }
  return results;
}

// Orders.

template <class T>
void check_sense(const std::string& name, const Results<T>& results) {
  for (const auto& result : results.all) {
    bool finite = true, vanishes = !result.numbers.empty();
    for (const T x : result.numbers) {
      finite = finite && std::isfinite(x);
      vanishes = vanishes && x == 0;
    }
    require(finite, name + " " + result.name + ": not finite");
    require(!vanishes || result.may_vanish, name + " " + result.name + ": all zero");
  }
}

template <class T>
void compare_orders(const std::string& case_name, int shuffles, const std::function<Results<T>()>& run) {
  const std::string name = case_name + (sizeof(T) == 4 ? " float" : " double");
  emulation::order(emulation::Order::kForward);
  const Results<T> forward = run();
  check_sense(name, forward);
  auto compare = [&](const std::string& order) {
    const Results<T> other = run();
    for (size_t i = 0; i < forward.all.size(); i++) {
      const std::vector<T>&a = forward.all[i].numbers, &b = other.all[i].numbers;
      const bool same = a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
      require(same, name + " " + forward.all[i].name + ": " + order);
    }
  };
  emulation::order(emulation::Order::kReverse);
  compare("reverse");
  for (int seed = 0; seed < shuffles; seed++) {
    emulation::order(emulation::Order::kShuffled, seed);
    compare("shuffle " + std::to_string(seed));
  }
}

template <class T>
void compare_all_orders(int shuffles) {
  constexpr int64_t kMore = 50;  // than a launch takes
  for (const Case& c : cases()) compare_orders<T>(c.name, shuffles, [&] { return run_all(c, Inputs<T>(c)); });
  compare_orders<T>("", shuffles, [] { return run_sgd_update<T>(kMore); });
}

// Finite differences, along all directions that `move` names.

using Move = std::function<void(Inputs<double>&, double by)>;

void add(Leaf<double>& leaf, double by) {
  for (size_t i = 0; i < leaf.value.size(); i++) leaf.value[i] += by * leaf.direction[i];
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {  // b for each task, or for all
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i % b.size()];
  return sum;
}

using Vector = std::vector<double>;
Vector difference(const Case& c, const Move& move, const std::function<Vector(const Inputs<double>&)>& f) {
  constexpr double kStep = 1e-5;
  Inputs<double> more(c), less(c);
  move(more, kStep);
  move(less, -kStep);
  Vector result = f(more);
  const Vector other = f(less);
  for (size_t i = 0; i < result.size(); i++) result[i] = (result[i] - other[i]) / (2 * kStep);
  return result;
}

void require_near(const Vector& found, const Vector& expected, const std::string& what) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  require(found.size() == expected.size() && std::sqrt(error) <= 1e-6 * (std::sqrt(size) + 1e-3),
          what + " and finite differences");
}

// The tangents that one operator gives are the differences of what another does.
void check_tangents(const Case& c) {
  const Inputs<double> in(c);
  const auto networks = [&](const Inputs<double>& at) {
    Results<double> results;
    run_networks(c, at, results);
    return results;
  };
  const auto scores = [&](const Inputs<double>& at) {
    Results<double> results;
    run_scores(c, at, results);
    return results;
  };
  const Move samples = [](auto& at, double by) { add(at.theta, by), add(at.query.x, by); };
  const Move all = [&](auto& at, double by) {
    samples(at, by);
    add(at.query.y, by);
    if (c.weights == kDerived) add(at.query.weight, by);
  };
  const Results<double> network = networks(in), score = scores(in);
  const auto check = [&](const Results<double>& found, const std::string& tangent, const Move& move, auto f) {
    if (found.find(tangent)) require_near(found[tangent], difference(c, move, f), c.name + " " + tangent);
  };
  check(network, "pull_tangent prediction", samples, [&](auto& at) { return networks(at)["predict prediction"]; });
  for (const std::string what : {"theta", "x"})
    check(network, "pull_tangent " + what, samples, [&](auto& at) { return networks(at)["pull " + what]; });
  for (const std::string what : {"theta", "x", "y", "weight"})
    check(score, "score_tangent " + what, all, [&](auto& at) { return scores(at)["score " + what]; });
  // And the first derivatives are those of predictions and losses.
  const auto along = [&](const std::string& what, const Leaf<double>& leaf, const Move& move, auto f) {
    const bool is_score = what.rfind("score", 0) == 0;
    const Results<double>& found = is_score ? score : network;
    if (found.find(what)) require_near({dot(found[what], leaf.direction)}, difference(c, move, f), c.name + " " + what);
  };
  const Vector one{1};
  const auto total = [&](auto& at) { return Vector{dot(scores(at)["score loss"], one)}; };
  const auto projected = [&](auto& at) { return Vector{dot(networks(at)["predict prediction"], at.cotangent)}; };
  const Move theta = [](auto& at, double by) { add(at.theta, by); };
  const Move x = [](auto& at, double by) { add(at.query.x, by); };
  along("pull theta", in.theta, theta, projected);
  along("pull x", in.query.x, x, projected);
  along("score theta", in.theta, theta, total);
  along("score x", in.query.x, x, total);
  along("score y", in.query.y, [](auto& at, double by) { add(at.query.y, by); }, total);
  along("score weight", in.query.weight, [](auto& at, double by) { add(at.query.weight, by); }, total);
}

// The gradients of meta and adjoint are those of losses and parameters behind the inner loop.
void check_meta_gradients(const Case& c) {
  const Inputs<double> in(c);
  const Vector one{1};
  const auto inner_loop = [&](const Inputs<double>& at) {
    Results<double> results;
    run_inner_loop(c, at, results);
    return results;
  };
  const auto whole = [&](const Inputs<double>& at) {
    Results<double> results;
    run_whole(c, at, results);
    return results;
  };
  const auto total = [&](auto& at) { return Vector{dot(whole(at)["meta loss"], one)}; };
  const auto projected = [&](auto& at) {
    const Results<double> found = inner_loop(at);
    double sum = 0;
    for (int64_t k = 0; k < c.steps; k++)
      if (!at.cotangents[k].empty()) sum += dot(at.cotangents[k], found["adapt " + std::to_string(k + 1)]);
    return Vector{sum};
  };
  const Results<double> loop = inner_loop(in), meta = whole(in);
  const auto check = [&](const std::string& what, const std::string& of_adjoint, auto leaf) {
    const Move move = [&](auto& at, double by) { add(leaf(at), by); };
    const Vector& direction = leaf(const_cast<Inputs<double>&>(in)).direction;
    if (meta.find("meta " + what))
      require_near({dot(meta["meta " + what], direction)}, difference(c, move, total), c.name + " meta " + what);
    if (loop.find("adjoint " + of_adjoint))
      require_near({dot(loop["adjoint " + of_adjoint], direction)}, difference(c, move, projected),
                   c.name + " adjoint " + of_adjoint);
  };
  check("theta", "theta", [](auto& at) -> auto& { return at.theta; });
  check("rates", "rates", [](auto& at) -> auto& { return at.rates; });
  check("support x", "x", [](auto& at) -> auto& { return at.support.x; });
  check("support y", "y", [](auto& at) -> auto& { return at.support.y; });
  check("support weight", "weight", [](auto& at) -> auto& { return at.support.weight; });
  check("query x", "-", [](auto& at) -> auto& { return at.query.x; });
  check("query y", "-", [](auto& at) -> auto& { return at.query.y; });
  check("query weight", "-", [](auto& at) -> auto& { return at.query.weight; });
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "orders" && count == 3) {
    const int shuffles = std::atoi(arguments[2]);
    compare_all_orders<double>(shuffles);
#if !defined(DOUBLES_ALONE)
    compare_all_orders<float>(shuffles);
#endif
  } else if (what == "once") {
    for (const Case& c : cases()) check_sense(c.name, run_all(c, Inputs<double>(c)));
    check_sense("", run_sgd_update<double>(0));
  } else if (what == "gradients") {
    for (const Case& c : cases())
      if (c.name != "sinusoids" && !c.first_order) {
        check_tangents(c);
        check_meta_gradients(c);
      }
  } else {
    std::printf("engine_driver orders <shuffles> | once | gradients\n");
    return 2;
  }
}
