"""Which probabilities dropout keeps: Philox4x32-10, a function of (seed, offset, batch, head, query, key) alone.

John K. Salmon, Mark A. Moraes, Ron O. Dror and David E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011
(doi:10.1145/2063384.2063405).

One call of the generator serves the four elements (i, j), (i, j + 8), (i + 8, j), (i + 8, j + 8) of a 16 by 16 square,
which one thread holds of a tensor-core fragment of S and of its transpose alike: no word is drawn and thrown away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["dropout_keep", "kept", "philox4x32_10"]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW_WORD, _WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
_SQUARE = 16  # queries and keys of a square; half of them is the distance of the elements that share a call


def philox4x32_10(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> NDArray[Any]:
    """Return the four random words, uint32 [4, ...], of counters whose four words broadcast against each other.

    >>> [f"{int(word):08x}" for word in philox4x32_10((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    key_0, key_1 = key
    for _ in range(10):
        product_0, product_1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # of 32-bit words: exact in 64 bits
        x0, x2 = (
            (product_1 >> _WORD_BITS) ^ x1 ^ np.uint64(key_0),
            (product_0 >> _WORD_BITS) ^ x3 ^ np.uint64(key_1),
        )
        x1, x3 = product_1 & _LOW_WORD, product_0 & _LOW_WORD
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def kept(
    threshold: int, seed: int, offset: int, batch_heads: ArrayLike, rows: range, columns: range
) -> NDArray[np.bool_]:
    """Say which elements have a random word below `threshold`, bool [len(batch_heads), len(rows), len(columns)].

    `batch_heads` holds b * H + h; `rows` are queries and `columns` keys.
    """
    if rows.step != 1 or columns.step != 1:
        return _kept_one_by_one(threshold, seed, offset, batch_heads, rows, columns)
    first_row, first_column = rows.start // _SQUARE, columns.start // _SQUARE
    row_squares = np.arange(first_row, max(-(-rows.stop // _SQUARE), first_row))
    column_squares = np.arange(first_column, max(-(-columns.stop // _SQUARE), first_column))
    half = np.arange(_SQUARE // 2)
    row_words = (8 * row_squares[:, None] + half).reshape(1, -1, 1)
    column_words = (8 * column_squares[:, None] + half).reshape(1, 1, -1)
    head_words = np.asarray(batch_heads, dtype=np.uint64).reshape(-1, 1, 1)
    words = philox4x32_10((column_words, row_words, head_words, offset), (seed & 0xFFFFFFFF, seed >> 32))
    # [half of i, half of j, batch and head, square of i, i % 8, square of j, j % 8], to the order of i and of j
    shape = 2, 2, head_words.size, row_squares.size, 8, column_squares.size, 8
    words = words.reshape(shape).transpose(2, 3, 0, 4, 5, 1, 6)
    words = words.reshape(head_words.size, row_squares.size * _SQUARE, column_squares.size * _SQUARE)
    top, left = rows.start - first_row * _SQUARE, columns.start - first_column * _SQUARE
    return np.asarray(words[:, top : top + len(rows), left : left + len(columns)] < np.uint64(threshold))


def _kept_one_by_one(
    threshold: int, seed: int, offset: int, batch_heads: ArrayLike, rows: range, columns: range
) -> NDArray[np.bool_]:
    """Say the same where few of the elements that share a call are wanted."""
    i, j = np.arange(len(rows)) * rows.step + rows.start, np.arange(len(columns)) * columns.step + columns.start
    row_words, column_words = (8 * (x // _SQUARE) + x % 8 for x in (i[:, None], j))
    head_words = np.asarray(batch_heads, dtype=np.uint64).reshape(-1, 1, 1)
    words = philox4x32_10((column_words, row_words, head_words, offset), (seed & 0xFFFFFFFF, seed >> 32))
    word_idx = 2 * (i[:, None] // 8 % 2) + j // 8 % 2
    own = np.take_along_axis(words, np.broadcast_to(word_idx, words.shape[1:])[None], axis=0)[0]
    return np.asarray(own < np.uint64(threshold))


def dropout_keep(
    shape: tuple[int, int, int, int],
    *,
    dropout_p: float,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    dropout_origin: tuple[Any, ...] | None = None,
) -> NDArray[np.bool_]:
    """Return which probabilities [B, H, N, M] are kept: those whose word is below floor((1 - p) 2^32).

    With `dropout_origin` (batch, head, query, key, heads of the mask or None, step) element (b, h, i, j) is element
    (batch + b, head + h, query + i step, key + j step) of a mask.

    >>> whole = dropout_keep((2, 3, 40, 40), dropout_p=0.5)
    >>> part = dropout_keep((1, 2, 9, 11), dropout_p=0.5, dropout_origin=(1, 1, 3, 5, 3, 2))
    >>> bool((part == whole[1:, 1:, 3:21:2, 5:27:2]).all())
    True
    """
    batch, num_heads, seqlen_q, seqlen_k = shape
    b0, h0, i0, j0, *rest = dropout_origin or (0, 0, 0, 0)
    of_mask, step = rest or (None, 1)
    of_mask = num_heads if of_mask is None else of_mask
    batch_heads = (np.arange(b0, b0 + batch)[:, None] * of_mask + np.arange(h0, h0 + num_heads)).ravel()
    threshold = int((1.0 - dropout_p) * 2.0**32)
    rows, columns = range(i0, i0 + seqlen_q * step, step), range(j0, j0 + seqlen_k * step, step)
    words = kept(threshold, dropout_seed, dropout_offset, batch_heads.astype(np.uint64) & _LOW_WORD, rows, columns)
    return words.reshape(shape)
