// One task after another: the inner loop, the loss, the adjoint recursion.

// Memory in a row; with a null base it only counts.
struct Bump {
  char* base;
  int64_t used;

  template <class T>
  T* take(int64_t count) {
    T* result = base ? (T*)(base + used) : nullptr;
    const int64_t end = used + count * int64_t(sizeof(T));
    used = (end + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    used += 64;  // what lies between two allocations may not be touched
    if (base) __asan_unpoison_memory_region(result, count * int64_t(sizeof(T)));  // by who had the memory before
    if (base) __asan_poison_memory_region(base + end, used - end);
#endif
    return result;
  }
};

// What is recorded beside the rules of layers.
enum Other : int { kTransposing = -1, kUpdating = -2, kLosing = -3 };
enum Rule : int { kForward, kBackward, kTangentForward, kTangentBackward };

template <class T>
struct Rules {
  typedef void (*Function)(const Context<T>&, const Layer&);
  template <class L>
  static Function of(int rule) {
    constexpr Function all[4] = {&L::forward, &L::backward, &L::tangent_forward, &L::tangent_backward};
    return all[rule];
  }
  static Function function(const Layer& l, int rule) {
    Function block = nullptr;
    switch (l.kind) {
      case kContract: return of<Contract<T>>(rule);
      case kNorm: return of<SampleNorm<T>>(rule);
      case kPool:
      case kAverage: return of<Pool<T>>(rule);
      case kReshape: return of<Reshape<T>>(rule);
      case kCombine: return of<Combine<T>>(rule);
      case kSoftmax: return of<Softmax<T>>(rule);
      default:
        with_activation(l.activation, [&](auto act) {
          block = l.pooled ? of<Block<T, decltype(act), true>>(rule) : of<Block<T, decltype(act), false>>(rule);
        });
        return block;
    }
  }
  // What a block leaves to its reader, by rule: see Context::write.
  typedef void (*Write)(const Context<T>&, const Layer&, int64_t half);
  static Write write(const Layer& l, int rule) {
    Write write = nullptr;
    with_activation(l.activation, [&](auto act) {
      typedef Block<T, decltype(act), true> Pooled;
      typedef Block<T, decltype(act), false> Whole;
      if (rule == kForward)
        write = l.pooled ? &Pooled::measure : &Whole::measure;
      else if (rule == kBackward)
        write = l.pooled ? &Pooled::write_gradient : &Whole::write_gradient;
      else
        write = l.pooled ? &Pooled::write_tangent : &Whole::write_tangent;
    });
    return write;
  }
};

// The working memory of one task, and what is done with it.
template <class T>
struct Task {
  const Call<T>& call;
  const Machine& machine;
  const Network& net;
  Crew crew;
  int64_t kept_frames;      // 0: the adjoint recursion computes values anew
  bool kept_transposed;     // it does not transpose filters anew
  Frame<T> *frames;         // of the support set, one for each step; or one
  Frame<T> query, tangent;
  T *theta, *constants;     // theta_0 .. theta_K in a row (or two that take turns, where nobody looks back)
  T *gradients;             // of the last step, or of each where they are wanted later
  T *lambda, *direction, *hessian;
  T *transposed, *transposed_direction;  // filters: of the last step, or of each (kept_transposed)
  T* scratch;                            // of whatever rule is at work
  T *rates;                 // per parameter: rows in the engine's layout
  int64_t *kept;            // the samples with a weight, where others are left out
  const T* class_weight;
  typename Rules<T>::Function* rules;    // four for each layer
  bool loaded;                           // a theta that tasks share is at theta_at(0) already, and transposed
  bool left_out;                         // samples of the support set were, after `start`

  static void* operator new(decltype(sizeof 0), void* at) { return at; }

