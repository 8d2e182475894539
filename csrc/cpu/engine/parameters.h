// The engine's vectors of parameters: between PyTorch's layout and its own, and what is done with whole vectors.
// Rows are padded to whole vectors; what is in the padding stays finite and is never read as a parameter.

// out[c][r] = in[r][c], neither padded: whole tiles in registers, the rest one by one.
template <class T>
void transpose_exactly(const T* in, int64_t in_step, T* out, int64_t out_step, int64_t rows, int64_t columns) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L) {
      if (r + L <= rows && c + L <= columns) {
        transpose<T>(in + r * in_step + c, in_step, out + c * out_step + r, out_step, L, L);
        continue;
      }
      for (int64_t i = r; i < smaller(rows, r + L); i++)
        for (int64_t j = c; j < smaller(columns, c + L); j++) out[j * out_step + i] = in[i * in_step + j];
    }
}

template <class T, bool to_engine, class Source, class Target>
void convert(const Slot& s, Source* theirs, Target* ours) {
  const int64_t pitch = padded<T>(s.row);
  auto move = [&](int64_t their, int64_t our) {
    if constexpr (to_engine)
      ours[our] = theirs[their];
    else
      theirs[their] = ours[our];
  };
  if (s.narrow) {
    for (int64_t o = 0; o < s.outputs; o++)
      for (int64_t i = 0; i < s.inputs; i++) move(o * s.inputs + i, o * pitch + i);
  } else if (s.kind == kFilter && s.taps == 1 && s.groups == 1) {
    if constexpr (to_engine)
      transpose_exactly<T>(theirs, s.inputs, ours, pitch, s.outputs, s.inputs);
    else
      transpose_exactly<T>(ours, pitch, theirs, s.inputs, s.inputs, s.outputs);
  } else if (s.kind == kFilter) {
    const int64_t inputs = s.inputs / s.groups, outputs = s.outputs / s.groups;
    if constexpr (to_engine)
      if (s.groups > 1)
        for (int64_t i = 0; i < s.taps * s.inputs * pitch; i++) ours[i] = 0;
    for (int64_t o = 0; o < s.outputs; o++)
      for (int64_t i = 0; i < inputs; i++)
        for (int64_t t = 0; t < s.taps; t++)
          move((o * inputs + i) * s.taps + t, (t * s.inputs + o / outputs * inputs + i) * pitch + o);
  } else {
    const int64_t positions = s.kind == kElements ? s.height * s.width : 1;
    for (int64_t p = 0; p < positions; p++)
      for (int64_t k = 0; k < s.outputs; k++) move(k * positions + p, p * pitch + k);
  }
}
// From and to `one`, the layout of a single task.
template <class T>
void from_engine(const Network& one, const T* ours, T* theirs) {
  for (int i = 0; i < one.slots; i++)
    if (!one.slot[i].fixed) convert<T, false>(one.slot[i], theirs + one.slot[i].source, ours + one.slot[i].at);
}
// Tasks abreast share what comes: it is laid out for one, and spread in place, from the end on.
template <class T>
void to_engine(const Network& net, const Network& one, bool fixed, const T* theirs, T* ours) {
  for (int i = 0; i < one.slots; i++)
    if (one.slot[i].fixed == fixed) convert<T, true>(one.slot[i], theirs + one.slot[i].source, ours + one.slot[i].at);
  if (net.abreast == 1) return;
  constexpr int L = kLanes<T>;
  typename Simd<T>::Int low, high, lane;
  for (int i = 0; i < L; i++) low[i] = i / 2, high[i] = (i + L) / 2, lane[i] = i;
  for (int i = net.slots; i-- > 0;) {
    const Slot &to = net.slot[i], &from = one.slot[i];
    const int64_t wide = padded<T>(to.row), pitch = padded<T>(from.row);
    for (int64_t r = to.fixed == fixed ? from.extent / pitch : 0; r-- > 0;)
      for (int64_t k = pitch - L; k >= 0; k -= L) {
        const int left = int(smaller<int64_t>(L, from.row - k));  // zeros behind a row's end
        const Vec<T> v = select<T>(lane < left, load<T>(ours + from.at + r * pitch + k), Vec<T>{});
        T* at = ours + to.at + r * wide + 2 * k;
        if (2 * k + L < wide) store<T>(at + L, __builtin_shuffle(v, v, high));
        store<T>(at, __builtin_shuffle(v, v, low));
      }
  }
}

