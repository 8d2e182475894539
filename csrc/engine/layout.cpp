// Where the values and parameters of a network lie, and by which algorithm each contraction is computed.
#include <algorithm>
#include <limits>

#include "builder.h"

namespace maml_ext::engine {

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
  for (Slot& s : slots)
    s.narrow = s.kind == kFilter && s.taps * s.groups == 1 && s.outputs <= network.lanes / 4;
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
  std::vector<Layer*> producer(values.size());
  for (Layer& l : layers) {
    producer[l.out] = &l;
    Layer* before = producer[l.in];
    if (l.linear && home[l.in] >= 0 && readers[l.in] == 1 && before->activation == kRelu)
      l.gates = before->gated = true;
    const bool scales = l.activation == kRelu || (l.activation == kLeakyRelu && l.a >= 0);
    const Value &in = values[l.in], &out = values[l.out];
    if (l.kind != kBlock || l.statistics != kNoStatistics || l.pooled || !scales || !before ||
        before->kind != kContract || readers[l.in] > 1 || in.halo_h != out.halo_h || in.halo_w != out.halo_w)
      continue;
    home[l.out] = l.in;
    values[l.in].spent = false;
    if (before->linear && !slots[before->weight].narrow && l.activation == kRelu)
      before->rectifies = l.rectified = true;
  }
  int64_t at = 0;
  for (size_t v = 0; v < values.size(); v++) {
    Value& value = values[v];
    if (!used[v]) continue;
    value.pitch = v == 0 && scalar_input ? value.c * network.abreast : round_up(value.c);
    value.row = times(value.pitch, value.w + 2 * value.halo_w);
    value.image = times(value.row, value.h + 2 * value.halo_h);
    value.origin = value.halo_h * value.row + value.halo_w * value.pitch;
    value.image = whole_vectors(value.image);
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
    s.row = (s.narrow ? s.inputs : s.outputs) * network.abreast;
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
    } else if (l.kind == kContract && !l.linear) {
      network.frame_saved_sample += round_up(values[l.out].c);  // sums of the bias gradient
    }
    times(transposed, 1), times(network.frame_saved, 1), times(network.frame_saved_sample, 1);
  }
  network.adapted = adapted, network.fixed = fixed, network.transposed = transposed;
}

// Two tasks abreast fill vectors that the channels of one leave partly empty: worth while where that saves a tenth of
// them, for linear layers and what works on single elements, with filters that lie in the cache beside each other.
bool Builder::gains_from_pairs() const {
  constexpr int64_t kFilter = 6144;  // elements: 24 KB
  int64_t alone = 0, abreast = 0;
  for (const Layer& l : layers) {
    const bool on_elements = l.kind == kCombine || (l.kind == kBlock && l.statistics == kNoStatistics && !l.pooled);
    if (on_elements) continue;
    if (!l.linear) return false;
    auto count = [&](int64_t rows, int64_t columns) {
      alone += 2 * rows * whole_vectors(columns), abreast += rows * whole_vectors(2 * columns);
      return rows * whole_vectors(2 * columns) <= kFilter;
    };
    const int64_t in = values[l.in].c, out = values[l.out].c;
    if (!count(in, out) || !count(out, in)) return false;
  }
  return !network.input_active && 10 * abreast < 9 * alone;
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

}  // namespace maml_ext::engine
