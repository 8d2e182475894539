#include "plan.h"

#include <algorithm>
#include <vector>

namespace maml_ext::cuda {
namespace {

const char* const kKinds[] = {"a convolution", "a norm",          "an activation",
                              "pooling",       "average pooling", "a reshape",
                              "a product",     "a softmax",       "batch norm or pooling"};

// The plan while it is put together.
struct Planner {
  const Network& net;
  Plan& plan;
  std::vector<int> place;  // of each slot, in the vector of parameters
  int in, features;        // the value that the next stage reads

  std::string stretches();
  int new_value(int64_t features) {
    const int at = plan.frame;
    plan.frame += Stage::pitch(int(features));
    plan.widest = std::max(plan.widest, Stage::pitch(int(features)));
    return at;
  }
  void parameter(int slot, int& at, bool& learns) const {
    at = slot < 0 ? -1 : place[slot];
    learns = slot >= 0 && !net.slot[slot].fixed;
  }
  std::string add(const Layer& l);
};

// Every element of theta is in a stretch, read by a layer or not: the update passes over all.
std::string Planner::stretches() {
  struct Part {
    int64_t source, extent;
    int slot;
  };
  for (const bool fixed : {false, true}) {
    std::vector<Part> parts;
    for (int i = 0; i < net.slots; i++) {
      const Slot& s = net.slot[i];
      const int64_t extent =
          s.kind == kFilter ? s.taps * s.inputs / s.groups * s.outputs : s.height * s.width * s.outputs;
      if (s.fixed == fixed) parts.push_back({s.source, extent, i});
    }
    std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.source < b.source; });
    const int64_t end = fixed ? 0 : net.parameters;
    std::vector<Part> all;
    int64_t at = 0;
    for (const Part& p : parts) {
      if (!fixed && p.source > at) all.push_back({at, p.source - at, -1});
      all.push_back(p);
      at = p.source + p.extent;
    }
    if (at < end) all.push_back({at, end - at, -1});
    for (const Part& p : all) {
      if (plan.stretches + plan.fixed_stretches == kSlots)
        return "more parameter tensors than fit in a kernel's parameters";
      const bool matrix = p.slot >= 0 && net.slot[p.slot].kind == kFilter;
      const int64_t columns = matrix ? net.slot[p.slot].inputs : p.extent, rows = matrix ? net.slot[p.slot].outputs : 1;
      int& extent = fixed ? plan.fixed : plan.adapted;
      const int start = fixed ? plan.adapted + plan.fixed : plan.adapted, pitch = Stage::pitch(int(columns));
      if (columns > kMaximumElements || rows * pitch > kMaximumElements - extent)
        return "too many parameters for shared memory";
      if (p.slot >= 0) place[p.slot] = start;
      const int64_t inverse = ((int64_t(1) << 32) + columns - 1) / columns;
      plan.stretch[plan.stretches + plan.fixed_stretches] = {p.source, start, int(rows * columns), int(columns),
                                                            uint32_t(inverse)};  // of one column not used
      (fixed ? plan.fixed_stretches : plan.stretches)++;
      extent += int(rows) * pitch;
    }
  }
  return "";
}

std::string Planner::add(const Layer& l) {
  const Value &x = net.value[l.in], &y = net.value[l.out];
  if (l.kind == kReshape) return "";
  Stage* const last = plan.stages ? &plan.stage[plan.stages - 1] : nullptr;
  const bool activates = l.kind == kBlock && l.statistics == kNoStatistics && !l.pooled;
  if (activates && last && last->activation == kIdentity) {
    last->activation = l.activation;
    last->a = l.a, last->b = l.b;
    last->out = in = new_value(features);
    return "";
  }
  if (plan.stages == kLayers) return "more than " + std::to_string(kLayers) + " layers";
  Stage& s = plan.stage[plan.stages++];
  s = {};
  s.activation = kIdentity;
  s.inputs = s.outputs = features;
  s.in = in;
  s.moves = net.needs_gradient[l.in];
  parameter(l.weight, s.weight, s.learns_weight);
  parameter(l.bias, s.bias, s.learns_bias);
  const bool vectors = x.h * x.w == 1 && y.h * y.w == 1;
  if (activates) {
    s.kind = kElementwise;
    s.activation = l.activation;
    s.a = l.a, s.b = l.b;
    s.scale = 1;
    s.before = in;
    s.out = new_value(features);
  } else if (l.kind == kCombine && !l.multiply) {
    s.kind = kElementwise;
    s.scale = l.a, s.shift = l.b;
    s.before = s.out = new_value(features);
  } else if (l.kind == kContract && vectors && l.kh * l.kw == 1 && net.slot[l.weight].groups == 1 && !l.top &&
             !l.left) {
    s.kind = kLinear;
    s.outputs = int(y.c);
    s.before = s.out = new_value(y.c);
  } else if (l.kind == kNorm && l.statistics == kSample && vectors) {
    s.kind = kGroupNorm;
    s.groups = int(l.groups);
    s.eps = l.eps;
    s.before = s.out = new_value(features);
    s.saved = plan.frame;
    plan.frame += 2 * s.groups;
  } else {
    return std::string(kKinds[l.kind]) +
           " has no rule in the CUDA kernels, which know linear layers, activations, scaling, "
           "and layer and group norm on vectors";
  }
  in = s.out;
  features = s.outputs;
  return "";
}

}  // namespace

