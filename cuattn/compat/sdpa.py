"""PyTorch's `scaled_dot_product_attention` for arrays: its layout, argument names and mask meaning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import cuattn
from cuattn.compat.libraries import SDPA_OPTIONS
from cuattn.compat.names import SDPA
from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import DTypeError, ShapeError
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag

__all__ = ["scaled_dot_product_attention"]


@renamed(SDPA)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> Any:
    """`cuattn.attention` under the name, layout and argument meaning of ``torch.nn.functional``.

    Parameters
    ----------
    query : array [..., heads, seqlen_q, head_dim]; float16, bfloat16, float32 or float64
        Any number of leading axes; [heads, seqlen_q, head_dim] and [seqlen_q, head_dim] too. Nothing is copied for up
        to one leading axis; several are folded into one, which copies arrays whose strides do not allow it.
    key : array [..., kv_heads, seqlen_k, head_dim], dtype of ``query``
    value : array [..., kv_heads, seqlen_k, head_dim_v], dtype of ``query``
        The leading axes of the three broadcast, and so do the heads when one of the counts is 1. Where ``key`` has
        rank 4 and more keys than there are values, and there is no mask, keys without a value are not seen; PyTorch
        does the same there, and refuses it elsewhere.
    attn_mask : array that broadcasts to [..., heads, seqlen_q, seqlen_k], optional
        Boolean: True = attend (the opposite of a padding mask). Floating: added to the logits. With ``is_causal`` both
        hold, as on PyTorch's paths for rank 4, and here for every rank.
    dropout_p : float
        Probability that a softmax probability is dropped. It applies in every call: pass 0 for evaluation.
    is_causal : bool
        Key j is visible to query i when j <= i, whatever the lengths: the diagonal starts at the top left.
    scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    enable_gqa : bool
        Allow fewer key/value heads than query heads: query head h reads key/value head h // (heads // kv_heads).
        ``key`` and ``value`` may then differ in their heads; a copy repeats those of either to a common multiple.
    dropout_seed, dropout_offset : int
        Not in PyTorch, which draws them from its global generator: as for `cuattn.attention`, with the leading axes
        folded into one batch. The seed is needed whenever ``dropout_p`` is not 0.

    Returns
    -------
    array [..., heads, seqlen_q, head_dim_v], dtype of ``query``
        A view of a contiguous [..., seqlen_q, heads, head_dim_v] array, so that merging the heads of the next layer
        copies nothing. A query that sees no key gives zeros.

    Raises
    ------
    ShapeError
        A rank below 2, leading axes or a mask that do not broadcast, or counts of heads or keys that do not fit each
        other.
    ArgumentError
        A flag that is no bool, or dropout without a seed.
    DTypeError
        A mask that is neither boolean nor floating, or another dtype that `cuattn.attention` does not take.
    CuattnError
        Everything else that `cuattn.attention` refuses.

    References
    ----------
    Vaswani et al., "Attention is all you need", 2017; Ainslie et al., "GQA: training generalized multi-query
    transformer models from multi-head checkpoints", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat import scaled_dot_product_attention
    >>> query = np.zeros((2, 3, 32), np.float32)  # 2 heads, 3 queries
    >>> value = np.arange(4, dtype=np.float32).reshape(1, 4, 1)  # one head of 4 keys
    >>> key = np.zeros((1, 4, 32), np.float32)
    >>> scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[1, :, 0]
    array([0. , 0.5, 1. ], dtype=float32)
    >>> mask = np.array([False, True, False, True])
    >>> scaled_dot_product_attention(query, key, value, mask[None], enable_gqa=True)[0, :, 0]
    array([2., 2., 2.], dtype=float32)
    """
    enable_gqa = check_flag("enable_gqa", enable_gqa)
    options = SDPA_OPTIONS.options(
        scale=scale,
        is_causal=is_causal,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )
    arrays = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        arrays["attn_mask"] = attn_mask
    executor = executor_for(**arrays)
    arrays = {name: executor.asarray(name, x) for name, x in arrays.items()}
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    batch, heads, kv_heads = _leading_axes(query, key, value, enable_gqa)
    key = _with_values(key, value, attn_mask is not None)
    if attn_mask is not None:
        target = (*batch, heads, query.shape[-2], key.shape[-2])
        options |= _mask_option(executor, arrays["attn_mask"], target)
    q = _fold(executor, query, batch, heads)
    k, v = (_fold(executor, _repeat_heads(executor, x, kv_heads), batch, kv_heads) for x in (key, value))
    # The transposed views cost nothing: kernels take strides.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = cuattn.attention(q, k, v, **options)
    rank = max(query.ndim, key.ndim, value.ndim)
    out = out.swapaxes(1, 2)
    return out.reshape((*batch, *out.shape[1:])[-rank:])


def _leading_axes(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[tuple[int, ...], int, int]:
    """The batch axes that the three broadcast to, the number of query heads and of key/value heads."""
    shapes = {"query": tuple(query.shape), "key": tuple(key.shape), "value": tuple(value.shape)}
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ShapeError(f"{name} has shape {shape}; [..., heads, seqlen, head_dim] is needed, at least 2 axes")
    try:
        batch = np.broadcast_shapes(*(shape[:-3] for shape in shapes.values()))
    except ValueError:
        told = ", ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ShapeError(f"{told}: the axes before [heads, seqlen, head_dim] do not broadcast") from None
    heads, key_heads, value_heads = (shape[-3] if len(shape) > 2 else 1 for shape in shapes.values())
    kv_heads = value_heads if key_heads == 1 else key_heads
    if key_heads != value_heads and 1 not in (key_heads, value_heads):
        if not enable_gqa:
            raise ShapeError(
                f"key has {key_heads} heads and value has {value_heads}; they must be the same, or one of them 1, "
                "without enable_gqa=True"
            )
        kv_heads = math.lcm(key_heads, value_heads)
        if not kv_heads or heads % kv_heads:
            raise ShapeError(
                f"query has {heads} heads, key has {key_heads} and value has {value_heads}; theirs must divide those "
                "of query"
            )
    if heads % kv_heads == 0 if kv_heads and (enable_gqa or kv_heads == 1) else heads == kv_heads:
        return batch, heads, kv_heads
    if heads == 1 and not enable_gqa:
        return batch, kv_heads, kv_heads
    raise ShapeError(
        f"query has {heads} heads and key and value have {kv_heads}; "
        + ("theirs must divide the query's" if enable_gqa else "they must be the same without enable_gqa=True")
    )


def _with_values(key: Any, value: Any, masked: bool) -> Any:
    """The keys that have a value."""
    num_keys, num_values = int(key.shape[-2]), int(value.shape[-2])
    if num_keys == num_values:
        return key
    if num_keys < num_values or key.ndim != 4 or masked:
        raise ShapeError(
            f"key has shape {tuple(key.shape)} and value has shape {tuple(value.shape)}; as many keys as values are "
            "needed (of rank 4 and without attn_mask, key may have more)"
        )
    return key[:, :, :num_values]


def _repeat_heads(executor: Executor, x: Any, heads: int) -> Any:
    """``x`` with as many heads, each repeated where it has fewer; a single head is broadcast later."""
    own = int(x.shape[-3]) if x.ndim > 2 else 1
    if own in (1, heads):
        return x
    with executor.on_device():
        return executor.xp.repeat(x, heads // own, axis=-3)


def _fold(executor: Executor, x: Any, batch: tuple[int, ...], heads: int) -> Any:
    """``x`` broadcast to [*batch, heads, rows, columns], as an array of rank 4."""
    return _reshape(executor, x, (*batch, heads, *x.shape[-2:]), (math.prod(batch), heads, *x.shape[-2:]))


def _mask_option(executor: Executor, mask: Any, target: tuple[int, ...]) -> dict[str, Any]:
    """``mask`` or ``bias`` of `cuattn.attention`, of rank 4; an axis of length 1 stays one where it can."""
    if mask.dtype != np.bool_ and mask.dtype not in DTYPES:
        raise DTypeError(f"attn_mask has dtype {mask.dtype}; bool and {', '.join(ELEMENTS)} (native) are allowed")
    shape = tuple(mask.shape)
    padded = (1,) * (len(target) - len(shape)) + shape
    if len(padded) != len(target) or any(n not in (1, wanted) for n, wanted in zip(padded, target, strict=True)):
        raise ShapeError(f"attn_mask has shape {shape}, which does not broadcast to {target}")
    batch = target[:-3]
    if all(n == 1 for n in padded[:-3]):
        batch = (1,) * len(batch)
    folded = _reshape(executor, mask, (*batch, *padded[-3:]), (math.prod(batch), *padded[-3:]))
    return {"mask" if mask.dtype == np.bool_ else "bias": folded}


def _reshape(executor: Executor, x: Any, broadcast: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    with executor.on_device():
        if tuple(x.shape) != broadcast:
            x = executor.xp.broadcast_to(x, broadcast)
        return x.reshape(shape)