  static bool recurs(Mode m) { return m == kAdjoint || m == kMeta; }
  static bool differentiates_twice(const Call<T>& c) {
    return (recurs(c.mode) && !c.first_order) || c.mode == kPullTangent || c.mode == kScoreTangent;
  }
  bool many_thetas() const { return recurs(call.mode); }
  bool many_gradients() const { return call.to_rates && kept_frames; }
  // Whether the next task finds theta_0 where it was. Two vectors that take turns do not keep it.
  bool keeps_theta() const { return call.shared && (many_thetas() || call.steps < 2); }
  T* theta_at(int64_t k) const { return theta + (many_thetas() ? k : k % 2) * net.adapted; }
  T* gradient_at(int64_t k) const { return gradients + (many_gradients() ? k : 0) * net.adapted; }
  T* transposed_at(int64_t k) const { return transposed + (kept_transposed ? k : 0) * net.transposed; }
  const Frame<T>& frame_at(int64_t k) const { return frames[kept_frames ? k : 0]; }

  // `once`: nothing is computed from the values after the gradients.
  Frame<T> frame(Bump& m, int64_t samples, bool once) const {
    Frame<T> f{};
    f.samples = f.count = samples;
    f.reuse = once;
    f.values = m.take<T>(net.frame_sample * samples);
    f.gradients = m.take<T>(call.mode == kPredict ? 0 : (once ? net.frame_unspent : net.frame_sample) * samples);
    f.saved = m.take<T>(net.frame_saved + net.frame_saved_sample * samples);
    return f;
  }

  // `asking`: where the frame of the query set lies, which tasks may share.
  void lay_out(Bump& m, Bump& asking) {
    const int64_t support = call.support.samples, asked = call.query.samples;
    const bool twice = differentiates_twice(call);
    frames = m.take<Frame<T>>(larger<int64_t>(1, kept_frames));
    if (support)
      for (int64_t k = 0; k < larger<int64_t>(1, kept_frames); k++) {
        const Frame<T> f = frame(m, support, !twice);
        if (m.base) frames[k] = f;
      }
    if (asked) query = frame(asking, asked, call.mode == kMeta || !twice);
    if (twice) tangent = frame(m, larger(call.mode == kMeta ? 0 : asked, support), true);
    theta = m.take<T>(net.adapted * (many_thetas() ? call.steps + 1 : 2));
    constants = m.take<T>(net.fixed);
    gradients = m.take<T>(net.adapted * (many_gradients() ? larger<int64_t>(1, call.steps) : 1));
    lambda = m.take<T>(net.adapted);
    direction = m.take<T>(!recurs(call.mode) || call.per_parameter ? net.adapted : 0);
    hessian = m.take<T>(net.adapted);
    transposed = m.take<T>(net.transposed * (kept_transposed ? kept_frames : 1));
    transposed_direction = m.take<T>(net.transposed);
    scratch = m.take<T>(net.scratch);
    rates = m.take<T>(call.per_parameter ? call.rate_rows * net.adapted : 0);
    kept = m.take<int64_t>(larger(support, asked));
    rules = m.take<typename Rules<T>::Function>(4 * net.layers);
  }

  // What does not change from task to task.
  void begin() {
    if (call.constants) to_engine<T>(net, *call.net, true, call.constants, constants);
    if (call.per_parameter)
      for (int64_t r = 0; r < call.rate_rows; r++)
        to_engine<T>(net, *call.net, false, call.rates + r * net.parameters, rates + r * net.adapted);
    for (int i = 0; i < 4 * net.layers; i++) rules[i] = Rules<T>::function(net.layer[i / 4], i % 4);
    loaded = false;
    class_weight = net.loss.class_weight < 0 ? nullptr : constants + net.slot[net.loss.class_weight].at;
  }