std::string plan_of(const Network& net, Plan& plan) {
  plan = {};
  plan.parameters = net.parameters, plan.constants = net.constants;
  for (int v = 0; v < net.values; v++)
    if (net.value[v].c * net.value[v].h * net.value[v].w > kMaximumElements)
      return "a sample is too large for shared memory";
  Planner planner{net, plan, std::vector<int>(net.slots, -1), 0, 0};
  std::string reason = planner.stretches();
  if (!reason.empty()) return reason;
  const Value& x = net.value[0];
  plan.features = planner.features = int(x.c * x.h * x.w);
  planner.in = planner.new_value(plan.features);
  int value = 0;  // of the network, that the chain has arrived at
  for (int i = 0; i < net.layers; i++) {
    const Layer& l = net.layer[i];
    if (l.in != value || l.second >= 0) return "branches that join have no rule in the CUDA kernels";
    reason = planner.add(l);
    if (!reason.empty()) return reason;
    value = l.out;
  }
  const Value& y = net.value[value];
  plan.outputs = planner.features;
  plan.loss = net.loss.kind;
  if ((plan.loss == kLabels || plan.loss == kSoftLabels) && y.h * y.w > 1)
    return "cross entropy over several positions of a sample has no rule in the CUDA kernels";
  plan.ignore_index = net.loss.ignore_index;
  plan.class_weight = net.loss.class_weight < 0 ? -1 : planner.place[net.loss.class_weight];
  plan.loss_parameter = net.loss.parameter;
  return "";
}

Size size_of(Plan& plan, Mode mode, bool wants_rates, bool first_order, int64_t samples, int number_bytes,
             int64_t available) {
  const bool recurs = mode == kAdjoint || mode == kMeta;
  plan.backward = mode != kPredict;
  plan.dual = (recurs && (!first_order || wants_rates)) || mode == kPullTangent || mode == kScoreTangent;
  plan.keeps_value = plan.dual && recurs && wants_rates;
  auto bytes = [&](int64_t chunk) {
    plan.chunk = int(chunk);
    Memory<float> singles;
    Memory<double> doubles;
    return number_bytes == 4 ? Memory<float>::carve<true>(plan, nullptr, singles)
                             : Memory<double>::carve<true>(plan, nullptr, doubles);
  };
  const int64_t none = bytes(0), each = bytes(1) - none;
  const int64_t fitting = (available - none) / each;
  if (available < none || fitting < 1)
    return {0, 0,
            "a block of threads would need " + std::to_string((none + each + 1023) / 1024) +
                " KiB of shared memory for the parameters and one sample, and the device has " +
                std::to_string(available / 1024)};
  const int64_t chunks = std::max<int64_t>(1, (samples + fitting - 1) / fitting);
  Size size{bytes(std::max<int64_t>(1, (samples + chunks - 1) / chunks)), kWarp, ""};
  for (int i = 0; i < plan.stages; i++) {
    const Stage& s = plan.stage[i];
    const int64_t work =
        std::max<int64_t>(int64_t(plan.chunk) * std::max(s.inputs, s.outputs), int64_t(s.inputs) * s.outputs);
    size.threads =
        int(std::max<int64_t>(size.threads, std::min<int64_t>(kThreads, (work / 4 + kWarp - 1) / kWarp * kWarp)));
  }
  return size;
}

std::string misfit_of(const Network& net, int number_bytes, int64_t available) {
  Plan plan;
  const std::string reason = plan_of(net, plan);
  return reason.empty() ? size_of(plan, kMeta, true, false, 1, number_bytes, available).misfit : reason;
}

}  // namespace maml_ext::cuda
