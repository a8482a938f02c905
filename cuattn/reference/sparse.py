"""Sparse attention: masks of blocks written out by elements, and attention with such a mask.

The builders give grids of blocks, each straight from its definition: a condition on the pair of blocks, or, where
blocks are about elements, on every pair of elements that lies in them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuattn.reference.attention import attention
from cuattn.reference.backward import Gradients, attention_backward
from cuattn.reference.softmax import Array
from cuattn.reference.visibility import diagonal, visible

__all__ = [
    "bigbird_mask",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "expand_blocks",
    "global_mask",
    "local_mask",
    "streaming_mask",
    "strided_attention",
    "strided_attention_backward",
    "strided_mask",
    "strided_visible",
    "vertical_slash_mask",
]


def expand_blocks(
    blocks: ArrayLike, seqlen_q: int, seqlen_k: int, block_size: tuple[int, int], elements: ArrayLike | None = None
) -> Array:
    """Write a grid of blocks [..., nq, nk] out by elements, [..., N, M]: pair (i, j) is what block (i//bq, j//bk) is.

    `elements` [nnz, bq, bk] say which elements of the kept blocks are visible, blocks in the order of their rows.

    >>> expand_blocks([[1, 0], [0, 1]], 3, 4, (2, 2)).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    """
    grid = np.asarray(blocks) != 0
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    row, column = i // block_size[0], j // block_size[1]
    dense = np.asarray(grid[..., row, column])
    if elements is not None:
        number = np.cumsum(grid).reshape(grid.shape) - 1  # of a kept block, among all that are
        if np.size(elements):
            dense = dense & np.asarray(elements)[number[..., row, column], i % block_size[0], j % block_size[1]]
    return dense


def _with_mask(mask: Array, options: dict[str, Any]) -> dict[str, Any]:
    given = options.get("mask")
    return {**options, "mask": mask if given is None else mask & (np.asarray(given) != 0)}


def block_sparse_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: Array, **options: Any
) -> tuple[Array, Array]:
    """:func:`cuattn.reference.attention` with one more mask, of elements, [N, M] or broadcast to [B, H, N, M]."""
    return attention(q, k, v, **_with_mask(mask, options))


def block_sparse_attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike | None,
    lse: ArrayLike | None,
    mask: Array,
    **options: Any,
) -> Gradients:
    """Return the gradients of :func:`block_sparse_attention`."""
    return attention_backward(dout, q, k, v, out, lse, **_with_mask(mask, options))


def strided_visible(
    seqlen_q: int, seqlen_k: int, stride: int, *, local: int | None = None, causal: bool | str = True
) -> Array:
    """Say which key each query sees under the strided pattern, [N, M].

    With a the key that query i is aligned with, i + M - N (i with ``causal="top_left"``): key j is visible if a - j is
    a multiple of `stride`, or |a - j| < `local`; and, if `causal`, j <= a. Child et al., 2019 (arXiv:1904.10509).

    >>> strided_visible(5, 5, 3, local=1).astype(int).tolist()
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    """
    behind = diagonal(seqlen_q, seqlen_k, causal)[0, 0] - np.arange(seqlen_k)
    seen = behind % stride == 0
    if local is not None:
        seen = seen | (np.abs(behind) < local)
    return np.asarray(seen & visible(seqlen_q, seqlen_k, causal=causal)[0, 0])


def strided_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    stride: int,
    *,
    local: int | None = None,
    causal: bool | str = True,
    **options: Any,
) -> tuple[Array, Array]:
    """Return :func:`cuattn.reference.attention` under :func:`strided_visible`."""
    seen = strided_visible(np.shape(q)[1], np.shape(k)[1], stride, local=local, causal=causal)
    return attention(q, k, v, mask=seen, **options)


def strided_attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike | None,
    lse: ArrayLike | None,
    stride: int,
    *,
    local: int | None = None,
    causal: bool | str = True,
    **options: Any,
) -> Gradients:
    """Return the gradients of :func:`strided_attention`."""
    seen = strided_visible(np.shape(q)[1], np.shape(k)[1], stride, local=local, causal=causal)
    return attention_backward(dout, q, k, v, out, lse, mask=seen, **options)


def local_mask(seqlen_q: int, seqlen_k: int, block_size: tuple[int, int], left: int | None, right: int | None) -> Array:
    """Keep a block if some pair (i, j) in it has -left <= j - (i + M - N) <= right; None is no bound.

    >>> local_mask(4, 4, (2, 2), 0, 0).astype(int).tolist()
    [[1, 0], [0, 1]]
    """
    seen = visible(seqlen_q, seqlen_k, window=(left, right))[0, 0]
    bq, bk = block_size
    rows, columns = range(0, seqlen_q, bq), range(0, seqlen_k, bk)
    kept = [[seen[i : i + bq, j : j + bk].any() for j in columns] for i in rows]
    return np.array(kept, bool).reshape(len(rows), len(columns))


def strided_mask(nq: int, nk: int, stride: int, local: int) -> Array:
    """Keep block (I, J) if |I' - J| < local, or J is the last of its `stride`: J = stride - 1 modulo `stride`.

    I' = I + nk - nq, the block that I is aligned with. Child et al., 2019, "fixed" pattern.

    >>> strided_mask(4, 4, 2, 1).astype(int).tolist()
    [[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1]]
    """
    aligned, key = np.arange(nq)[:, None] + nk - nq, np.arange(nk)
    return np.asarray((np.abs(aligned - key) < local) | (key % stride == stride - 1))


def global_mask(nq: int, nk: int, blocks: ArrayLike) -> Array:
    """Keep block (I, J) if I' = I + nk - nq or J is one of `blocks`.

    >>> global_mask(3, 3, [0]).astype(int).tolist()
    [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    aligned, key = np.arange(nq)[:, None] + nk - nq, np.arange(nk)
    return np.asarray(np.isin(aligned, blocks) | np.isin(key, blocks))


def streaming_mask(nq: int, nk: int, sinks: int, local: int) -> Array:
    """Keep the first `sinks` blocks of keys, and the last `local` up to the block that the query block is aligned with.

    Nothing behind that block is kept. Xiao et al., 2023 (arXiv:2309.17453).

    >>> streaming_mask(4, 4, 1, 1).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    """
    aligned, key = np.arange(nq)[:, None] + nk - nq, np.arange(nk)
    return np.asarray(((key < sinks) | (aligned - key < local)) & (key <= aligned))


def vertical_slash_mask(
    seqlen_q: int, seqlen_k: int, block_size: tuple[int, int], vertical: ArrayLike, slash: ArrayLike
) -> Array:
    """Keep a block if a causal pair (i, j) in it has j in `vertical`, or (i + M - N) - j in `slash`.

    Jiang et al., "MInference 1.0", 2024 (arXiv:2407.02490).
    """
    j, aligned = np.arange(seqlen_k), np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    seen = (np.isin(j, vertical) | np.isin(aligned - j, slash)) & (j <= aligned)
    bq, bk = block_size
    rows, columns = range(0, seqlen_q, bq), range(0, seqlen_k, bk)
    kept = [[seen[a : a + bq, b : b + bk].any() for b in columns] for a in rows]
    return np.array(kept, bool).reshape(len(rows), len(columns))


def bigbird_mask(
    nq: int,
    nk: int,
    *,
    num_window: int = 3,
    num_global: int = 1,
    num_random: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> Array:
    """Keep a window, the first and last blocks both ways, and in each row some more at random.

    The window of row I is `num_window` blocks around I' = I + nk - nq, the longer half to the left. Random blocks are
    drawn without replacement among those that the row lacks (with `causal`, up to I'), row after row from one
    generator, ``numpy.random.Generator(numpy.random.Philox(key=seed))``. Zaheer et al., 2020 (arXiv:2007.14062).
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    kept = np.zeros((nq, nk), bool)
    for row in range(nq):
        aligned = row + nk - nq
        for column in range(nk):
            in_window = aligned - num_window // 2 <= column <= aligned + (num_window - 1) // 2
            is_global = any(n < num_global or n >= nk - num_global for n in (aligned, column))
            kept[row, column] = (in_window or is_global) and (column <= aligned or not causal)
        lacks = [column for column in range(nk) if not kept[row, column] and (column <= aligned or not causal)]
        kept[row, draw.permutation(np.array(lacks, np.int64))[:num_random]] = True
    return kept