  template <class F>
  INLINE void timed(int layer, int which, F f) const {
    const double start = machine.record ? machine.clock() : 0;
    f();
    if (machine.record) machine.record(layer, which, net.abreast, machine.clock() - start);
  }
  void rule(int which, int layer, const Context<T>& c) const {
    const Layer& l = net.layer[layer];
    if (!net.has_tangent[l.out] && which != kForward) return;  // nothing adapted comes before it
    if (which == kForward || which == kTangentForward ? l.rectified : l.gated) return;
    timed(layer, which, [&] {
      if (!l.few_rows || l.writer < 0) return rules[4 * layer + which](c, l);
      Context<T> with_writer = c;
      with_writer.write = Rules<T>::write(net.layer[l.writer], which);
      rules[4 * layer + which](with_writer, l);
    });
  }
  void transpose(const Parameters<T>& p, T* to) const {
    timed(kTransposing, kForward, [&] { transpose_filters<T>(net, crew, p, to); });
  }
  void update(T* to, const T* base, const T* a, T scale, const T* rate) const {
    timed(kUpdating, kForward, [&] { combine_parameters<T>(net.adapted, to, base, a, scale, rate); });
  }
  // What steps in the backward pass did not take: parameters that not one linear layer reads alone.
  void rest_of_step(const Sink<T>& step, const T* a) const {
    for (int i = 0; i < net.slots; i++) {
      const Slot& s = net.slot[i];
      if (!s.fixed && !s.stepped)
        timed(kUpdating, kForward, [&] {
          combine_parameters<T>(s.extent, step.to + s.at, step.from + s.at, a + s.at, step.scale, nullptr);
        });
    }
  }
  void all(int which, const Context<T>& c) const {
    if (which == kForward || which == kTangentForward)
      for (int i = 0; i < net.layers; i++) rule(which, i, c);
    else
      for (int i = net.layers; i-- > 0;) rule(which, i, c);
  }

  Context<T> context(const Frame<T>& f, const T* parameters, const T* flipped, const T* along, T* to) const {
    const Parameters<T> p{parameters, constants, flipped}, d{along, nullptr, transposed_direction};
    Context<T> c{net, crew, f, tangent, p, d, to, {}, scratch, nullptr};
    c.t.samples = f.samples, c.t.count = f.count;
    return c;
  }
  Target<T> target(const Data<T>& data, int64_t t, bool compact) const {
    const Value& v = last();
    const int64_t size = v.c * v.h * v.w * data.samples;
    return {data.y ? data.y + t * size : nullptr, data.labels ? data.labels + t * data.samples * v.h * v.w : nullptr,
            data.weight ? data.weight + t * data.samples : nullptr, compact ? kept : nullptr};
  }
  const Value& last() const { return net.value[net.layers ? net.layer[net.layers - 1].out : 0]; }
  static int64_t size(const Value& v) { return v.c * v.h * v.w; }

  // The losses of the tasks abreast, the first of which is t: to `to`, where it is not null.
  template <class D>
  void loss(const Frame<T>& f, const Data<T>& data, int64_t t, bool compact, double sign, T* to) const {
    timed(kLosing, is_dual<D> ? kTangentBackward : kBackward, [&] {
      for (int64_t which = 0; which < net.abreast; which++) {
        const D value = loss_rule<D>(f, data, t, which, compact, sign).run();
        if (to) to[t + which] = T(value_of(value));
      }
    });
  }
  template <class D>
  LossRule<T, D> loss_rule(const Frame<T>& f, const Data<T>& data, int64_t t, int64_t which, bool compact,
                           double sign) const {
    const Value& v = last();
    const int64_t task = t + which, size_y = size(v) * data.samples;
    Target<T> directions{};
    if (data.y_t) directions.y = data.y_t + task * size_y;
    if (data.weight_t) directions.weight = data.weight_t + task * data.samples;
    Frame<T> moving = tangent;
    moving.samples = f.samples;
    return {net, v, f.count, f.value(v) + which, is_dual<D> ? moving.value(v) + which : nullptr,
            (is_dual<D> ? moving : f).gradient(v) + which, target(data, task, compact), directions,
            data.to_y ? data.to_y + task * size_y : nullptr,
            data.to_weight ? data.to_weight + task * data.samples : nullptr, sign, class_weight};
  }

