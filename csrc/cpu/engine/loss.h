// The loss of a task with its gradient, and on dual numbers the derivative of both: one piece of code. The arithmetic
// (engine/losses.h) is double whatever the network's: there is little of it and everything behind depends on it.
//
// With l_n the loss of sample n and z_n its share of the normaliser (1; for cross entropy its labels' class weights),
//   L = sum w_n l_n / Z,  Z = sum w_n z_n        dL/dw_n = (l_n - L z_n) / Z

// The targets of a task; `kept` lists the samples of the frame among them (null: all).
template <class T>
struct Target {
  const T* y;
  const int64_t* labels;
  const T* weight;
  const int64_t* kept;
};

template <class T, class D>
struct LossRule {
  const Network& net;
  const Value& v;
  Frame<T> f, t;               // t: where D is Dual
  Target<T> target, target_t;  // directions of y and weight, each null: 0
  T *to_y, *to_weight;         // their gradients (D double) or the tangents of those (Dual); null: not wanted
  double sign;                 // of what goes to them

  static constexpr bool dual = is_dual<D>;

  static INLINE D number(const T* at, const T* tangent, int64_t i) {
    if constexpr (dual)
      return D(at[i], tangent ? tangent[i] : 0);
    else
      return at[i];
  }
  INLINE int64_t original(int64_t n) const { return target.kept ? target.kept[n] : n; }
  // Sample n: where it is in the frame, and what the caller gave for it.
  struct Sample {
    const T *value, *value_t;
    T* gradient;
    const T *y, *y_t;
    const int64_t* labels;
    T* to_y;
  };
  INLINE Sample at(int64_t n) const {
    const int64_t plane = v.h * v.w, first = original(n) * v.c * plane;
    auto offset = [](auto* from, int64_t by) { return from ? from + by : nullptr; };
    return {f.value(v, n), dual ? t.value(v, n) : nullptr, (dual ? t : f).gradient(v, n), offset(target.y, first),
            offset(target_t.y, first), offset(target.labels, original(n) * plane), offset(to_y, first)};
  }
  // Calls f(offset in the frame, position).
  template <class F>
  INLINE void each_position(F f) const {
    for (int64_t y = 0; y < v.h; y++)
      for (int64_t x = 0; x < v.w; x++) f(y * v.row + x * v.pitch, y * v.w + x);
  }
  INLINE D weight(int64_t n) const {
    return target.weight ? number(target.weight, target_t.weight, original(n)) : D(1);
  }
  INLINE void add(T* to, int64_t at, D g) const { to[at] += T(sign * result_of(g)); }

  bool classes() const { return net.loss.kind == kLabels || net.loss.kind == kSoftLabels; }

  // z of a sample.
  double share(int64_t n) const {
    if (!classes()) return 1;
    if (net.loss.kind == kSoftLabels) return double(v.h) * v.w;
    double z = 0;
    const int64_t* labels = at(n).labels;
    for (int64_t i = 0; i < v.h * v.w; i++)
      if (labels[i] != net.loss.ignore_index) z += class_weight ? double(class_weight[labels[i]]) : 1.0;
    return z;
  }

  // The loss of a sample, whose gradients are set times `scale`; `part` is the share of an element. `kind`: kLabels
  // stands for both kinds of them.
  template <LossKind kind>
  INLINE D loss(const Sample& s, D scale, D part) const {
    const int64_t plane = v.h * v.w;
    D l(0);
    if constexpr (kind != kLabels) {
      const D both = scale * part;
      each_position([&](int64_t ours, int64_t theirs) {
        for (int64_t k = 0; k < v.c; k++, ours++, theirs += plane) {
          const auto e = element_loss(kind, net.loss.parameter, number(s.value, s.value_t, ours),
                                      number(s.y, s.y_t, theirs));
          l = l + part * e.value;
          s.gradient[ours] = T(result_of(both * e.by_prediction));
          if (s.to_y) add(s.to_y, theirs, both * e.by_target);
        }
      });
      return l;
    }
    each_position([&](int64_t ours, int64_t theirs) {
      const int64_t right = s.labels ? s.labels[theirs] : -1;
      if (s.labels && right == net.loss.ignore_index) {
        for (int64_t k = 0; k < v.c; k++) s.gradient[ours + k] = 0;
        return;
      }
      l = l + cross_entropy<double, D>(
                  v.c, right, net.loss.parameter, scale,
                  [&](int64_t k) { return number(s.value, s.value_t, ours + k); },
                  [&](int64_t k) { return number(s.y, s.y_t, theirs + k * plane); },
                  [&](int64_t k) { return class_weight ? double(class_weight[k]) : 1.0; },
                  [&](int64_t k, D g) { s.gradient[ours + k] = T(result_of(g)); },
                  [&](int64_t k, D g) {
                    if (s.to_y) add(s.to_y, theirs + k * plane, g);
                  });
    });
    return l;
  }

  const T* class_weight;

  // The loss; its gradient (or the tangent of it) goes to the prediction's, and what is wanted of y's and w's.
  D run() const {
    switch (net.loss.kind) {
      case kMse: return all<kMse>();
      case kHuber: return all<kHuber>();
      case kBinary: return all<kBinary>();
      default: return all<kLabels>();
    }
  }
  template <LossKind kind>
  D all() const {
    D total(0), normaliser(0);
    if (kind != kLabels && !target.weight)
      normaliser = D(f.count);
    else
      for (int64_t n = 0; n < f.count; n++) normaliser = normaliser + weight(n) * D(share(n));
    const D each = D(1) / normaliser, part(1.0 / (double(v.c) * v.h * v.w));
    for (int64_t n = 0; n < f.count; n++) {
      const D scale = weight(n) * each, l = loss<kind>(at(n), scale, part);
      total = total + scale * l;
      if (to_weight) add(to_weight, original(n), l * each);
    }
    if (to_weight)
      for (int64_t n = 0; n < f.count; n++) add(to_weight, original(n), D(0) - total * each * D(share(n)));
    return total;
  }
};
