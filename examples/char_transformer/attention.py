"""Causal attention, forward and backward, computed by the kernels or by the float64 reference.

Both classes work on one array ``qkv [batch, seqlen, 3, heads, head_dim]``. q, k and v are views of it, and their
gradients are written straight into views of one such array: kernels take any strides.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

import cuattn

from .kinds import KINDS, Kind
from .layers import Array, Saved, array_module

# float16 ends at 6e-8, and the gradient of one character among hundreds is often smaller. The backward is linear in
# dout: a power of two goes in with it and is taken out of the result ("loss scaling": Micikevicius et al., 2017).
FLOAT16_GRADIENT_SCALE = 2.0**12


class Attention(Protocol):
    """What the model asks of attention; `dropout` holds the dropout options of `cuattn.attention`.

    `gates` [batch, seqlen, gates] and their gradient are None for a kind that has none.
    """

    kind: Kind

    def forward(self, qkv: Array, gates: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]: ...

    def backward(self, dout: Array, saved: Saved) -> tuple[Array, Array]: ...


def queries_and_keys(qkv: Array) -> Array:
    """Return q and k as one view [batch, seqlen, 2 heads, head_dim]."""
    batch, seqlen, _, heads, head_dim = qkv.shape
    return qkv[:, :, :2].reshape(batch, seqlen, 2 * heads, head_dim)


class KernelAttention:
    """A kind of attention by the kernels: the host executor for NumPy arrays, the GPU for CuPy arrays.

    Parameters
    ----------
    dtype : dtype
        What q, k, v and the gradient of the result are rounded to; the other arrays keep their own dtype.
    kind : Kind
    rotate : bool
        Turn q and k by their positions (`cuattn.rope`).
    """

    def __init__(self, dtype: Any, kind: Kind = KINDS["softmax"], *, rotate: bool = False) -> None:
        self.dtype = np.dtype(dtype)
        self.kind = kind
        self.rotate = rotate
        self.gradient_scale = FLOAT16_GRADIENT_SCALE if self.dtype == np.float16 else 1.0

    def forward(self, qkv: Array, gates: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        rounded = qkv.astype(self.dtype)
        self._turn(rounded, inverse=False)
        out, saved = self.kind.forward(self.kind.split(rounded), gates, dropout)
        return out.astype(qkv.dtype), (rounded, gates, saved, out.shape)

    def backward(self, dout: Array, saved: Saved) -> tuple[Array, Array]:
        qkv, gates, saved_kind, shape = saved
        dqkv = array_module(qkv).empty_like(qkv)
        rounded = (dout * self.gradient_scale).astype(self.dtype).reshape(shape)
        dgates = self.kind.backward(rounded, self.kind.split(qkv), gates, saved_kind, self.kind.split(dqkv))
        self._turn(dqkv, inverse=True)
        dgates = None if dgates is None else dgates.astype(dout.dtype) / self.gradient_scale
        return dqkv.astype(dout.dtype) / self.gradient_scale, dgates

    def _turn(self, qkv: Array, *, inverse: bool) -> None:
        if self.rotate:
            turned = queries_and_keys(qkv)
            cuattn.rope(turned, np.arange(qkv.shape[1]), inverse=inverse, out=turned)


class ReferenceAttention:
    """The same kind by `cuattn.reference`: NumPy in float64, from the formulas."""

    def __init__(self, kind: Kind = KINDS["softmax"], *, rotate: bool = False) -> None:
        self.kind = kind
        self.rotate = rotate

    def forward(self, qkv: Array, gates: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        qkv = self._turned(qkv, inverse=False)
        out, saved = self.kind.reference(self.kind.split(qkv), gates, dropout)
        return out, (qkv, gates, saved, out.shape)

    def backward(self, dout: Array, saved: Saved) -> tuple[Array, Array]:
        qkv, gates, saved_kind, shape = saved
        grads, dgates = self.kind.reference_backward(dout.reshape(shape), self.kind.split(qkv), gates, saved_kind)
        dqkv = np.stack([gradient.reshape(qkv[:, :, 0].shape) for gradient in grads], axis=2)
        return self._turned(dqkv, inverse=True), dgates

    def _turned(self, qkv: Array, *, inverse: bool) -> Array:
        if not self.rotate:
            return qkv
        turned = cuattn.reference.rope(queries_and_keys(qkv), np.arange(qkv.shape[1]), inverse=inverse)
        return np.concatenate([turned.reshape(qkv[:, :, :2].shape), qkv[:, :, 2:]], axis=2)