  // Between a value of the frame and [N, C, H, W] of task t.
  template <bool load_it>
  void exchange(const Value& v, T* ours, const T* from, T* to, int64_t t, int64_t samples, bool compact, int64_t count,
                T sign) const {
    crew.each(count, 4 * size(v), [&](int64_t n) {
      const int64_t at = (t * samples + (compact ? kept[n] : n)) * size(v);
      for (int64_t k = 0; k < v.c; k++)
        for (int64_t y = 0; y < v.h; y++)
          for (int64_t x = 0; x < v.w; x++) {
            T& value = ours[n * v.image + v.origin + y * v.row + x * v.pitch + k * net.abreast];
            const int64_t theirs = at + (k * v.h + y) * v.w + x;
            if constexpr (load_it)
              value = from[theirs];
            else
              to[theirs] += sign * value;
          }
    });
  }
  void give_back(const Value& v, T* ours, T* to, int64_t t, const Data<T>& data, const Frame<T>& f, bool compact,
                 T sign) const {
    if (to) exchange<false>(v, ours, nullptr, to, t, data.samples, compact, f.count, sign);
  }

  // Loads the samples of task t; those of weight 0 are left out, unless somebody wants the gradient of weights.
  bool load_samples(Frame<T>& f, const Data<T>& data, int64_t t) const {
    bool compact = false;
    f.count = data.samples;
    if (data.weight && !data.to_weight && !data.weight_t) {
      int64_t count = 0;
      for (int64_t n = 0; n < data.samples; n++)
        if (data.weight[t * data.samples + n] != 0) kept[count++] = n;
      compact = count < data.samples;
      f.count = count;
    }
    const Value& v = net.value[0];
    for (int64_t which = 0; which < net.abreast; which++)
      exchange<true>(v, f.value(v) - v.origin + which, data.x, nullptr, t + which, data.samples, compact, f.count, 1);
    return compact;
  }

  void load_theta(T* to, const T* from, int64_t t, bool shared) const {
    to_engine<T>(net, *call.net, false, shared ? from : from + t * net.parameters, to);
  }
  T rate(int64_t k) const { return call.rates[call.rate_rows > 1 ? k : 0]; }
  const T* rate_row(int64_t k) const {
    return call.per_parameter ? rates + (call.rate_rows > 1 ? k : 0) * net.adapted : nullptr;
  }

  // Parameters that no layer reads go through unchanged: [P] of task t is copied before what the network has is set.
  void copy_theta(T* to, int64_t t) const {
    const T* from = call.theta + (call.shared ? 0 : t * net.parameters);
    for (int64_t i = 0; i < net.parameters; i++) to[t * net.parameters + i] = from[i];
  }

  // `gradients`, where not null, get the gradient; but for what takes `step` at once, if there is one.
  void gradient_of_step(int64_t k, int64_t t, bool compact, T* gradients, const Sink<T>& step) const {
    const Frame<T>& f = frame_at(k);
    Context<T> c = context(f, theta_at(k), transposed_at(k), nullptr, gradients);
    c.step = step;
    if (!(loaded && k == 0 && kept_transposed)) transpose(c.p, transposed_at(k));
    all(kForward, c);
    Data<T> silent = call.support;
    silent.to_y = silent.to_weight = nullptr;
    loss<double>(f, silent, t, compact, 1, nullptr);
    all(kBackward, c);
  }

  // Returns whether samples were left out.
  bool adapt(int64_t t) const {
    const bool compact = load_samples(frames[0], call.support, t);
    const Value& x = net.value[0];
    for (int64_t k = 1; k < kept_frames; k++) {
      frames[k].count = frames[0].count;
      const T* from = frames[0].value(x) - x.origin;
      T* to = frames[k].value(x) - x.origin;
      for (int64_t i = 0; i < x.image * frames[0].count; i++) to[i] = from[i];
    }
    for (int64_t k = 0; k < call.steps; k++) {
      if (call.per_parameter || many_gradients()) {
        gradient_of_step(k, t, compact, gradient_at(k), {});
        update(theta_at(k + 1), theta_at(k), gradient_at(k), call.per_parameter ? T(-1) : -rate(k), rate_row(k));
      } else {
        const Sink<T> step{theta_at(k + 1), theta_at(k), -rate(k)};
        gradient_of_step(k, t, compact, gradient_at(k), step);
        rest_of_step(step, gradient_at(k));
      }
      if (call.mode != kAdapt) continue;
      copy_theta(call.to_trajectory[k], t);
      from_engine<T>(net, theta_at(k + 1), call.to_trajectory[k] + t * net.parameters);
    }
    return compact;
  }

