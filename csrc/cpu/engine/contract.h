// Linear layers and convolutions: out = filter * in + bias. Bilinear, so that all four rules are sums of products:
//   forward           out   = W in + b
//   backward          in^   = W^T out^          W^  = out^ in           b^ = sum of out^
//   tangent_forward   out'  = W in' + W' in + b'
//   tangent_backward  in^'  = W^T out^' + W'^T out^   W^' = out^' in + out^ in'   b^' = sum of out^'
// where ^ is a gradient and ' a tangent. A filter is read once for each block of positions, the data once for each
// block of channels.

template <class T, int A>
struct Linear;  // linear.h: the same on vectors, of A tasks abreast

template <class T>
struct Contract {
  typedef maml_ext::engine::Term<T> Term;

  static constexpr int64_t kTile = 120;  // positions

  // At the positions of `rows` of every sample: result (+)= bias + sum of terms.
  static void positions(const Context<T>& c, int64_t group, const Rows& rows, const Value& result, T* to,
                        const Value& operand, int64_t channels, const Term* terms, int count, const T* bias,
                        bool accumulate) {
    const int64_t groups = (c.f.count + group - 1) / group;
    const int64_t vectors = result.pitch / kLanes<T>, panels = (vectors + 3) / 4;
    const int64_t in_group = group * rows.count, tiles = (in_group + kTile - 1) / kTile;
    const int64_t work = smaller(in_group, kTile) * smaller<int64_t>(vectors, 4) * kLanes<T> * rows.taps * channels;
    auto part = [&](int64_t first, int64_t tile, int64_t panel) {
      const int64_t all = smaller(group, c.f.count - first) * rows.count;
      const int64_t begin = tile * kTile, end = smaller(begin + kTile, all);
      if (begin < end)
        some_positions(rows, result, to, operand, channels, terms, count, bias, accumulate, first, begin, end,
                       vectors * panel / panels, vectors * (panel + 1) / panels);
    };
    if (groups * tiles * panels == 1) return part(0, 0, 0);
    c.crew.each(groups * tiles * panels, work * count, [&](int64_t i) {
      part(i / panels / tiles * group, i / panels % tiles, i % panels);
    });
  }
  // Rows [begin, end) of those of the group that starts with sample `first`, vectors [from, to_vector).
  static void some_positions(const Rows& rows, const Value& result, T* to, const Value& operand, int64_t channels,
                             const Term* terms, int count, const T* bias, bool accumulate, int64_t first, int64_t begin,
                             int64_t end, int64_t from, int64_t to_vector) {
    constexpr int64_t kCache = 24 * 1024 / sizeof(T);  // elements of filter kept in L1
    Product<T> p;
    p.c = to + first * result.image;
    p.c_rows = rows.result + begin;
    p.a_rows = rows.operand + begin;
    p.rows = end - begin;
    p.a_step = 1;
    p.b_step = result.pitch;
    p.start = bias;
    p.accumulate = accumulate;
    p.segments = count;
    // A part of the filter is used for all rows of the tile while it is in the cache.
    const int64_t width = (to_vector - from) * kLanes<T>, fit = larger<int64_t>(1, kCache / width);
    const bool few = p.rows <= 2 * kBlockRows[4];
    const int64_t deep = few || channels <= fit ? channels : fit;
    const int64_t wide = few ? rows.taps : larger<int64_t>(1, fit / deep);
    int64_t k = 0, tap = 0;
    do {
      p.inner = smaller(deep, channels - k);
      do {
        const int64_t taps = smaller(wide, rows.taps - tap);
        for (int s = 0; s < count; s++)
          p.segment[s] = {terms[s].data + first * operand.image + k, terms[s].filter + k * result.pitch, taps,
                          rows.tap_operand + tap, rows.tap_filter + tap};
        product<T>(p, from, to_vector);
        p.accumulate = true;
        tap += taps;
      } while (tap < rows.taps);
      tap = 0;
      k += p.inner;
    } while (k < channels);
  }

