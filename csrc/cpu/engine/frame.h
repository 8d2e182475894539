// Where a task keeps what: frames of values, parameters in the engine's layout, and the crew that shares the work.
// Included by each build of the engine inside its anonymous namespace: see build.h.

// The values of the network on `count` samples, laid out for `samples`; with their gradients and the statistics of
// norms. A second frame of the same form holds the tangents of all three.
template <class T>
struct Frame {
  T *values, *gradients, *saved;
  int64_t samples, count;
  bool reuse;  // gradients take the place of values that are spent

  INLINE T* value(const Value& v, int64_t n = 0) const { return values + v.at * samples + n * v.image + v.origin; }
  INLINE T* gradient(const Value& v, int64_t n = 0) const {
    T* all = reuse && v.spent ? values + v.at * samples : gradients + v.gradient_at * samples;
    return all + n * v.image + v.origin;
  }
  INLINE T* statistics(const Layer& l) const { return saved + l.saved + samples * l.saved_sample; }
};

// Parameters, or a direction of them. `fixed` is null in a direction: constants have none.
template <class T>
struct Parameters {
  const T *adapted, *fixed, *transposed;

  INLINE const T* slot(const Slot& s) const { return s.fixed ? (fixed ? fixed + s.at : nullptr) : adapted + s.at; }
  // For the gradient of the input.
  INLINE const T* flipped(const Slot& s) const { return s.narrow ? slot(s) : transposed + s.transposed; }
  INLINE const T* slot(const Network& net, int index) const { return index < 0 ? nullptr : slot(net.slot[index]); }
};

// Runs a loop whose steps are independent: by itself where tasks are shared out over threads, else on all threads.
// What a step does never depends on which it is, so results do not depend on the number of threads.
struct Crew {
  void (*split)(int64_t count, int64_t grain, void* context, void (*run)(void*, int64_t, int64_t));  // null: alone
  int64_t threads;
  static constexpr int64_t kWorthwhile = 100000;  // multiply-adds: some microseconds

  // Into how many pieces, at least `pieces` and at most `most`, to cut each of `groups`, so that threads get equally
  // many. Only for what comes out the same however it is cut.
  int64_t cut(int64_t pieces, int64_t most, int64_t groups = 1) const {
    if (!split || pieces * groups % threads == 0) return pieces;
    return larger(pieces, smaller(most, (pieces + threads - 1) / threads * threads));
  }

  template <class F>
  INLINE void each(int64_t count, int64_t work, F f) const {
    if (split && count > 1 && count * work > kWorthwhile) {
      split(count, larger<int64_t>(1, kWorthwhile / 4 / larger<int64_t>(1, work)), &f,
            [](void* context, int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) (*(F*)context)(i);
            });
    } else {
      for (int64_t i = 0; i < count; i++) f(i);
    }
  }
};

// Where the gradient of a parameter goes: to = from + scale * gradient. null `to`: nowhere; null `from`: zeros.
template <class T>
struct Sink {
  T* to;
  const T* from;
  T scale;
};

// One term of a sum of products.
template <class T>
struct Term {
  const T* data;    // sample 0 of the operand, at its origin
  const T* filter;  // in the layout of the rows; or, for the gradient of the filter, that of the output
};

// What the four rules of a layer are given. A rule reads and writes the frames:
//   forward           values of in -> values of out
//   backward          gradient at out -> gradient at in and of the parameters
//   tangent_forward   tangents of in and of the parameters -> tangents of out
//   tangent_backward  the derivative of `backward` along the tangents
// Gradients of a value with several readers, and of shared parameters, add up (Layer::accumulate, writes_*).
template <class T>
struct Context {
  const Network& net;
  Crew crew;
  Frame<T> f, t;              // the values, and (tangent rules) their tangents
  Parameters<T> p, d;         // the parameters, and their direction
  T* gradients;               // of the parameters (backward), or their tangent (tangent_backward); null: not wanted
  Sink<T> step;               // of a step: the vectors of parameters it leads to (null: none) and from
  T* scratch;                 // for the time of a rule
  // A contraction whose Layer::writer is a block has that do its part half a sample at a time, while the data are in
  // the cache: measure what the contraction has put out, or write the gradient at out (its tangent) before it is read.
  void (*write)(const Context&, const Layer&, int64_t half);

  INLINE const Value& in(const Layer& l) const { return net.value[l.in]; }
  INLINE const Value& out(const Layer& l) const { return net.value[l.out]; }
  INLINE T* gradient(int slot) const {
    return slot < 0 || net.slot[slot].fixed || !gradients ? nullptr : gradients + net.slot[slot].at;
  }
  // The same, but a slot that is `stepped` takes the step at once. `first`: to reach the slot.
  INLINE Sink<T> sink(int slot, bool first) const {
    if (step.to && slot >= 0 && net.slot[slot].stepped)
      return {step.to + net.slot[slot].at, step.from + net.slot[slot].at, step.scale};
    T* to = gradient(slot);
    return {to, first ? nullptr : to, 1};
  }
};

// The lines of an image that make up half a sample, where it is pooled to `pooled` lines, `step` apart.
struct Lines {
  int64_t begin, end;
};
INLINE Lines lines_of(int64_t pooled, int64_t step, int64_t high, int64_t half) {
  const int64_t which = half % kHalves;
  return {pooled * which / kHalves * step, which == kHalves - 1 ? high : pooled * (which + 1) / kHalves * step};
}

// A gradient that is stored by the first to reach it and added to by the others.
template <class T>
INLINE void put(T* at, Vec<T> value, bool add) {
  store<T>(at, load_or_zero<T>(add ? at : nullptr) + value);
}
template <class T>
INLINE void put(const Sink<T>& sink, int64_t at, Vec<T> gradient) {
  store<T>(sink.to + at, load_or_zero<T>(sink.from ? sink.from + at : nullptr) + sink.scale * gradient);
}
