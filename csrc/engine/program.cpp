#include "program.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <list>
#include <mutex>

#include "builder.h"

namespace maml_ext::engine {

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
  network.pairs = pairs.get();
}

namespace {

std::shared_ptr<const Network> build(const std::vector<int64_t>& program, const std::vector<double>& numbers,
                                     int64_t lanes, bool input_active, int64_t abreast, bool pairs) {
  auto builder = std::make_shared<Builder>();
  static std::atomic<int64_t> serial{0};
  builder->network.serial = ++serial;
  builder->network.lanes = lanes;
  builder->network.abreast = abreast;
  builder->network.input_active = input_active;
  builder->parse(program, numbers);
  builder->keep_live();
  builder->fuse();
  builder->mark();
  builder->lay_out();
  if (pairs && builder->gains_from_pairs())
    builder->pairs = build(program, numbers, lanes, input_active, 2, false);
  builder->finish();
  return std::shared_ptr<const Network>(builder, &builder->network);
}

struct Known {
  std::vector<int64_t> program;
  std::vector<double> numbers;
  int64_t lanes;
  bool input_active, pairs;
  std::shared_ptr<const Network> network;
};

}  // namespace

std::shared_ptr<const Network> network_of(const std::vector<int64_t>& program, const std::vector<double>& numbers,
                                          int64_t lanes, bool input_active, bool pairs) {
  static std::mutex mutex;
  static std::list<Known> known;  // the most recent first
  constexpr size_t kRemembered = 32;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto k = known.begin(); k != known.end(); ++k)
    if (k->lanes == lanes && k->input_active == input_active && k->pairs == pairs && k->program == program &&
        k->numbers == numbers) {
      known.splice(known.begin(), known, k);
      return known.front().network;
    }
  known.push_front({program, numbers, lanes, input_active, pairs, build(program, numbers, lanes, input_active, 1, pairs)});
  if (known.size() > kRemembered) known.pop_back();
  return known.front().network;
}

}  // namespace maml_ext::engine
