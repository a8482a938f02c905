"""Which probabilities dropout keeps: Philox4x32-10, a function of (seed, offset, batch, head, query, key) alone.

John K. Salmon, Mark A. Moraes, Ron O. Dror and David E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011
(doi:10.1145/2063384.2063405).

One call of the generator serves the four elements (i, j), (i, j + 8), (i + 8, j), (i + 8, j + 8) of a 16 by 16 square,
which one thread holds of a tensor-core fragment of S and of its transpose alike: no word is drawn and thrown away.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuattn.allocation import allocating
from cuattn.scalars import MAX_EXTENT, integer, real

__all__ = ["Dropout", "check_dropout", "dropout_mask", "kept", "philox4x32_10"]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW_WORD, _WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
_SQUARE = 16  # queries and keys of a square; half of them is the distance of the elements that share a call


class Dropout(NamedTuple):
    """Dropout as a kernel takes it: a 32-bit random word below ``threshold`` keeps its probability."""

    threshold: int  #: floor((1 - p) 2^32): 2^32 keeps everything, so 64 bits are needed to compare
    seed_low: int
    seed_high: int
    offset: int
    rescale: float  #: 1 / (1 - p)


def check_dropout(dropout_p: Any, dropout_seed: Any, dropout_offset: Any) -> Dropout:
    """The three arguments in the form that kernels take; raises as documented at `dropout_mask`.

    >>> check_dropout(0.25, 2**32 + 5, 7)
    Dropout(threshold=3221225472, seed_low=5, seed_high=1, offset=7, rescale=1.3333333333333333)
    """
    p = real("dropout_p", dropout_p, "a finite number from 0 to below 1 is needed", lambda p: 0 <= p < 1)
    seed = integer("dropout_seed", dropout_seed, 0, 2**64 - 1)
    offset = integer("dropout_offset", dropout_offset, 0, 2**32 - 1)
    return Dropout(int((1.0 - p) * 2.0**32), seed & 0xFFFFFFFF, seed >> 32, offset, 1.0 / (1.0 - p))


def philox4x32_10(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> NDArray[Any]:
    """The four random words, uint32 [4, ...], of counters whose four words broadcast against each other.

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


def kept(dropout: Dropout, batch_heads: ArrayLike, rows: range, columns: range) -> NDArray[np.bool_]:
    """What `dropout_mask` gives for some of its elements, bool [len(batch_heads), len(rows), len(columns)].

    `batch_heads` holds b * H + h; `rows` are queries and `columns` keys, in steps of 1.
    """
    first_row, first_column = rows.start // _SQUARE, columns.start // _SQUARE
    row_squares = np.arange(first_row, max(-(-rows.stop // _SQUARE), first_row))
    column_squares = np.arange(first_column, max(-(-columns.stop // _SQUARE), first_column))
    half = np.arange(_SQUARE // 2)
    row_words = (8 * row_squares[:, None] + half).reshape(1, -1, 1)
    column_words = (8 * column_squares[:, None] + half).reshape(1, 1, -1)
    head_words = np.asarray(batch_heads, dtype=np.uint64).reshape(-1, 1, 1)
    words = philox4x32_10((column_words, row_words, head_words, dropout.offset), (dropout.seed_low, dropout.seed_high))
    # [half of i, half of j, batch and head, square of i, i % 8, square of j, j % 8], to the order of i and of j
    shape = 2, 2, head_words.size, row_squares.size, 8, column_squares.size, 8
    words = words.reshape(shape).transpose(2, 3, 0, 4, 5, 1, 6)
    words = words.reshape(head_words.size, row_squares.size * _SQUARE, column_squares.size * _SQUARE)
    top, left = rows.start - first_row * _SQUARE, columns.start - first_column * _SQUARE
    return np.asarray(words[:, top : top + len(rows), left : left + len(columns)] < np.uint64(dropout.threshold))


def dropout_mask(
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    dropout_p: float,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
) -> NDArray[np.bool_]:
    """The probabilities that `cuattn.attention` keeps with these dropout arguments.

    The mask does not depend on tiles, on the executor, or on the direction (forward or backward); a longer sequence
    only adds rows and columns to it. It is computed with NumPy, bit for bit what the kernels compute, and is never
    stored by them.

    Parameters
    ----------
    batch, num_heads, seqlen_q, seqlen_k : int
        The extents of the call; of a packed call the number of sequences and the largest lengths, since queries and
        keys count from the start of their sequence.
    dropout_p : float
        Probability of dropping, 0 <= dropout_p < 1.
    dropout_seed : int
        Key of the generator, 0 <= dropout_seed < 2^64.
    dropout_offset : int
        Last word of its counter, 0 <= dropout_offset < 2^32: another one, such as the number of the layer or of the
        step, gives an independent mask.

    Returns
    -------
    kept : bool array [batch, num_heads, seqlen_q, seqlen_k]
        True where a probability is kept; attention multiplies those by 1 / (1 - dropout_p).

    Raises
    ------
    ArgumentError
        An extent, the seed or the offset is not an integer of its range, or ``dropout_p`` is no number of its range.
    NonFiniteError
        ``dropout_p`` is NaN or infinite.
    OutOfMemoryError
        The host has not got the memory for such a mask.

    References
    ----------
    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox4x32-10).

    Examples
    --------
    >>> import cuattn
    >>> cuattn.dropout_mask(1, 1, 2, 6, dropout_p=0.5, dropout_seed=1).astype(int)[0, 0]
    array([[0, 0, 1, 0, 1, 1],
           [0, 0, 0, 0, 1, 0]])
    """
    dropout = check_dropout(dropout_p, dropout_seed, dropout_offset)
    named = {"batch": batch, "num_heads": num_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    shape = tuple(integer(name, extent, 0, MAX_EXTENT) for name, extent in named.items())
    # 64-bit words of the generator, some at a time, for every element
    told = ", ".join(f"{name} {extent}" for name, extent in zip(named, shape, strict=True))
    with allocating(f"a mask of {told}", 48 * math.prod(shape)):
        batch_heads = np.arange(shape[0] * shape[1], dtype=np.uint64) & _LOW_WORD
        return kept(dropout, batch_heads, range(shape[2]), range(shape[3])).reshape(shape)