  // to[(tap, input)][output] (+)= sum over terms and positions of data * gradient, at the filter's offsets.
  static void filter(const Context<T>& c, const Layer& l, T* to, const Term* terms, int count, bool accumulate) {
    constexpr int64_t kRows = 48, kLines = 128, kPositions = 128;
    const Value &in = c.in(l), &out = c.out(l);
    const Slot& slot = c.net.slot[l.weight];
    const int64_t rows = slot.taps * slot.inputs, chunks = (rows + kRows - 1) / kRows;
    const int64_t vectors = out.pitch / kLanes<T>, panels = (vectors + 3) / 4;
    const bool vector_data = out.h * out.w == 1;  // then a line is one position of every sample
    const int64_t inner = vector_data ? c.f.count : out.w, lines = vector_data ? 1 : c.f.count * out.h;
    const int64_t at_once = larger<int64_t>(1, smaller<int64_t>(kLines, kPositions / inner));
    c.crew.each(chunks * panels, kRows * out.pitch / panels * inner * lines * count, [&](int64_t i) {
      const int64_t panel = i % panels, chunk = i / panels;
      const int64_t from = vectors * panel / panels, to_vector = vectors * (panel + 1) / panels;
      Product<T> p;
      p.c_rows = nullptr;
      p.c_step = out.pitch;
      p.c = to + chunk * kRows * out.pitch;
      p.a_rows = l.filter_rows + chunk * kRows;
      p.rows = smaller(kRows, rows - chunk * kRows);
      p.inner = inner;
      p.a_step = vector_data ? in.image : l.sw * in.pitch;
      p.b_step = vector_data ? out.image : out.pitch;
      p.start = nullptr;
      p.accumulate = accumulate;
      p.segments = count;
      int64_t tap_a[kLines], tap_b[kLines];
      for (int64_t line = 0; line < lines; line += at_once) {
        const int64_t taps = smaller(at_once, lines - line);
        for (int64_t s = 0; s < taps; s++) {
          const int64_t n = (line + s) / out.h, y = (line + s) % out.h;
          tap_a[s] = n * in.image + y * l.sh * in.row;
          tap_b[s] = n * out.image + y * out.row;
        }
        for (int s = 0; s < count; s++) p.segment[s] = {terms[s].data, terms[s].filter, taps, tap_a, tap_b};
        product<T>(p, from, to_vector);
        p.accumulate = true;
      }
    });
    if (slot.groups > 1) clear_between_groups(slot, to, out.pitch);
  }

