"""Operators of ``torch.ops.maml_ext``, one file each: schema, formula, fake, Function, batching rule."""

from .sgd import sgd_update

__all__ = ["sgd_update"]
