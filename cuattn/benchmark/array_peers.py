"""Attention by its formula in NumPy, SciPy and CuPy, and JAX's function for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cuattn.benchmark.peer import Inputs, PeerError, require_aligned_causal, require_few_logits
from cuattn.testing.cases import AttentionCase, SoftmaxCase

__all__ = ["cupy_attention", "cupy_softmax", "jax_attention", "numpy_attention", "scipy_softmax"]


def cupy_attention(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare attention by the formula in CuPy: two products, and the matrix of logits in memory."""
    import cupy

    require_few_logits(case)
    return partial(_unfused, cupy, case, *_operands(cupy, case, inputs))


def numpy_attention(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare attention by the formula in NumPy, on the CPU, in float32 where the arrays have 16 bits."""
    require_few_logits(case)
    return partial(_unfused, np, case, *_operands(np, case, inputs))


def _operands(xp: Any, case: AttentionCase, inputs: Inputs) -> tuple[Any, Any, Any, Any]:
    """Arrange q, k and v as matrices a head, and what a causal mask hides."""
    q, k, v = (inputs[name] for name in "qkv")
    if xp is np and q.dtype.itemsize == 2:  # NumPy has no products in 16 bits that anyone would wait for
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
    if q.dtype.name == "bfloat16":  # CuPy has no bfloat16 product; float16 takes as long
        q, k, v = (x.astype(np.float32).astype(np.float16) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (xp.repeat(x, group, axis=2) for x in (k, v))
    offset = 0 if case.causal == "top_left" else case.num_keys - case.seqlen_q
    hidden = ~xp.tri(case.seqlen_q, case.num_keys, offset, dtype=bool) if case.causal else None
    return q.transpose(0, 2, 1, 3), keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3), hidden


def _unfused(xp: Any, case: AttentionCase, q: Any, keys: Any, values: Any, hidden: Any) -> Any:
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    logits = q @ keys
    if logits.dtype.itemsize == 2:
        logits = logits.astype(np.float32)
    logits = logits * logits.dtype.type(scale)
    if hidden is not None:
        logits[..., hidden] = -np.inf
    p = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return (p.astype(q.dtype) @ values).transpose(0, 2, 1, 3)


def cupy_softmax(case: SoftmaxCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare softmax by the formula in CuPy, a kernel an operation."""
    import cupy

    x = inputs["x"]
    if case.kind != "softmax" or x.dtype.name == "bfloat16":
        raise PeerError("not written")

    def call() -> Any:
        exponentials = cupy.exp(x - x.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    return call


def scipy_softmax(case: SoftmaxCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare SciPy's function of the same name."""
    from scipy import special

    x = inputs["x"]
    if x.dtype.name == "bfloat16":
        raise PeerError("it knows no bfloat16")
    return partial(getattr(special, case.kind), x, axis=-1)


def jax_attention(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare JAX's dot_product_attention, compiled; its call waits, as JAX has streams of its own."""
    import jax

    require_aligned_causal(case)
    q, k, v = (jax.numpy.asarray(inputs[name]) for name in "qkv")
    attend = jax.jit(partial(jax.nn.dot_product_attention, scale=case.scale, is_causal=bool(case.causal)))
    first = inputs["q"]

    def call() -> Any:
        out = attend(q, k, v).block_until_ready()
        if isinstance(first, np.ndarray):
            return np.asarray(out)
        import cupy

        return cupy.from_dlpack(out.astype(np.float32) if first.dtype.name == "bfloat16" else out)

    return call
