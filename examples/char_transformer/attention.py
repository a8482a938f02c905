"""Causal attention, forward and backward, computed by the kernels or by the float64 reference.

Both classes work on one array ``qkv [batch, seqlen, 3, heads, head_dim]``. q, k and v are views of it, and their
gradients are written straight into views of one such array: kernels take any strides.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

import cuattn

from .layers import Array, Saved, array_module

# float16 ends at 6e-8, and the gradient of one character among hundreds is often smaller. The backward is linear in
# dout: a power of two goes in with it and is taken out of the result ("loss scaling": Micikevicius et al., 2017).
FLOAT16_GRADIENT_SCALE = 2.0**12


class Attention(Protocol):
    """What the model asks of attention; `dropout` holds the dropout options of `cuattn.attention`."""

    def forward(self, qkv: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]: ...

    def backward(self, dout: Array, saved: Saved) -> Array: ...


def split(qkv: Array) -> tuple[Array, Array, Array]:
    """Split into q, k, v: views [batch, seqlen, heads, head_dim]."""
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


class KernelAttention:
    """`cuattn.attention` and `cuattn.attention_backward`: the host executor for NumPy arrays, the GPU for CuPy arrays.

    Parameters
    ----------
    dtype : dtype
        What q, k, v and the gradient of the result are rounded to; the other arrays keep their own dtype.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.gradient_scale = FLOAT16_GRADIENT_SCALE if self.dtype == np.float16 else 1.0

    def forward(self, qkv: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        rounded = qkv.astype(self.dtype)
        out, lse = cuattn.attention(*split(rounded), causal=True, return_lse=True, **dropout)
        return out.astype(qkv.dtype), (rounded, out, lse, dropout)

    def backward(self, dout: Array, saved: Saved) -> Array:
        qkv, out, lse, dropout = saved
        dqkv = array_module(qkv).empty_like(qkv)
        dq, dk, dv = split(dqkv)
        rounded = (dout * self.gradient_scale).astype(self.dtype)
        cuattn.attention_backward(rounded, *split(qkv), out, lse, causal=True, dq=dq, dk=dk, dv=dv, **dropout)
        return dqkv.astype(dout.dtype) / self.gradient_scale


class ReferenceAttention:
    """`cuattn.reference.attention` and `attention_backward`: NumPy in float64, from the formulas."""

    def forward(self, qkv: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        out, lse = cuattn.reference.attention(*split(qkv), causal=True, **dropout)
        return out, (qkv, out, lse, dropout)

    def backward(self, dout: Array, saved: Saved) -> Array:
        qkv, out, lse, dropout = saved
        grads = cuattn.reference.attention_backward(dout, *split(qkv), out, lse, causal=True, **dropout)
        return np.stack([grads.dq, grads.dk, grads.dv], axis=2)