  // The same and the gradient of the bias, for first layers, whose filters have few rows and whose outputs are large:
  // all that needs a gradient is computed from where it is read once, straight from the block that writes it. Halves
  // of samples are summed in slices, the slices one after the other.
  static void few_rows(const Context<T>& c, const Layer& l, const Term* terms, int count) {
    constexpr int64_t kPositions = 128;
    if (!c.gradients) return;
    const Value &in = c.in(l), &out = c.out(l);
    const Slot& slot = c.net.slot[l.weight];
    const int64_t rows = slot.taps * slot.inputs, halves = c.f.count * kHalves, slices = smaller(l.slices, halves);
    const int64_t extent = (rows + 1) * out.pitch, at_once = larger<int64_t>(1, kPositions / out.w);
    const Layer* writer = l.writer < 0 ? nullptr : &c.net.layer[l.writer];
    c.crew.each(slices, rows * out.h * out.w * out.pitch * halves / kHalves / slices, [&](int64_t slice) {
      T *sums = c.scratch + slice * extent, *to_bias = sums + rows * out.pitch;
      for (int64_t i = 0; i < extent; i++) sums[i] = 0;
      Product<T> p;
      p.c = sums;
      p.c_rows = nullptr, p.c_step = out.pitch;
      p.a_rows = l.filter_rows;
      p.rows = rows, p.inner = out.w;
      p.a_step = l.sw * in.pitch, p.b_step = out.pitch;
      p.start = nullptr;
      p.accumulate = true;
      p.segments = count;
      for (int64_t half = halves * slice / slices; half < halves * (slice + 1) / slices; half++) {
        if (writer) c.write(c, *writer, half);
        const int64_t n = half / kHalves;
        const int64_t pooled = writer ? c.out(*writer).h : out.h;
        const Lines lines = lines_of(pooled, writer ? writer->sh : 1, out.h, half);
        for (int64_t y = lines.begin; y < lines.end; y += at_once) {
          int64_t tap_a[kPositions], tap_b[kPositions];
          const int64_t taps = smaller(at_once, lines.end - y);
          for (int64_t s = 0; s < taps; s++) {
            tap_a[s] = n * in.image + (y + s) * l.sh * in.row;
            tap_b[s] = n * out.image + (y + s) * out.row;
          }
          for (int s = 0; s < count; s++) p.segment[s] = {terms[s].data, terms[s].filter, taps, tap_a, tap_b};
          product<T>(p, 0, out.pitch / kLanes<T>);
          for (int64_t k = 0; k < out.pitch; k += kLanes<T>)
            for (int64_t s = 0; s < taps; s++) {
              Vec<T> sum{};
              const T* g = terms[0].filter + tap_b[s] + k;
              for (int64_t x = 0; x < out.w; x++) sum += load<T>(g + x * out.pitch);
              put<T>(to_bias + k, sum, true);
            }
        }
      }
    });
    auto total = [&](T* to, int64_t from, int64_t size, bool add) {
      for (int64_t k = 0; k < size; k += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t slice = 0; slice < slices; slice++) sum += load<T>(c.scratch + slice * extent + from + k);
        put<T>(to + k, sum, add);
      }
    };
    if (T* to = c.gradient(l.bias)) total(to, rows * out.pitch, out.pitch, !l.writes_bias);
    total(c.gradient(l.weight), 0, rows * out.pitch, !l.writes_weight);
  }

  // A grouped filter is a full one with zeros between groups, and stays one.
  static void clear_between_groups(const Slot& s, T* filter, int64_t pitch) {
    for (int64_t row = 0; row < s.taps * s.inputs; row++)
      for (int64_t o = 0; o < s.outputs; o++)
        if (row % s.inputs / (s.inputs / s.groups) != o / (s.outputs / s.groups)) filter[row * pitch + o] = 0;
  }

  static void bias(const Context<T>& c, const Layer& l, const Frame<T>& f, T* to) {
    const Value& out = c.out(l);
    T* partial = f.statistics(l);
    const bool vector_data = out.h * out.w == 1;
    if (!vector_data)
      c.crew.each(f.count, out.h * out.w * out.pitch / 8, [&](int64_t n) {
        for (int64_t k = 0; k < out.pitch; k += kLanes<T>) {
          Vec<T> total{};
          for (int64_t y = 0; y < out.h; y++) {
            Vec<T> sum{};
            const T* g = f.gradient(out, n) + y * out.row + k;
            for (int64_t x = 0; x < out.w; x++) sum += load<T>(g + x * out.pitch);
            total += sum;
          }
          store<T>(partial + n * out.pitch + k, total);
        }
      });
    for (int64_t k = 0; k < out.pitch; k += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t n = 0; n < f.count; n++)
        sum += load<T>((vector_data ? f.gradient(out, n) : partial + n * out.pitch) + k);
      put<T>(to + k, sum, !l.writes_bias);
    }
  }

  // Calls f with the rules of linear layers, for as many tasks as are abreast.
  template <class F>
  static INLINE void linear(const Context<T>& c, F f) {
    if constexpr (sizeof(T) == 4)
      if (c.net.abreast == 2) return f(Linear<T, 2>());
    f(Linear<T, 1>());
  }
  // out (+)= bias + sum of terms
  static void to_output(const Context<T>& c, const Layer& l, T* to, const Term* terms, int count, const T* bias) {
    if (l.linear) return linear(c, [&](auto rules) { rules.to_output(c, l, to, terms, count, bias); });
    if (l.winograd && count)
      return Winograd<T>::positions(c, c.out(l), to, c.in(l), c.in(l).c, terms, count, bias, false, l.top, l.left,
                                    false);
    positions(c, l.group, *l.forward, c.out(l), to, c.in(l), c.in(l).c, terms, count, bias, false);
  }
  // The gradients of the parameters: the filter's from the terms, the bias' from those that f holds.
  static void to_parameters(const Context<T>& c, const Layer& l, const Term* terms, int count, const Frame<T>& f) {
    if (l.linear)
      return linear(c, [&](auto rules) { rules.to_parameters(c, l, terms, count, f.gradient(c.out(l))); });
    if (T* to = c.gradient(l.weight))
      (l.winograd ? Winograd<T>::filter : filter)(c, l, to, terms, count, !l.writes_weight);
    if (T* to = c.gradient(l.bias)) bias(c, l, f, to);
  }
  static void to_input(const Context<T>& c, const Layer& l, T* to, const Term* terms, int count) {
    if (l.linear) return linear(c, [&](auto rules) { rules.to_input(c, l, to, terms, count); });
    if (l.winograd)
      return Winograd<T>::positions(c, c.in(l), to, c.out(l), c.out(l).c, terms, count, nullptr, l.accumulate[0],
                                    2 - l.top, 2 - l.left, true);
    for (int64_t i = 0; i < l.phases; i++)
      positions(c, l.group, l.backward[i], c.in(l), to, c.out(l), c.out(l).c, terms, count, nullptr, l.accumulate[0]);
  }

  static void forward(const Context<T>& c, const Layer& l) {
    const Term term{c.f.value(c.in(l)), c.p.slot(c.net, l.weight)};
    if (l.few_rows && l.writer >= 0) {  // half a sample after the other, for the block to measure while it is at hand
      const Value &in = c.in(l), &out = c.out(l);
      const Layer& block = c.net.layer[l.writer];
      c.crew.each(c.f.count * kHalves, out.h * out.w * l.forward->taps * in.c * out.pitch / kHalves, [&](int64_t half) {
        const Lines lines = lines_of(c.out(block).h, block.sh, out.h, half);
        const int64_t last = lines.end * out.w;
        for (int64_t begin = lines.begin * out.w; begin < last; begin += kTile)
          some_positions(*l.forward, out, c.f.value(out), in, in.c, &term, 1, c.p.slot(c.net, l.bias), false,
                         half / kHalves, begin, smaller(begin + kTile, last), 0, out.pitch / kLanes<T>);
        c.write(c, block, half);
      });
      return;
    }
    to_output(c, l, c.f.value(c.out(l)), &term, 1, c.p.slot(c.net, l.bias));
  }

  static void backward(const Context<T>& c, const Layer& l) {
    const T* g = c.f.gradient(c.out(l));
    const Term data{c.f.value(c.in(l)), g};
    if (l.few_rows) return few_rows(c, l, &data, 1);
    to_parameters(c, l, &data, 1, c.f);
    if (c.net.needs_gradient[l.in]) {
      const Term term{g, c.p.flipped(c.net.slot[l.weight])};
      to_input(c, l, c.f.gradient(c.in(l)), &term, 1);
    }
  }

  static void tangent_forward(const Context<T>& c, const Layer& l) {
    Term terms[2];
    int count = 0;
    if (c.net.has_tangent[l.in]) terms[count++] = {c.t.value(c.in(l)), c.p.slot(c.net, l.weight)};
    if (const T* direction = c.d.slot(c.net, l.weight)) terms[count++] = {c.f.value(c.in(l)), direction};
    to_output(c, l, c.t.value(c.out(l)), terms, count, c.d.slot(c.net, l.bias));
  }

  static void tangent_backward(const Context<T>& c, const Layer& l) {
    const Slot& weight = c.net.slot[l.weight];
    const T *g = c.f.gradient(c.out(l)), *tangent = c.t.gradient(c.out(l));
    const Term data[2] = {{c.f.value(c.in(l)), tangent}, {c.t.value(c.in(l)), g}};
    if (l.few_rows) return few_rows(c, l, data, 1);
    if (c.net.needs_gradient[l.in]) {  // before the step, which may change the direction in place
      Term terms[2] = {{tangent, c.p.flipped(weight)}};
      if (!weight.fixed) terms[1] = {g, c.d.flipped(weight)};
      to_input(c, l, c.t.gradient(c.in(l)), terms, weight.fixed ? 1 : 2);
    }
    to_parameters(c, l, data, c.net.has_tangent[l.in] ? 2 : 1, c.t);
  }
};
