#include "program.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace maml_ext::engine {
namespace {

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

int64_t times(int64_t a, int64_t b) {
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

  std::map<std::tuple<bool, int64_t>, int> slot_at;

  int64_t round_up(int64_t n) const { return (n + network.lanes - 1) / network.lanes * network.lanes; }
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
  void finish();
};

int Builder::slot(int64_t reference, SlotKind kind, int64_t taps, int64_t inputs, int64_t outputs, int64_t groups,
                  int64_t height, int64_t width, const char* what) {
  if (reference == -1) return -1;
  Slot s{kind, reference < 0, reference < 0 ? -(reference + 2) : reference,
         taps, inputs, outputs, groups, height, width, false, false, outputs, 0, 0, -1};
  const int64_t extent = kind == kFilter     ? times(times(taps, inputs / groups), outputs)
                         : kind == kChannels ? outputs
                                             : times(times(height, width), outputs);
  const int64_t limit = s.fixed ? network.constants : network.parameters;
  require(s.source >= 0 && s.source <= limit && extent <= limit - s.source, what, " of ", extent, " elements at ",
          s.source, " does not lie within the ", limit, s.fixed ? " constants" : " parameters");
  auto [known, added] = slot_at.emplace(std::make_tuple(s.fixed, s.source), int(slots.size()));
  if (!added) {
    const Slot& o = slots[known->second];
    require(o.kind == kind && o.taps == taps && o.inputs == inputs && o.outputs == outputs && o.groups == groups &&
                o.height == height && o.width == width,
            what, " at ", s.source, " is read as two different shapes");
    return known->second;
  }
  s.extent = extent;
  slots.push_back(s);
  return int(slots.size()) - 1;
}

void Builder::parse_layer(const int64_t* p, const double* numbers) {
  Layer l{};
  const int64_t* a = p + 3;
  const int index = int(layers.size());
  auto value = [&](int64_t v) {
    require(v >= 0 && v <= index, "layer ", index, ": expected a value from 0 to ", index, ", got ", v);
    return int(v);
  };
  auto within = [&](const char* name, int64_t v, int64_t low, int64_t high) {
    require(v >= low && v <= high, "layer ", index, ": ", name, ": expected ", low, " to ", high, ", got ", v);
    return v;
  };
  constexpr int64_t kSize = std::numeric_limits<int32_t>::max();
  l.kind = Kind(within("kind", p[0], 0, kSoftmax));
  l.in = value(p[1]);
  l.second = p[2] == -1 ? -1 : value(p[2]);
  require(l.second == -1 || l.kind == kCombine, "layer ", index, ": has a second input, only kind 6 takes one");
  l.out = index + 1;
  l.a = numbers[0];
  l.b = numbers[1];
  l.weight = l.bias = l.mean = l.variance = -1;
  l.statistics = kNoStatistics;
  l.activation = kIdentity;
  const Value in = values[l.in];
  Value out = in;
  switch (l.kind) {
    case kContract: {
      out.c = within("outputs", a[0], 1, kSize);
      l.kh = within("kernel", a[1], 1, kSize), l.kw = within("kernel", a[2], 1, kSize);
      l.sh = within("stride", a[3], 1, kSize), l.sw = within("stride", a[4], 1, kSize);
      for (int i = 5; i < 9; i++) within("padding", a[i], 0, kSize);
      l.top = a[5], l.left = a[7];
      l.dh = within("dilation", a[9], 1, kSize), l.dw = within("dilation", a[10], 1, kSize);
      l.groups = within("groups", a[11], 1, kSize);
      require(in.c % l.groups == 0 && out.c % l.groups == 0, "layer ", index, ": ", l.groups,
              " groups do not divide the channels");
      const int64_t high = in.h + a[5] + a[6] - times(l.kh - 1, l.dh) - 1;
      const int64_t wide = in.w + a[7] + a[8] - times(l.kw - 1, l.dw) - 1;
      require(high >= 0 && wide >= 0, "layer ", index, ": the kernel is larger than the padded input");
      out.h = high / l.sh + 1, out.w = wide / l.sw + 1;
      l.weight = slot(a[12], kFilter, times(l.kh, l.kw), in.c, out.c, l.groups, 1, 1, "weight");
      require(l.weight >= 0, "layer ", index, ": has no weight");
      l.bias = slot(a[13], kChannels, 1, 1, out.c, 1, 1, 1, "bias");
      break;
    }
    case kNorm: {
      l.statistics = Statistics(within("statistics", a[0], 0, 2));
      l.groups = l.statistics == kSample ? within("groups", a[1], 1, in.c) : 1;
      require(in.c % l.groups == 0, "layer ", index, ": ", l.groups, " groups do not divide ", in.c, " channels");
      const bool elements = within("affine", a[2], 0, 1) == 1;
      require(!elements || l.statistics == kSample, "layer ", index, ": per-element weights need statistics 2");
      const SlotKind kind = elements ? kElements : kChannels;
      const int64_t h = elements ? in.h : 1, w = elements ? in.w : 1;
      l.weight = slot(a[3], kind, 1, 1, in.c, 1, h, w, "weight");
      l.bias = slot(a[4], kind, 1, 1, in.c, 1, h, w, "bias");
      if (l.statistics == kFixed) {
        require(a[5] <= -2 && a[6] <= -2, "layer ", index, ": fixed statistics must be constants");
        l.mean = slot(a[5], kChannels, 1, 1, in.c, 1, 1, 1, "mean");
        l.variance = slot(a[6], kChannels, 1, 1, in.c, 1, 1, 1, "variance");
      }
      l.eps = l.a;
      network.batch_statistics |= l.statistics == kBatch;
      break;
    }
    case kActivation:
      l.activation = Activation(within("activation", a[0], 0, kSin));
      break;
    case kPool:
      l.average = within("kind of pooling", a[0], 0, 1) == 1;
      l.kh = within("kernel", a[1], 1, kSize), l.kw = within("kernel", a[2], 1, kSize);
      l.sh = within("stride", a[3], 1, kSize), l.sw = within("stride", a[4], 1, kSize);
      l.top = within("padding", a[5], 0, l.kh / 2), l.left = within("padding", a[6], 0, l.kw / 2);
      l.dh = within("dilation", a[7], 1, kSize), l.dw = within("dilation", a[8], 1, kSize);
      out.h = within("height", a[9], 1, in.h + l.top), out.w = within("width", a[10], 1, in.w + l.left);
      l.count_padding = a[11] != 0;
      l.divisor = within("divisor", a[12], 0, kSize);
      require(times(out.h - 1, l.sh) < in.h + l.top && times(out.w - 1, l.sw) < in.w + l.left, "layer ", index,
              ": a window begins behind the input");
      require(times(l.kh, l.dh) <= kSize && times(l.kw, l.dw) <= kSize, "layer ", index, ": the kernel is too large");
      break;
    case kAverage:
      out.h = within("height", a[0], 1, kSize), out.w = within("width", a[1], 1, kSize);
      break;
    case kReshape:
      out.c = within("channels", a[0], 1, kMaximum);
      out.h = within("height", a[1], 1, kSize), out.w = within("width", a[2], 1, kSize);
      require(times(times(out.c, out.h), out.w) == times(times(in.c, in.h), in.w), "layer ", index,
              ": the shapes differ in size");
      break;
    case kCombine: {
      l.multiply = within("operation", a[0], 0, 1) == 1;
      require(l.second >= 0 || !l.multiply, "layer ", index, ": a product needs two inputs");
      if (l.second >= 0) {
        const Value& o = values[l.second];
        require(o.c == in.c && o.h == in.h && o.w == in.w, "layer ", index, ": the inputs differ in shape");
      }
      break;
    }
    case kSoftmax:
      l.logarithm = a[0] != 0;
      break;
    default:
      break;
  }
  times(times(round_up(out.c), out.h + 2), out.w + 2);
  layers.push_back(l);
  values.push_back(Value{out.c, out.h, out.w});
}

void Builder::parse_loss(const int64_t* p, const double* numbers) {
  Loss& loss = network.loss;
  require(p[3] >= 0 && p[3] <= 3, "precision: expected 0 to 3, got ", p[3]);
  require(p[0] >= kNoLoss && p[0] <= kBinary, "loss: expected -1 to ", int(kBinary), ", got ", p[0]);
  loss = {LossKind(p[0]), p[1], -1, numbers[0]};
  if (loss.kind == kLabels || loss.kind == kSoftLabels) {
    require(p[2] < 0, "class weights must be constants");
    loss.class_weight = slot(p[2], kChannels, 1, 1, values.back().c, 1, 1, 1, "class weights");
  }
}

// Layers the prediction does not depend on are dropped, and what only they read: nobody would set their gradient.
void Builder::keep_live() {
  std::vector<bool> live(values.size());
  live.back() = true;
  for (auto l = layers.rbegin(); l != layers.rend(); ++l)
    if (live[l->out]) {
      live[l->in] = true;
      if (l->second >= 0) live[l->second] = true;
    }
  layers.erase(std::remove_if(layers.begin(), layers.end(), [&](const Layer& l) { return !live[l.out]; }),
               layers.end());
  std::vector<int> moved(slots.size(), -1);
  std::vector<Slot> read;
  auto keep = [&](int& slot) {
    if (slot < 0) return;
    if (moved[slot] < 0) {
      moved[slot] = int(read.size());
      read.push_back(slots[slot]);
    }
    slot = moved[slot];
  };
  for (Layer& l : layers)
    for (int* slot : {&l.weight, &l.bias, &l.mean, &l.variance}) keep(*slot);
  keep(network.loss.class_weight);
  slots = read;
}

// Norm, activation and pooling without overlap become one block, which passes over the data once.
void Builder::fuse() {
  std::vector<std::vector<int>> readers(values.size());
  for (size_t i = 0; i < layers.size(); i++) {
    readers[layers[i].in].push_back(int(i));
    if (layers[i].second >= 0) readers[layers[i].second].push_back(int(i));
  }
  auto simple_pool = [&](const Layer& l) {
    const Value &in = values[l.in], &out = values[l.out];
    return l.kind == kPool && !l.top && !l.left && l.dh == 1 && l.dw == 1 && l.sh >= l.kh && l.sw >= l.kw &&
           (out.h - 1) * l.sh + l.kh <= in.h && (out.w - 1) * l.sw + l.kw <= in.w;
  };
  auto joins = [&](const Layer& l) {
    return l.kind == kNorm ? l.statistics != kSample : l.kind == kActivation || simple_pool(l);
  };
  std::vector<bool> absorbed(layers.size());
  for (size_t i = 0; i < layers.size(); i++) {
    if (absorbed[i] || !joins(layers[i])) continue;
    Layer& block = layers[i];
    block.pooled = block.kind == kPool;
    bool active = block.kind != kNorm;  // an activation comes before the pooling, once
    block.kind = kBlock;
    while (!block.pooled && readers[block.out].size() == 1) {
      const int next = readers[block.out][0];
      const Layer& l = layers[next];
      if (l.kind == kActivation && !active) {
        block.activation = l.activation;
        block.a = l.a, block.b = l.b;
        active = true;
      } else if (simple_pool(l)) {
        block.pooled = true;
        block.average = l.average, block.divisor = l.divisor;
        block.kh = l.kh, block.kw = l.kw, block.sh = l.sh, block.sw = l.sw;
      } else {
        break;
      }
      block.out = l.out;
      absorbed[next] = true;
    }
    if (!block.pooled) block.kh = block.kw = block.sh = block.sw = 1;
    if (block.divisor == 0) block.divisor = block.kh * block.kw;
  }
  std::vector<Layer> kept;
  for (size_t i = 0; i < layers.size(); i++)
    if (!absorbed[i]) kept.push_back(layers[i]);
  layers = kept;
}

// Which values have tangents and gradients, and who writes first where several add up.
void Builder::mark() {
  needs_gradient.reset(new bool[values.size()]());
  has_tangent.reset(new bool[values.size()]());
  has_tangent[0] = network.input_active;
  auto adapted = [&](int slot) { return slot >= 0 && !slots[slot].fixed; };
  for (const Layer& l : layers)
    has_tangent[l.out] = has_tangent[l.in] || (l.second >= 0 && has_tangent[l.second]) || adapted(l.weight) ||
                         adapted(l.bias);
  // A gradient is needed exactly where there can be a tangent: where the past depends on what is adapted.
  std::copy_n(has_tangent.get(), values.size(), needs_gradient.get());
  std::vector<bool> value_written(values.size()), slot_written(slots.size());
  auto first = [](std::vector<bool>& written, int i) {
    const bool before = i >= 0 && written[i];
    if (i >= 0) written[i] = true;
    return !before;
  };
  for (auto l = layers.rbegin(); l != layers.rend(); ++l) {
    if (l->second >= 0) l->accumulate[1] = !first(value_written, l->second);
    l->accumulate[0] = !first(value_written, l->in);
    l->writes_bias = first(slot_written, l->bias);  // before the weight, which may be the same
    l->writes_weight = first(slot_written, l->weight);
  }
  for (size_t i = 0; i < slots.size(); i++)
    for (size_t j = 0; j < i; j++) {
      const Slot &a = slots[i], &b = slots[j];
      require(a.fixed || b.fixed || a.source + a.extent <= b.source || b.source + b.extent <= a.source,
              "two parameters overlap at ", std::max(a.source, b.source));
    }
}

// How a contraction is computed, by its shape. Winograd's algorithm for 3x3 convolutions (cpu/engine/winograd.h): where
// it saves at least a third of the multiplications, which tiles over the edge of small images may eat up, and where
// channels are so many that products outweigh transforms and so few that the filters at 16 points are not too large.
// Few rows: the gradients of a first layer's parameters, together with the block that is alone in reading its output.
void Builder::choose_algorithm(Layer& l) {
  const Value &in = values[l.in], &out = values[l.out];
  const int64_t tiles = (out.h + 1) / 2 * ((out.w + 1) / 2);
  l.winograd = l.kh == 3 && l.kw == 3 && l.sh == 1 && l.sw == 1 && l.dh == 1 && l.dw == 1 && l.groups == 1 &&
               l.top <= 2 && l.left <= 2 && 3 * 16 * tiles <= 2 * 9 * out.h * out.w && std::min(in.c, out.c) >= 16 &&
               in.c * out.c <= 512 * 512;
  const Slot& weight = slots[l.weight];
  l.few_rows = !l.winograd && !needs_gradient[l.in] && !weight.fixed && l.groups == 1 && weight.taps > 1 &&
               weight.taps * in.c <= 48 && round_up(out.c) <= 4 * network.lanes && out.h * out.w >= 96;
  l.writer = -1;
  if (l.few_rows) {
    l.slices = 8;
    network.scratch = std::max(network.scratch, l.slices * (weight.taps * in.c + 1) * round_up(out.c));
    int readers = 0, block = -1;
    for (size_t i = 0; i < layers.size(); i++)
      if (layers[i].in == l.out || layers[i].second == l.out) readers++, block = int(i);
    const bool deferred = readers == 1 && layers[block].kind == kBlock && l.out != layers.back().out &&
                          (layers[block].pooled || layers[block].statistics != kNoStatistics);
    if (deferred) l.writer = block, layers[block].deferred = true;
  }
  if (!l.winograd) return;
  auto at_points = [&](int64_t inputs, int64_t outputs) { return 16 * (inputs * round_up(outputs) + network.lanes); };
  const int64_t filter = at_points(in.c, out.c);
  l.slices = std::clamp<int64_t>((1 << 20) / filter, 1, 8);
  network.scratch = std::max({network.scratch, 2 * filter, 2 * at_points(out.c, in.c), l.slices * filter});
}

void Builder::lay_out() {
  for (Slot& s : slots) s.narrow = s.kind == kFilter && s.taps * s.groups == 1 && s.outputs <= network.lanes / 4;
  for (const Layer& l : layers)
    if (l.kind == kContract) {
      const Value &in = values[l.in], &out = values[l.out];
      if (in.h * in.w * out.h * out.w > 1 || l.top || l.left) slots[l.weight].narrow = false;
    }
  std::vector<int> slot_readers(slots.size());
  for (const Layer& l : layers)
    for (const int s : {l.weight, l.bias})
      if (s >= 0) slot_readers[s]++;
  for (Layer& l : layers) {
    l.linear = l.kind == kContract && slots[l.weight].taps * slots[l.weight].groups == 1 &&
               values[l.in].h * values[l.in].w * values[l.out].h * values[l.out].w == 1 && !l.top && !l.left;
    for (const int s : {l.weight, l.bias})
      if (s >= 0) slots[s].stepped = l.linear && !slots[s].fixed && slot_readers[s] == 1;
  }
  const int last = layers.empty() ? 0 : layers.back().out;
  std::vector<bool> used(values.size());
  used[0] = used[last] = true;
  bool scalar_input = !network.input_active && !layers.empty();
  for (Layer& l : layers) {
    used[l.in] = used[l.out] = true;
    if (l.second >= 0) used[l.second] = true;
    if (l.kind == kContract) choose_algorithm(l);
    const bool broadcasts = l.kind == kContract && !slots[l.weight].narrow && !l.winograd;  // the elements of its input
    if (!broadcasts && (l.in == 0 || l.second == 0)) scalar_input = false;
    if (l.kind != kContract) continue;
    Value &in = values[l.in], &out = values[l.out];
    auto widen = [](int64_t& halo, int64_t by) { halo = std::max(halo, by); };
    widen(in.halo_h, std::max(l.top, (out.h - 1) * l.sh + (l.kh - 1) * l.dh - l.top - (in.h - 1)));
    widen(in.halo_w, std::max(l.left, (out.w - 1) * l.sw + (l.kw - 1) * l.dw - l.left - (in.w - 1)));
    auto even = [](int64_t n) { return (n + 1) / 2 * 2; };
    if (l.winograd) {  // the last tile's
      widen(in.halo_h, even(out.h) + 1 - l.top - (in.h - 1)), widen(in.halo_w, even(out.w) + 1 - l.left - (in.w - 1));
      widen(out.halo_h, even(out.h) - out.h), widen(out.halo_w, even(out.w) - out.w);
    }
    if (!needs_gradient[l.in]) continue;
    if (l.winograd) {
      widen(out.halo_h, even(in.h) - 1 + l.top - (out.h - 1));
      widen(out.halo_w, even(in.w) - 1 + l.left - (out.w - 1));
    }
    // The positions of out that the gradient at in reads: from that of row 0 through the last tap, on.
    widen(out.halo_h, ((l.kh - 1) * l.dh - l.top + l.sh - 1) / l.sh);
    widen(out.halo_w, ((l.kw - 1) * l.dw - l.left + l.sw - 1) / l.sw);
    widen(out.halo_h, (in.h - 1 + l.top) / l.sh - (out.h - 1));
    widen(out.halo_w, (in.w - 1 + l.left) / l.sw - (out.w - 1));
  }
  // A block writes the gradient at its input where it has just read the input, and a contraction does not look at
  // what it has put out.
  for (const Layer& l : layers)
    if (l.kind == kContract) values[l.out].spent = l.out != last;
  std::vector<int> readers(values.size());
  for (const Layer& l : layers)
    for (const int v : {l.in, l.second})
      if (v >= 0 && (++readers[v] > 1 || l.kind != kBlock)) values[v].spent = false;
  // An activation that only scales, by the sign of its input, works in place: the sign of its output is the same.
  std::vector<int> home(values.size(), -1);
  std::vector<bool> contracted(values.size());
  for (const Layer& l : layers) {
    contracted[l.out] = l.kind == kContract;
    const bool scales = l.activation == kRelu || (l.activation == kLeakyRelu && l.a >= 0);
    const Value &in = values[l.in], &out = values[l.out];
    if (l.kind != kBlock || l.statistics != kNoStatistics || l.pooled || !scales || !contracted[l.in] ||
        readers[l.in] > 1 || in.halo_h != out.halo_h || in.halo_w != out.halo_w)
      continue;
    home[l.out] = l.in;
    values[l.in].spent = false;
  }
  int64_t at = 0;
  for (size_t v = 0; v < values.size(); v++) {
    Value& value = values[v];
    if (!used[v]) continue;
    value.pitch = v == 0 && scalar_input ? value.c : round_up(value.c);
    value.row = times(value.pitch, value.w + 2 * value.halo_w);
    value.image = times(value.row, value.h + 2 * value.halo_h);
    value.origin = value.halo_h * value.row + value.halo_w * value.pitch;
    value.image = round_up(value.image);
    value.at = home[v] < 0 ? at : values[home[v]].at;
    if (home[v] < 0) at += value.image;
    times(at, 1);
    require(value.image < std::numeric_limits<int32_t>::max() / 256, "a sample is too large");
  }
  network.frame_sample = at;
  int64_t gradient_at = 0;
  for (const bool spent : {false, true}) {
    for (size_t v = 0; v < values.size(); v++)
      if (used[v] && values[v].spent == spent) {
        values[v].gradient_at = home[v] < 0 ? gradient_at : values[home[v]].gradient_at;
        if (home[v] < 0) gradient_at += values[v].image;
      }
    if (!spent) network.frame_unspent = gradient_at;
  }

  int64_t adapted = 0, fixed = 0, transposed = 0;
  for (Slot& s : slots) {
    int64_t& end = s.fixed ? fixed : adapted;
    s.at = end;
    s.row = s.narrow ? s.inputs : s.outputs;
    s.extent = s.narrow              ? times(s.outputs, round_up(s.inputs))
               : s.kind == kFilter   ? times(times(s.taps, s.inputs), round_up(s.outputs))
               : s.kind == kChannels ? round_up(s.outputs)
                                     : times(times(s.height, s.width), round_up(s.outputs));
    end += s.extent;
    times(end, 1);
  }
  for (Layer& l : layers) {
    if (l.kind == kContract && needs_gradient[l.in] && !slots[l.weight].narrow && slots[l.weight].transposed < 0) {
      Slot& s = slots[l.weight];
      s.transposed = transposed;
      transposed += times(times(s.taps, s.outputs), round_up(s.inputs));
    }
    const int64_t pitch = round_up(values[l.in].c);
    l.saved = network.frame_saved, l.saved_sample = network.frame_saved_sample;
    if (l.kind == kBlock && l.statistics != kNoStatistics) {
      network.frame_saved += 4 * pitch;
      network.frame_saved_sample += kHalves * 2 * pitch;
    } else if (l.kind == kNorm) {
      network.frame_saved_sample += 4 * round_up(l.groups) + 2 * pitch;
    } else if (l.kind == kContract) {
      network.frame_saved_sample += round_up(values[l.out].c);  // sums of the bias gradient
    }
    times(transposed, 1), times(network.frame_saved, 1), times(network.frame_saved_sample, 1);
  }
  network.adapted = adapted, network.fixed = fixed, network.transposed = transposed;
}

// The tables of a contraction: offsets of positions and taps, and for the input gradient one set of them for each
// phase of the stride (the positions of the input that the same taps reach).
void Builder::tabulate(Layer& l) {
  const Value &in = values[l.in], &out = values[l.out];
  const Slot& weight = slots[l.weight];
  const int64_t positions = std::max(in.h * in.w, out.h * out.w);
  l.group = positions >= 96 ? 1 : std::min<int64_t>(128 / positions, 64);
  auto keep32 = [&](std::vector<int32_t> v) { return tables.emplace_back(std::move(v)).data(); };
  auto keep64 = [&](std::vector<int64_t> v) { return taps.emplace_back(std::move(v)).data(); };

  std::vector<int32_t> result, operand, filter;
  std::vector<int64_t> tap_operand, tap_filter;
  for (int64_t n = 0; n < l.group; n++)
    for (int64_t y = 0; y < out.h; y++)
      for (int64_t x = 0; x < out.w; x++) {
        result.push_back(int32_t(n * out.image + y * out.row + x * out.pitch));
        operand.push_back(int32_t(n * in.image + y * l.sh * in.row + x * l.sw * in.pitch));
      }
  for (int64_t y = 0; y < l.kh; y++)
    for (int64_t x = 0; x < l.kw; x++) {
      tap_operand.push_back((y * l.dh - l.top) * in.row + (x * l.dw - l.left) * in.pitch);
      tap_filter.push_back((y * l.kw + x) * weight.inputs * round_up(weight.outputs));
      for (int64_t c = 0; c < in.c; c++) filter.push_back(int32_t(tap_operand.back() + c));
    }
  const int64_t count = int64_t(result.size()) / l.group, all = int64_t(tap_operand.size());
  rows.push_back({Rows{count, keep32(result), keep32(operand), all, keep64(tap_operand), keep64(tap_filter)}});
  l.forward = rows.back().data();
  l.filter_rows = keep32(filter);
  network.work += times(count, times(all, times(in.c, out.c)));
  if (!needs_gradient[l.in]) return;

  // The taps that reach each phase, along each axis.
  auto reaching = [](int64_t phases, int64_t stride, int64_t kernel, int64_t dilation, int64_t before) {
    std::vector<std::vector<int64_t>> found(phases);
    for (int64_t i = 0; i < kernel; i++) {
      const int64_t phase = ((i * dilation - before) % stride + stride) % stride;
      if (phase < phases) found[phase].push_back(i);
    }
    return found;
  };
  const auto taps_y = reaching(std::min(l.sh, in.h), l.sh, l.kh, l.dh, l.top);
  const auto taps_x = reaching(std::min(l.sw, in.w), l.sw, l.kw, l.dw, l.left);
  std::vector<Rows> phases;
  for (int64_t py = 0; py < int64_t(taps_y.size()); py++)
    for (int64_t px = 0; px < int64_t(taps_x.size()); px++) {
      result.clear(), operand.clear(), tap_operand.clear(), tap_filter.clear();
      for (int64_t n = 0; n < l.group; n++)
        for (int64_t y = py; y < in.h; y += l.sh)
          for (int64_t x = px; x < in.w; x += l.sw) {
            result.push_back(int32_t(n * in.image + y * in.row + x * in.pitch));
            operand.push_back(int32_t(n * out.image + y / l.sh * out.row + x / l.sw * out.pitch));
          }
      for (const int64_t y : taps_y[py])
        for (const int64_t x : taps_x[px]) {
          const int64_t dy = py + l.top - y * l.dh, dx = px + l.left - x * l.dw;
          tap_operand.push_back(dy / l.sh * out.row + dx / l.sw * out.pitch);
          tap_filter.push_back((y * l.kw + x) * weight.outputs * round_up(weight.inputs));
        }
      phases.push_back({int64_t(result.size()) / l.group, keep32(result), keep32(operand),
                        int64_t(tap_operand.size()), keep64(tap_operand), keep64(tap_filter)});
    }
  l.phases = int64_t(phases.size());
  l.backward = rows.emplace_back(std::move(phases)).data();
}

void Builder::parse(const std::vector<int64_t>& program, const std::vector<double>& numbers) {
  require(program.size() >= size_t(kHeaderInts + kLossInts), "expected at least ", kHeaderInts + kLossInts,
          " integers, got ", program.size());
  require(program[0] == 1, "expected version 1, got ", program[0]);
  for (int i = 1; i < kHeaderInts; i++)
    require(program[i] >= (i < 3 || i == 6 ? 0 : 1) && program[i] <= kMaximum, "header ", i, ": got ", program[i]);
  network.parameters = program[1], network.constants = program[2];
  const int64_t count = program[6];
  require(count <= 4096 && int64_t(program.size()) == kHeaderInts + count * kLayerInts + kLossInts, "expected ",
          kHeaderInts + kLossInts, " integers and ", kLayerInts, " for each of ", count, " layers, got ",
          program.size());
  require(int64_t(numbers.size()) == 2 * count + 2, "expected ", 2 * count + 2, " numbers, got ", numbers.size());
  values.push_back(Value{program[3], program[4], program[5]});
  times(times(round_up(program[3]), program[4] + 2), program[5] + 2);
  for (int64_t i = 0; i < count; i++) parse_layer(&program[kHeaderInts + i * kLayerInts], &numbers[2 * i]);
  parse_loss(&program[kHeaderInts + count * kLayerInts], &numbers[2 * count]);
}

void Builder::finish() {
  for (Layer& l : layers)
    if (l.kind == kContract) tabulate(l);
  network.layers = int(layers.size()), network.values = int(values.size()), network.slots = int(slots.size());
  network.layer = layers.data(), network.value = values.data(), network.slot = slots.data();
  network.needs_gradient = needs_gradient.get(), network.has_tangent = has_tangent.get();
}

std::shared_ptr<const Network> build(const std::vector<int64_t>& program, const std::vector<double>& numbers,
                                     int64_t lanes, bool input_active) {
  auto builder = std::make_shared<Builder>();
  static std::atomic<int64_t> serial{0};
  builder->network.serial = ++serial;
  builder->network.lanes = lanes;
  builder->network.input_active = input_active;
  builder->parse(program, numbers);
  builder->keep_live();
  builder->fuse();
  builder->mark();
  builder->lay_out();
  builder->finish();
  return std::shared_ptr<const Network>(builder, &builder->network);
}

struct Known {
  std::vector<int64_t> program;
  std::vector<double> numbers;
  int64_t lanes;
  bool input_active;
  std::shared_ptr<const Network> network;
};

}  // namespace

std::shared_ptr<const Network> network_of(const std::vector<int64_t>& program, const std::vector<double>& numbers,
                                          int64_t lanes, bool input_active) {
  static std::mutex mutex;
  static std::list<Known> known;  // the most recent first
  constexpr size_t kRemembered = 32;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto k = known.begin(); k != known.end(); ++k)
    if (k->lanes == lanes && k->input_active == input_active && k->program == program && k->numbers == numbers) {
      known.splice(known.begin(), known, k);
      return known.front().network;
    }
  known.push_front({program, numbers, lanes, input_active, build(program, numbers, lanes, input_active)});
  if (known.size() > kRemembered) known.pop_back();
  return known.front().network;
}

}  // namespace maml_ext::engine