// a * scale [* rate] [+ base] for every parameter, the one element-wise pass there is.
template <class T>
void combine_parameters(int64_t count, T* to, const T* base, const T* a, T scale, const T* rate) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = rate ? scale * load<T>(rate + i) * load<T>(a + i) : scale * load<T>(a + i);
    store<T>(to + i, load_or_zero<T>(base ? base + i : nullptr) + v);
  }
}

// sum (+)= scale * a [* b] over the tasks abreast, laid out for one.
template <class T>
void add_tasks(const Network& net, const Network& one, T* sum, bool add, T scale, const T* a, const T* b) {
  if (net.abreast == 1) return combine_parameters<T>(net.adapted, sum, add ? sum : nullptr, a, scale, b);
  constexpr int L = kLanes<T>;
  typename Simd<T>::Int even, odd;
  for (int i = 0; i < L; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int i = 0; i < net.slots; i++) {
    const Slot &from = net.slot[i], &to = one.slot[i];
    const int64_t wide = padded<T>(from.row), pitch = padded<T>(to.row);
    for (int64_t r = 0; !to.fixed && r < to.extent / pitch; r++)
      for (int64_t k = 0; k < pitch; k += L) {
        const int64_t at = from.at + r * wide + 2 * k;
        auto term = [&](int64_t at) ALWAYS { return b ? load<T>(a + at) * load<T>(b + at) : load<T>(a + at); };
        const Vec<T> first = term(at), second = 2 * k + L < wide ? term(at + L) : Vec<T>{};
        put<T>(sum + to.at + r * pitch + k,
               scale * (__builtin_shuffle(first, second, even) + __builtin_shuffle(first, second, odd)), add);
      }
  }
}

// The filters transposed, for the gradients of inputs.
template <class T>
void transpose_filters(const Network& net, const Crew& crew, const Parameters<T>& p, T* out) {
  for (int i = 0; i < net.slots; i++) {
    const Slot& s = net.slot[i];
    const T* filter = s.transposed < 0 ? nullptr : p.slot(s);
    if (!filter) continue;
    const int64_t outputs = padded<T>(s.outputs * net.abreast), inputs = padded<T>(s.inputs * net.abreast);
    auto taps = [&](auto whole) {
      typedef decltype(whole) U;
      constexpr int64_t abreast = sizeof(U) / sizeof(T);
      crew.each(s.taps, 4 * s.inputs * s.outputs, [&](int64_t t) {
        transpose<U>((const U*)(filter + t * s.inputs * outputs), outputs / abreast,
                     (U*)(out + s.transposed + t * s.outputs * inputs), inputs / abreast, s.inputs, s.outputs);
      });
    };
    if (net.abreast == 1)
      taps(T());
    else
      taps(typename Whole<T, 2>::Type());
  }
}

// Sum of a * b over real parameters.
template <class T>
double dot(const Network& net, const T* a, const T* b) {
  double total = 0;
  for (int i = 0; i < net.slots; i++) {
    const Slot& s = net.slot[i];
    if (s.fixed) continue;
    const int64_t pitch = padded<T>(s.row), whole = s.row / kLanes<T> * kLanes<T>;
    for (int64_t row = s.at; row < s.at + s.extent; row += pitch) {
      Vec<T> sum{};
      for (int64_t k = 0; k < whole; k += kLanes<T>) sum += load<T>(a + row + k) * load<T>(b + row + k);
      total += sum_of_lanes<T>(sum);
      for (int64_t k = whole; k < s.row; k++) total += double(a[row + k]) * b[row + k];
    }
  }
  return total;
}
