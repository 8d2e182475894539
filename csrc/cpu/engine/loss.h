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
  // A position of sample n: where it is in the frame, and in what the caller gave.
  struct Place {
    int64_t frame, theirs;
  };
  template <class F>
  INLINE void each_position(int64_t n, F f) const {
    const int64_t plane = v.h * v.w, first = original(n) * v.c * plane;
    for (int64_t y = 0; y < v.h; y++)
      for (int64_t x = 0; x < v.w; x++) f(Place{y * v.row + x * v.pitch, first + y * v.w + x}, y * v.w + x);
  }
  INLINE D prediction(int64_t n, Place p, int64_t k) const {
    return number(f.value(v, n), dual ? t.value(v, n) : nullptr, p.frame + k);
  }
  INLINE int64_t place(Place p, int64_t k) const { return p.theirs + k * v.h * v.w; }
  INLINE D desired(Place p, int64_t k) const { return number(target.y, target_t.y, place(p, k)); }
  INLINE D weight(int64_t n) const {
    return target.weight ? number(target.weight, target_t.weight, original(n)) : D(1);
  }
  INLINE void set_gradient(int64_t n, Place p, int64_t k, D g) const {
    (dual ? t : f).gradient(v, n)[p.frame + k] = T(result_of(g));
  }
  INLINE void add(T* to, int64_t at, D g) const { to[at] += T(sign * result_of(g)); }

  bool classes() const { return net.loss.kind == kLabels || net.loss.kind == kSoftLabels; }

  INLINE int64_t label(int64_t n, int64_t position) const { return target.labels[original(n) * v.h * v.w + position]; }

  // z of a sample.
  double share(int64_t n) const {
    if (!classes()) return 1;
    if (net.loss.kind == kSoftLabels) return double(v.h) * v.w;
    double z = 0;
    for (int64_t i = 0; i < v.h * v.w; i++) {
      const int64_t k = label(n, i);
      if (k != net.loss.ignore_index) z += class_weight ? double(class_weight[k]) : 1.0;
    }
    return z;
  }

  // The loss of a sample, whose gradients are set times `scale`.
  INLINE D sample(int64_t n, D scale) const {
    D l(0);
    if (!classes()) {
      const D part(1.0 / (double(v.c) * v.h * v.w)), both = scale * part;
      each_position(n, [&](Place p, int64_t) {
        for (int64_t k = 0; k < v.c; k++) {
          const auto e = element_loss(net.loss.kind, net.loss.parameter, prediction(n, p, k), desired(p, k));
          l = l + part * e.value;
          set_gradient(n, p, k, both * e.by_prediction);
          if (to_y) add(to_y, place(p, k), both * e.by_target);
        }
      });
      return l;
    }
    const bool labels = net.loss.kind == kLabels;
    each_position(n, [&](Place p, int64_t position) {
      const int64_t right = labels ? label(n, position) : 0;
      if (labels && right == net.loss.ignore_index) {
        for (int64_t k = 0; k < v.c; k++) set_gradient(n, p, k, D(0));
        return;
      }
      l = l + cross_entropy<double, D>(
                  v.c, labels ? right : -1, net.loss.parameter, scale, [&](int64_t k) { return prediction(n, p, k); },
                  [&](int64_t k) { return desired(p, k); },
                  [&](int64_t k) { return class_weight ? double(class_weight[k]) : 1.0; },
                  [&](int64_t k, D g) { set_gradient(n, p, k, g); },
                  [&](int64_t k, D g) {
                    if (to_y) add(to_y, place(p, k), g);
                  });
    });
    return l;
  }

  const T* class_weight;

  // The loss; its gradient (or the tangent of it) goes to the prediction's, and what is wanted of y's and w's.
  D run() const {
    D total(0), normaliser(0);
    for (int64_t n = 0; n < f.count; n++) normaliser = normaliser + weight(n) * D(share(n));
    const D each = D(1) / normaliser;
    for (int64_t n = 0; n < f.count; n++) {
      const D scale = weight(n) * each, l = sample(n, scale);
      total = total + scale * l;
      if (to_weight) add(to_weight, original(n), l * each);
    }
    if (to_weight)
      for (int64_t n = 0; n < f.count; n++) add(to_weight, original(n), D(0) - total * each * D(share(n)));
    return total;
  }
};