  void tangent_pass(const Context<T>& c) const {
    transpose(c.d, transposed_direction);
    all(kTangentForward, c);
  }

  // lambda_K -> lambda_0, with the gradients of rates and of the support set on the way. `to_rates` is an
  // accumulator of the caller: a number for each row, or a row in the engine's layout of one task.
  void recur(int64_t t, bool compact, double* to_rate, T* to_rate_rows) const {
    for (int64_t k = call.steps; k-- > 0;) {
      if (call.mode == kAdjoint) add_cotangent(k, t);
      const bool anew = !kept_frames && (!call.first_order || call.to_rates);
      const Frame<T>& f = frame_at(k);
      const T* g = gradient_at(k);
      if (anew) gradient_of_step(k, t, compact, call.to_rates ? gradient_at(k) : nullptr, {});
      const int64_t row = call.rate_rows > 1 ? k : 0;
      if (to_rate) to_rate[row] -= dot<T>(net, lambda, g);
      if (to_rate_rows) add_tasks<T>(net, *call.net, to_rate_rows + row * call.net->adapted, true, T(-1), lambda, g);
      if (call.first_order) continue;
      // lambda -= H (rates * lambda); a single rate is taken out of the product.
      const T scale = call.per_parameter ? T(-1) : -rate(k);
      if (call.per_parameter) update(direction, nullptr, lambda, T(1), rate_row(k));
      const T* along = call.per_parameter ? direction : lambda;
      Context<T> c = context(f, theta_at(k), transposed_at(k), along, hessian);
      c.step = {lambda, lambda, scale};
      if (!anew && !kept_transposed) transpose(c.p, transposed_at(k));
      tangent_pass(c);
      loss<Dual<double>>(f, call.support, t, compact, scale, nullptr);
      all(kTangentBackward, c);
      rest_of_step(c.step, hessian);
      if (net.input_active)
        give_back(net.value[0], c.t.gradient(net.value[0]) - net.value[0].origin, call.support.to_x, t, call.support,
                  f, compact, scale);
    }
  }

  void add_cotangent(int64_t k, int64_t t) const {
    if (!call.cotangents[k]) return;
    // By way of `hessian`, which is free here.
    load_theta(hessian, call.cotangents[k], t, false);
    update(lambda, lambda, hessian, T(1), nullptr);
  }

  // Gradients of parameters that no layer reads: 0, or for the inner loop what comes in goes out.
  void store_theta_gradient(const T* from, int64_t t) const {
    T* to = call.to_theta + t * net.parameters;
    for (int64_t i = 0; i < net.parameters; i++) {
      T sum = 0;
      if (call.mode == kAdjoint)
        for (int64_t k = 0; k < call.steps; k++)
          if (call.cotangents[k]) sum += call.cotangents[k][t * net.parameters + i];
      to[i] = sum;
    }
    from_engine<T>(net, from, to);
  }

  void set_direction(int64_t t) const {
    if (call.theta_t)
      load_theta(direction, call.theta_t, t, call.shared_t);
    else
      for (int64_t i = 0; i < net.adapted; i++) direction[i] = 0;
  }
  void set_input_tangent(const Frame<T>& f, int64_t t, bool compact) const {
    if (!net.input_active) return;
    const Value& v = net.value[0];
    T* to = context(f, theta, nullptr, nullptr, nullptr).t.value(v) - v.origin;
    if (call.query.x_t)
      exchange<true>(v, to, call.query.x_t, nullptr, t, call.query.samples, compact, f.count, 1);
    else
      for (int64_t i = 0; i < v.image * f.count; i++) to[i] = 0;
  }

