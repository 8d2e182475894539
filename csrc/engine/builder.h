// From the integers of a program to a Network, step by step: parsed and checked (program.cpp), then laid out for vectors
// (layout.cpp).
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "network.h"

namespace maml_ext::engine {

constexpr int64_t kMaximum = int64_t(1) << 40;  // elements of anything

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      return std::to_string(part);
    else
      return std::string(part);
  };
  throw std::runtime_error((std::string("program: ") + ... + text(parts)));
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t result;
  require(!__builtin_mul_overflow(a, b, &result) && result <= kMaximum, "a size overflows: ", a, " times ", b);
  return result;
}

// What owns the arrays of a Network while it is put together.
struct Builder {
  Network network{};
  std::vector<Layer> layers;
  std::vector<Value> values;
  std::vector<Slot> slots;
  std::deque<std::vector<int32_t>> tables;
  std::deque<std::vector<int64_t>> taps;
  std::deque<std::vector<Rows>> rows;
  std::unique_ptr<bool[]> needs_gradient, has_tangent;
  std::shared_ptr<const Network> pairs;

  std::map<std::tuple<bool, int64_t>, int> slot_at;

  int64_t whole_vectors(int64_t n) const { return (n + network.lanes - 1) / network.lanes * network.lanes; }
  int64_t round_up(int64_t channels) const { return whole_vectors(channels * network.abreast); }
  int slot(int64_t reference, SlotKind kind, int64_t taps, int64_t inputs, int64_t outputs, int64_t groups,
           int64_t height, int64_t width, const char* what);
  void parse(const std::vector<int64_t>& program, const std::vector<double>& numbers);
  void parse_layer(const int64_t* p, const double* numbers);
  void parse_loss(const int64_t* p, const double* numbers);
  void keep_live();
  void fuse();
  void mark();
  void choose_algorithm(Layer& layer);
  void lay_out();
  void tabulate(Layer& layer);
  bool gains_from_pairs() const;
  void finish();
};

}  // namespace maml_ext::engine
