"""The kinds of attention that the model can have: each by the kernels, and once more by the float64 reference.

All are causal. A kind says how q, k and v are cut out of one array, so that kernels read views of it, and write the
gradients straight into views of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import numpy as np

import cuattn

from .layers import Array, Saved

WINDOW = 16  # characters that a query of window attention sees, itself included

DECAY_ROOT = 16  # of the sigmoid that gated linear attention forgets by
BLOCK = 8  # characters of a block of block-sparse attention

QKV = tuple[Array, Array, Array]


class Kind(ABC):
    """A kind of attention: forward and backward by the kernels, and by `cuattn.reference`.

    `gates` [batch, seqlen, num_gates(heads)] are numbers for each token, from a projection of their own; None for kinds
    without. `options` are those of dropout, where it takes any.
    """

    has_dropout = False

    def num_gates(self, heads: int) -> int:
        return 0

    def split(self, qkv: Array) -> QKV:
        """Cut q, k and v out of ``qkv [batch, seqlen, 3, heads, head_dim]``: views [batch, seqlen, heads, head_dim]."""
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    @abstractmethod
    def forward(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        """Return out, and what `backward` needs besides."""

    @abstractmethod
    def backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved, grads: QKV) -> Array:
        """Write the gradients of q, k and v to `grads`; returns that of the gates, or None."""

    @abstractmethod
    def reference(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        """Return what `forward` does, in float64."""

    @abstractmethod
    def reference_backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved) -> tuple[QKV, Array]:
        """Return the gradients of q, k and v, and that of the gates, in float64."""


class SoftmaxAttention(Kind):
    """`cuattn.attention`, over all characters so far or, with a `window`, over the latest so many."""

    has_dropout = True

    def __init__(self, window: int | None = None) -> None:
        self.bounds: dict[str, Any] = {"causal": True}
        if window is not None:
            self.bounds["window"] = (window - 1, 0)

    def forward(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        out, lse = cuattn.attention(*qkv, return_lse=True, **self.bounds, **options)
        return out, (out, lse, options)

    def backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved, grads: QKV) -> Array:
        out, lse, options = saved
        dq, dk, dv = grads
        cuattn.attention_backward(dout, *qkv, out, lse, dq=dq, dk=dk, dv=dv, **self.bounds, **options)

    def reference(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        out, lse = cuattn.reference.attention(*qkv, **self.bounds, **options)
        return out, (out, lse, options)

    def reference_backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved) -> tuple[QKV, Array]:
        out, lse, options = saved
        grads = cuattn.reference.attention_backward(dout, *qkv, out, lse, **self.bounds, **options)
        return (grads.dq, grads.dk, grads.dv), None


class BlockSparseAttention(Kind):
    """`cuattn.block_sparse_attention`: the first block of characters, and the latest two."""

    @staticmethod
    @cache
    def mask(seqlen: int) -> cuattn.BlockMask:
        blocks = -(-seqlen // BLOCK)
        return cuattn.BlockMask.from_blocks(cuattn.streaming_mask(blocks, blocks, 1, 2), seqlen, seqlen, BLOCK)

    def forward(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        mask = self.mask(qkv[0].shape[1])
        out, lse = cuattn.block_sparse_attention(*qkv, mask, causal=True, return_lse=True)
        return out, (out, lse, mask)

    def backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved, grads: QKV) -> Array:
        dq, dk, dv = grads
        cuattn.block_sparse_attention_backward(dout, *qkv, *saved, causal=True, dq=dq, dk=dk, dv=dv)

    def reference(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        mask = self.mask(qkv[0].shape[1]).todense()
        out, lse = cuattn.reference.block_sparse_attention(*qkv, mask, causal=True)
        return out, (out, lse, mask)

    def reference_backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved) -> tuple[QKV, Array]:
        grads = cuattn.reference.block_sparse_attention_backward(dout, *qkv, *saved, causal=True)
        return (grads.dq, grads.dk, grads.dv), None


class LinearAttention(Kind):
    """`cuattn.linear_attention`, without decay, or `gated`: what is remembered fades by a factor a token and head.

    The factor is the 16th root of a sigmoid (Yang et al., "Gated linear attention", 2023).
    """

    def __init__(self, *, gated: bool = False) -> None:
        self.gated = gated

    def num_gates(self, heads: int) -> int:
        return heads if self.gated else 0

    def decay(self, gates: Array) -> dict[str, Array]:
        return {"decay": -np.logaddexp(0, -gates) / DECAY_ROOT} if self.gated else {}

    def gate_gradient(self, gates: Array, ddecay: Array) -> Array:
        return ddecay / (1 + np.exp(gates)) / DECAY_ROOT if self.gated else None

    def forward(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        return cuattn.linear_attention(*qkv, **self.decay(gates)), ()

    def backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved, grads: QKV) -> Array:
        found = cuattn.linear_attention_backward(dout, *qkv, **self.decay(gates))
        for target, gradient in zip(grads, found[:3], strict=True):
            target[...] = gradient
        return self.gate_gradient(gates, found.ddecay)

    def reference(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        return cuattn.reference.linear_attention(*qkv, **self.decay(gates))[0], ()

    def reference_backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved) -> tuple[QKV, Array]:
        found = cuattn.reference.linear_attention_backward(dout, *qkv, **self.decay(gates))
        return (found.dq, found.dk, found.dv), self.gate_gradient(gates, found.ddecay)


class DifferentialAttention(Kind):
    """`cuattn.differential_attention`: a pair of heads sees one head of values of twice the width.

    What the second head of a pair is subtracted with is the sigmoid of a gate, for each token.
    """

    def num_gates(self, heads: int) -> int:
        return heads // 2

    def split(self, qkv: Array) -> QKV:
        q, k, v = super().split(qkv)
        batch, seqlen, heads, head_dim = v.shape
        return q, k, v.reshape(batch, seqlen, heads // 2, 2 * head_dim)

    def factors(self, gates: Array) -> Array:
        return 1 / (1 + np.exp(-gates))

    def forward(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        factors = self.factors(gates)
        out, state = cuattn.differential_attention(*qkv, factors, causal=True, return_state=True)
        return out, (factors, state)

    def backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved, grads: QKV) -> Array:
        factors, state = saved
        found = cuattn.differential_attention_backward(dout, *qkv, factors, state, causal=True)
        for target, gradient in zip(grads, found[:3], strict=True):
            target[...] = gradient
        return found.dlam * factors * (1 - factors)

    def reference(self, qkv: QKV, gates: Array, options: dict[str, Any]) -> tuple[Array, Saved]:
        factors = self.factors(gates)
        return cuattn.reference.differential_attention(*qkv, factors, causal=True).out, (factors,)

    def reference_backward(self, dout: Array, qkv: QKV, gates: Array, saved: Saved) -> tuple[QKV, Array]:
        (factors,) = saved
        found = cuattn.reference.differential_attention_backward(dout, *qkv, factors, causal=True)
        return (found.dq, found.dk, found.dv), found.dlam * factors * (1 - factors)


KINDS: dict[str, Kind] = {
    "softmax": SoftmaxAttention(),
    "window": SoftmaxAttention(WINDOW),
    "block": BlockSparseAttention(),
    "linear": LinearAttention(),
    "gated": LinearAttention(gated=True),
    "differential": DifferentialAttention(),
}
