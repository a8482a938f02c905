"""Every operation of the package, from the declarations of the families: a new family adds its module here."""

from __future__ import annotations

from functools import cache

from cuattn.kv import operation as kv
from cuattn.ops.attention import kernels as attention
from cuattn.ops.attention.backward import operation as backward
from cuattn.ops.attention.forward import operation as forward
from cuattn.ops.decode import operation as decode
from cuattn.ops.merge import operation as merge
from cuattn.ops.padding import operation as padding
from cuattn.ops.registry import Operation
from cuattn.ops.rotary import operation as rotary
from cuattn.ops.softmax import operation as softmax

__all__ = ["operation_of", "operations"]

FAMILIES = (forward, backward, decode, attention, kv, merge, padding, rotary, softmax)


@cache
def operations() -> dict[str, Operation]:
    """Name to operation."""
    return {operation.name: operation for family in FAMILIES for operation in family.OPERATIONS}


def operation_of(kernel: str) -> Operation:
    """The one that a file of cuattn/kernels, without ``.cu``, belongs to."""
    (found,) = (operation for operation in operations().values() if kernel in operation.kernels)
    return found
