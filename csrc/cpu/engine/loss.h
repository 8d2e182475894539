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
  int64_t count;               // of samples
  const T *value, *value_t;    // of sample 0; value_t: where D is Dual
  T* gradient;                 // or its tangent
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
    const int64_t plane = v.h * v.w, ours = n * v.image, theirs = original(n) * v.c * plane;
    auto offset = [](auto* from, int64_t by) { return from ? from + by : nullptr; };
    return {value + ours, dual ? value_t + ours : nullptr, gradient + ours, offset(target.y, theirs),
            offset(target_t.y, theirs), offset(target.labels, original(n) * plane), offset(to_y, theirs)};
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

  INLINE double weight_of_class(int64_t k) const { return class_weight ? double(class_weight[k * net.abreast]) : 1; }
  bool classes() const { return net.loss.kind == kLabels || net.loss.kind == kSoftLabels; }

  // z of a sample.
  double share(int64_t n) const {
    if (!classes()) return 1;
    if (net.loss.kind == kSoftLabels) return double(v.h) * v.w;
    double z = 0;
    const int64_t* labels = at(n).labels;
    for (int64_t i = 0; i < v.h * v.w; i++)
      if (labels[i] != net.loss.ignore_index) z += weight_of_class(labels[i]);
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
        for (int64_t k = 0; k < v.c; k++, ours += net.abreast, theirs += plane) {
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
        for (int64_t k = 0; k < v.c; k++) s.gradient[ours + k * net.abreast] = 0;
        return;
      }
      l = l + cross_entropy<double, D>(
                  v.c, right, net.loss.parameter, scale,
                  [&](int64_t k) { return number(s.value, s.value_t, ours + k * net.abreast); },
                  [&](int64_t k) { return number(s.y, s.y_t, theirs + k * plane); },
                  [&](int64_t k) { return weight_of_class(k); },
                  [&](int64_t k, D g) { s.gradient[ours + k * net.abreast] = T(result_of(g)); },
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
  // Regression on vectors as it mostly is: all elements count alike, and the gradient by the prediction is all there is.
  template <LossKind kind>
  D elements() const {
    const double part = 1.0 / (double(count) * v.c);
    const int64_t step = net.abreast, image = v.image, channels = v.c;
    const T *p = value, *p_t = value_t, *y = target.y, *y_t = target_t.y;
    T* g = gradient;
    D total(0);
    for (int64_t n = 0; n < count; n++) {
      for (int64_t k = 0; k < channels; k++) {
        const auto e = element_loss(kind, net.loss.parameter, number(p, p_t, k * step), number(y, y_t, k));
        total = total + e.value;
        g[k * step] = T(part * result_of(e.by_prediction));
      }
      p += image, y += channels, g += image;
      if (dual) p_t += image;
      if (y_t) y_t += channels;
    }
    return D(part) * total;
  }
  template <LossKind kind>
  D all() const {
    if constexpr (kind != kLabels)
      if (v.h * v.w == 1 && !target.weight && !to_y && !to_weight) return elements<kind>();
    D total(0), normaliser(0);
    if (kind != kLabels && !target.weight)
      normaliser = D(count);
    else
      for (int64_t n = 0; n < count; n++) normaliser = normaliser + weight(n) * D(share(n));
    const D each = D(1) / normaliser, part(1.0 / (double(v.c) * v.h * v.w));
    for (int64_t n = 0; n < count; n++) {
      const D scale = weight(n) * each, l = loss<kind>(at(n), scale, part);
      total = total + scale * l;
      if (to_weight) add(to_weight, original(n), l * each);
    }
    if (to_weight)
      for (int64_t n = 0; n < count; n++) add(to_weight, original(n), D(0) - total * each * D(share(n)));
    return total;
  }
};