  // The whole call for task t. `sum` collects lambda_0 over tasks where the call reduces, the first of which sets it.
  void run(int64_t t, T* sum, bool first, double* to_rate, T* to_rate_rows) {
    if (call.mode == kMeta || call.mode == kAdapt) {
      start(t);
      if (call.mode == kAdapt) return;
      ask(t);
      return finish(t, sum, first, to_rate, to_rate_rows);
    }
    if (!loaded) load_theta(theta_at(0), call.theta, t, call.shared);
    loaded = keeps_theta();
    if (call.mode != kAdjoint) return ask(t);
    for (int64_t k = 1; k < call.steps; k++) load_theta(theta_at(k), call.trajectory[k - 1], t, false);
    for (int64_t i = 0; i < net.adapted; i++) lambda[i] = 0;
    recur(t, load_samples(frames[0], call.support, t), to_rate, to_rate_rows);
    store_theta_gradient(lambda, t);
  }

  // The single pass, in three parts: inner loop; query set; adjoint recursion.
  void start(int64_t t) {
    if (!loaded) load_theta(theta_at(0), call.theta, t, call.shared);
    left_out = adapt(t);
    loaded = keeps_theta();
  }
  void finish(int64_t t, T* sum, bool first, double* to_rate, T* to_rate_rows) const {
    if (left_out) load_samples(frames[0], call.support, t);  // `kept` held the query's
    recur(t, left_out, to_rate, to_rate_rows);
    if (sum)
      timed(kUpdating, kForward, [&] { add_tasks<T>(net, *call.net, sum, !first, T(1), lambda, nullptr); });
    else
      store_theta_gradient(lambda, t);
  }

  // What is asked of the network, or of the one that has adapted: predictions, the loss, derivatives.
  void ask(int64_t t) {
    const Value &x = net.value[0], &y = last();
    const T* scored = theta_at(call.mode == kMeta ? call.steps : 0);
    const bool compact = load_samples(query, call.query, t);
    // The query's transposed filters take the place of the direction's, which come later.
    T* flipped = call.mode == kMeta ? transposed_direction : transposed;
    Context<T> c = context(query, scored, flipped, direction, call.mode == kMeta ? lambda : gradients);
    const bool forward_only = call.mode == kPredict || (call.mode == kScore && !call.to_theta && !call.query.to_x);
    if (!forward_only) transpose(c.p, flipped);
    all(kForward, c);
    switch (call.mode) {
      case kPredict:
        give_back(y, query.value(y) - y.origin, call.prediction, t, call.query, query, false, 1);
        return;
      case kPull:
      case kPullTangent:
        exchange<true>(y, query.gradient(y) - y.origin, call.cotangent, nullptr, t, call.query.samples, false,
                       query.count, 1);
        break;
      default: {
        Data<T> data = call.query;
        if (call.mode == kScoreTangent) data.to_y = data.to_weight = nullptr;
        loss<double>(query, data, t, compact, 1, call.loss);
      }
    }
    if (forward_only) return;
    all(kBackward, c);
    if (call.mode == kPullTangent || call.mode == kScoreTangent) {
      set_direction(t);
      set_input_tangent(query, t, compact);
      c.gradients = hessian;
      tangent_pass(c);
      if (call.mode == kPullTangent) {
        give_back(y, c.t.value(y) - y.origin, call.prediction, t, call.query, query, false, 1);
        // The cotangent is held: its tangent is 0. (Its gradient is what was just given back.)
        for (int64_t n = 0; n < query.count; n++)
          for (int64_t i = 0; i < y.h; i++)
            for (int64_t j = 0; j < y.w * y.pitch; j++) c.t.gradient(y, n)[i * y.row + j] = 0;
      } else {
        loss<Dual<double>>(query, call.query, t, compact, 1, nullptr);
      }
      all(kTangentBackward, c);
      store_theta_gradient(hessian, t);
      if (net.input_active)
        give_back(x, c.t.gradient(x) - x.origin, call.query.to_x, t, call.query, query, compact, 1);
      return;
    }
    if (net.input_active) give_back(x, query.gradient(x) - x.origin, call.query.to_x, t, call.query, query, compact, 1);
    if (call.mode != kMeta && call.to_theta) store_theta_gradient(gradients, t);
  }
};
