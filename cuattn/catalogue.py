"""Every kernel of the package in its group, as the families declare them: a new family adds its module here."""

from __future__ import annotations

from functools import cache

from cuattn.kv import kernels as kv
from cuattn.ops.attention import kernels as attention
from cuattn.ops.attention.backward import kernels as backward
from cuattn.ops.attention.forward import kernels as forward
from cuattn.ops.decode import kernels as decode
from cuattn.ops.differential import kernels as differential
from cuattn.ops.dual_chunk import kernels as dual_chunk
from cuattn.ops.linear import kernels as linear
from cuattn.ops.merge import kernels as merge
from cuattn.ops.padding import kernels as padding
from cuattn.ops.registry import KernelGroup
from cuattn.ops.rotary import kernels as rotary
from cuattn.ops.softmax import kernels as softmax

__all__ = ["groups"]

FAMILIES = (forward, backward, decode, attention, differential, dual_chunk, kv, linear, merge, padding, rotary, softmax)


@cache
def groups() -> dict[str, KernelGroup]:
    """Every group of kernels by its name."""
    return {group.name: group for family in FAMILIES for group in family.GROUPS}
