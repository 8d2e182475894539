// a x + b y, x y, and a x + b for a single input.

template <class T>
struct Combine {
  // Calls f(offset in x, in y, in out) for every vector. All three have the same shape, and halos of their own.
  template <class F>
  static void vectors(const Context<T>& c, const Layer& l, F f) {
    const Value &x = c.in(l), &y = l.second < 0 ? x : c.net.value[l.second], &out = c.out(l);
    c.crew.each(c.f.count, out.h * out.w * out.pitch, [&](int64_t n) {
      for (int64_t i = 0; i < out.h; i++)
        for (int64_t j = 0; j < out.w; j++)
          for (int64_t k = 0; k < out.pitch; k += kLanes<T>)
            f(n * x.image + i * x.row + j * x.pitch + k, n * y.image + i * y.row + j * y.pitch + k,
              n * out.image + i * out.row + j * out.pitch + k);
    });
  }
  static const Value& second(const Context<T>& c, const Layer& l) { return c.net.value[l.second]; }

  static void forward(const Context<T>& c, const Layer& l) {
    const T *x = c.f.value(c.in(l)), *y = l.second < 0 ? nullptr : c.f.value(second(c, l));
    T* to = c.f.value(c.out(l));
    const T a = T(l.a), b = T(l.b);
    vectors(c, l, [&](int64_t i, int64_t j, int64_t o) {
      const Vec<T> first = load<T>(x + i);
      store<T>(to + o, !y ? a * first + b : l.multiply ? first * load<T>(y + j) : a * first + b * load<T>(y + j));
    });
  }

  static void tangent_forward(const Context<T>& c, const Layer& l) {
    const bool moves_x = c.net.has_tangent[l.in], moves_y = l.second >= 0 && c.net.has_tangent[l.second];
    const T *x = c.f.value(c.in(l)), *y = l.second < 0 ? nullptr : c.f.value(second(c, l));
    const T *x_t = moves_x ? c.t.value(c.in(l)) : nullptr, *y_t = moves_y ? c.t.value(second(c, l)) : nullptr;
    T* to = c.t.value(c.out(l));
    const T a = T(l.a), b = T(l.b);
    vectors(c, l, [&](int64_t i, int64_t j, int64_t o) {
      const Vec<T> dx = load_or_zero<T>(x_t ? x_t + i : nullptr), dy = load_or_zero<T>(y_t ? y_t + j : nullptr);
      store<T>(to + o, l.multiply ? dx * load<T>(y + j) + load<T>(x + i) * dy : a * dx + b * dy);
    });
  }

  // The second input first: where both are one value, the first adds to what the second stored.
  static void backward(const Context<T>& c, const Layer& l) {
    const T* g = c.f.gradient(c.out(l));
    if (l.second >= 0 && c.net.needs_gradient[l.second]) {
      const T* x = c.f.value(c.in(l));
      T* to = c.f.gradient(second(c, l));
      vectors(c, l, [&](int64_t i, int64_t j, int64_t o) {
        put<T>(to + j, l.multiply ? load<T>(g + o) * load<T>(x + i) : load<T>(g + o) * T(l.b), l.accumulate[1]);
      });
    }
    if (!c.net.needs_gradient[l.in]) return;
    const T* y = l.multiply ? c.f.value(second(c, l)) : nullptr;
    T* to = c.f.gradient(c.in(l));
    vectors(c, l, [&](int64_t i, int64_t j, int64_t o) {
      put<T>(to + i, l.multiply ? load<T>(g + o) * load<T>(y + j) : load<T>(g + o) * T(l.a), l.accumulate[0]);
    });
  }

  static void tangent_backward(const Context<T>& c, const Layer& l) {
    const T *g = c.f.gradient(c.out(l)), *g_t = c.t.gradient(c.out(l));
    auto side = [&](const Value& other, bool moving, T* to, T factor, bool first, bool add) {
      const T *value = c.f.value(other), *tangent = moving ? c.t.value(other) : nullptr;
      vectors(c, l, [&](int64_t i, int64_t j, int64_t o) {
        const int64_t mine = first ? i : j, theirs = first ? j : i;
        const Vec<T> moved = load_or_zero<T>(tangent ? tangent + theirs : nullptr), gradient = load<T>(g_t + o);
        const Vec<T> product = gradient * load<T>(value + theirs) + load<T>(g + o) * moved;
        put<T>(to + mine, l.multiply ? product : gradient * factor, add);
      });
    };
    if (l.second >= 0 && c.net.needs_gradient[l.second])
      side(c.in(l), c.net.has_tangent[l.in], c.t.gradient(second(c, l)), T(l.b), false, l.accumulate[1]);
    if (c.net.needs_gradient[l.in])
      side(l.second < 0 ? c.in(l) : second(c, l), l.second >= 0 && c.net.has_tangent[l.second],
           c.t.gradient(c.in(l)), T(l.a), true, l.accumulate[0]);
  }
};
