// The arithmetic of losses with their gradients, and on Dual numbers the derivative of both. A is the type of plain
// numbers, D is A or Dual<A>. Included as activation.h is.

// One element of a loss that is a sum over elements, with its derivatives by prediction and target.
template <class D>
struct ElementLoss {
  D value, by_prediction, by_target;
};
template <class A, class D>
INLINE ElementLoss<D> element_loss(LossKind kind, A delta, D p, D y) {
  const D d = p - y;
  switch (kind) {
    case kHuber: {
      const A side = value_of(d) < 0 ? -1 : 1;
      const bool near = !(value_of(d) * side >= delta);  // NaN too, and stays NaN
      const D slope = near ? d : D(delta * side);
      return {near ? D(A(0.5)) * d * d : D(delta) * (D(side) * d - D(A(0.5) * delta)), slope, D(0) - slope};
    }
    case kBinary: {
      const A side = value_of(p) < 0 ? 1 : -1;
      const D e = exp_of(D(side) * p), rest = D(1) / (D(1) + e);
      return {(side < 0 ? p : D(0)) - p * y + log_of(D(1) + e), (side < 0 ? rest : D(1) - rest) - y, D(0) - p};
    }
    default:
      return {d * d, D(2) * d, D(-2) * d};
  }
}

// Cross entropy at one position against q, l = - sum_k c_k q_k log p_k with class weights c, the label's or the soft
// labels mixed with `smoothing` of the uniform distribution. `prediction(k)` and `target(k)` are read, the gradients
// times `scale` go to `to_prediction(k, g)` and `to_target(k, g)`; `label` is -1 for soft labels.
template <class A, class D, class Prediction, class Target, class Weight, class ToPrediction, class ToTarget>
INLINE D cross_entropy(int64_t classes, int64_t label, A smoothing, D scale, Prediction prediction, Target target,
                       Weight class_weight, ToPrediction to_prediction, ToTarget to_target) {
  const A smooth = smoothing / classes, sharp = 1 - smoothing;
  A top = value_of(prediction(0));
  for (int64_t k = 1; k < classes; k++) {
    const A other = value_of(prediction(k));
    top = other > top ? other : top;
  }
  D sum(0), all(0), l(0);
  for (int64_t k = 0; k < classes; k++) sum = sum + exp_of(prediction(k) - D(top));
  const D log_sum = log_of(sum) + D(top);
  auto mass = [&](int64_t k) {
    const D q = label >= 0 ? D(label == k ? sharp + smooth : smooth) : D(sharp) * target(k) + D(smooth);
    return D(class_weight(k)) * q;
  };
  for (int64_t k = 0; k < classes; k++) {
    l = l + mass(k) * (log_sum - prediction(k));
    all = all + mass(k);
  }
  for (int64_t k = 0; k < classes; k++) {
    const D log_p = prediction(k) - log_sum;
    to_prediction(k, scale * (all * exp_of(log_p) - mass(k)));
    to_target(k, D(0) - scale * D(sharp * class_weight(k)) * log_p);
  }
  return l;
}
