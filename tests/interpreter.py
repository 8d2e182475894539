"""Triton's interpreter, seven times as fast: what it does for every call and every tile is done once, or not at all."""

import math

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """For the rest of the process; results stay the same to the bit.

    The interpreter redefines triton.language at each call of a jit function, within kernels too, which takes longer
    than most of these do: here it stays redefined. It follows each sum and product of integers by five operations that
    look for an overflow, which is reported in a debug mode only. And it describes the shape of every tile anew.
    """

    class Everything:  # a function that sees all that may be redefined
        __globals__ = {"tl": tl, "core": tl.core}

    interpreter._patch_lang(Everything)
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    describe, types = tl.block_type.__init__, {}

    def extents(shape):
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])

    def init_type(self, element_ty, shape):
        key = element_ty.name, *[n if type(n) is int else n.value for n in shape]
        if key not in types:
            describe(self, element_ty, shape)
            self.extents = extents(self.shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    of_scalar = extents(())

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.extents if type.is_block() else of_scalar

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor
