"""How torch's functions, methods and modules are called, and which method of ``Layers`` each stands for."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .layers import Layers, Value
from .tracing import Unrecognised


def _table(holder, names: str) -> dict[Callable, str]:
    return {getattr(holder, name): name for name in names.split()}


# Functions: the method of ``Layers``. A name that ends in _ changes its argument.
FUNCTIONS: dict[Callable, str] = {
    **_table(F, "linear conv2d batch_norm layer_norm group_norm instance_norm"),
    **_table(F, "max_pool2d avg_pool2d adaptive_avg_pool2d dropout"),
    **_table(F, "leaky_relu leaky_relu_ elu elu_ gelu silu softplus relu relu_"),
    **_table(F, "tanh sigmoid softmax log_softmax"),
    **_table(torch, "conv2d max_pool2d mean reshape flatten unflatten add sub mul div neg"),
    **_table(torch, "relu relu_ clamp tanh sigmoid sin softmax log_softmax"),
    **dict.fromkeys((F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout), "dropout"),
    **dict.fromkeys((operator.add, torch.add), "add"),
    **dict.fromkeys((operator.sub, torch.subtract), "sub"),
    **dict.fromkeys((operator.mul, torch.multiply), "mul"),
    **dict.fromkeys((operator.truediv, torch.true_divide), "div"),
    **dict.fromkeys((operator.neg, torch.negative), "neg"),
    **{operator.iadd: "add_", operator.isub: "sub_", operator.imul: "mul_", operator.itruediv: "div_"},
    **{getattr: "getattr", operator.getitem: "getitem"},
}
METHODS = frozenset(
    "add add_ sub sub_ mul mul_ div div_ neg neg_ clamp clamp_ relu relu_ tanh tanh_ sigmoid sigmoid_ sin "
    "sin_ mean view reshape flatten unflatten contiguous softmax log_softmax size".split()
)
# What returns its argument under another name; dropout where it does nothing.
ALIASES = frozenset(
    "view reshape flatten unflatten Flatten Unflatten contiguous Identity squeeze "
    "dropout dropout2d alpha_dropout feature_alpha_dropout "
    "Dropout Dropout1d Dropout2d AlphaDropout FeatureAlphaDropout".split()
)


def _batch_norm(layers: Layers, m: nn.Module, x: Value) -> Value:
    rank = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,)}[type(m)]
    if len(x.shape) not in rank:
        raise Unrecognised(f"{type(m).__name__} on samples of shape {list(x.shape)}")
    batch = m.training or m.running_mean is None
    return layers.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, batch, eps=m.eps)


def _instance_norm(layers: Layers, m: nn.Module, x: Value) -> Value:
    own = m.training or not m.track_running_stats
    return layers.instance_norm(x, weight=m.weight, bias=m.bias, use_input_stats=own, eps=m.eps)


def _conv2d(layers: Layers, m: nn.Module, x: Value) -> Value:
    if m.padding_mode != "zeros":
        raise Unrecognised(f"padding_mode {m.padding_mode!r} has no compiled rule")
    return layers.conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _calls(method: str, *attributes: str) -> Callable[[Layers, nn.Module, Value], Value]:
    """The method of ``Layers`` with these attributes of the module as further arguments."""
    return lambda layers, m, x: getattr(layers, method)(x, *[getattr(m, name) for name in attributes])


MODULES: dict[type, Callable[[Layers, nn.Module, Value], Value]] = {
    nn.Linear: _calls("linear", "weight", "bias"),
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.LayerNorm: _calls("layer_norm", "normalized_shape", "weight", "bias", "eps"),
    nn.GroupNorm: _calls("group_norm", "num_groups", "weight", "bias", "eps"),
    nn.MaxPool2d: _calls(
        "max_pool2d", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    ),
    nn.AvgPool2d: _calls(
        "avg_pool2d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    nn.AdaptiveAvgPool2d: _calls("adaptive_avg_pool2d", "output_size"),
    nn.Flatten: _calls("flatten", "start_dim", "end_dim"),
    nn.Unflatten: _calls("unflatten", "dim", "unflattened_size"),
    nn.Identity: _calls("same"),
    nn.Dropout: _calls("dropout", "p", "training"),
    nn.Dropout1d: _calls("dropout", "p", "training"),
    nn.Dropout2d: _calls("dropout", "p", "training"),
    nn.AlphaDropout: _calls("dropout", "p", "training"),
    nn.FeatureAlphaDropout: _calls("dropout", "p", "training"),
    nn.ReLU: _calls("relu"),
    nn.LeakyReLU: _calls("leaky_relu", "negative_slope"),
    nn.ELU: _calls("elu", "alpha"),
    nn.GELU: _calls("gelu", "approximate"),
    nn.SiLU: _calls("silu"),
    nn.Softplus: _calls("softplus", "beta", "threshold"),
    nn.Tanh: _calls("tanh"),
    nn.Sigmoid: _calls("sigmoid"),
    nn.Softmax: _calls("softmax", "dim"),
    nn.LogSoftmax: _calls("log_softmax", "dim"),
}
