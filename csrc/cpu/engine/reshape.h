// Flatten, view, reshape: the elements in PyTorch's order (channels, height, width), which is not that of memory here.

template <class T>
struct Reshape {
  static INLINE void next(const Value& v, int64_t& x, int64_t& y, int64_t& k) {
    if (++x < v.w) return;
    x = 0;
    if (++y < v.h) return;
    y = 0;
    k++;
  }

  static void copy(const Context<T>& c, const Value& in, const T* from, const Value& out, T* to, bool add) {
    c.crew.each(c.f.count, 4 * in.c * in.h * in.w, [&](int64_t n) {
      const T* source = from + n * in.image;
      T* target = to + n * out.image;
      int64_t ix = 0, iy = 0, ik = 0, ox = 0, oy = 0, ok = 0;
      for (int64_t i = 0; i < in.c * in.h * in.w; i++) {
        T& result = target[oy * out.row + ox * out.pitch + ok];
        result = source[iy * in.row + ix * in.pitch + ik] + (add ? result : 0);
        next(in, ix, iy, ik);
        next(out, ox, oy, ok);
      }
    });
  }

  static void pull(const Context<T>& c, const Layer& l, const Frame<T>& f) {
    copy(c, c.in(l), f.value(c.in(l)), c.out(l), f.value(c.out(l)), false);
  }
  static void push(const Context<T>& c, const Layer& l, const Frame<T>& f) {
    if (c.net.needs_gradient[l.in])
      copy(c, c.out(l), f.gradient(c.out(l)), c.in(l), f.gradient(c.in(l)), l.accumulate[0]);
  }
  static void forward(const Context<T>& c, const Layer& l) { pull(c, l, c.f); }
  static void backward(const Context<T>& c, const Layer& l) { push(c, l, c.f); }
  static void tangent_forward(const Context<T>& c, const Layer& l) { pull(c, l, c.t); }
  static void tangent_backward(const Context<T>& c, const Layer& l) { push(c, l, c.t); }
};
