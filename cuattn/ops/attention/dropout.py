"""Which probabilities dropout keeps: Philox4x32-10, a function of (seed, offset, batch, head, query, key) alone.

John K. Salmon, Mark A. Moraes, Ron O. Dror and David E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011
(doi:10.1145/2063384.2063405).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.allocation import allocating
from cuattn.reference.dropout import dropout_keep
from cuattn.scalars import MAX_EXTENT, integer, real

__all__ = ["Dropout", "check_dropout", "dropout_mask"]


class Dropout(NamedTuple):
    """Dropout as a kernel takes it: a 32-bit random word below ``threshold`` keeps its probability."""

    threshold: int  #: floor((1 - p) 2^32): 2^32 keeps everything, so 64 bits are needed to compare
    seed_low: int
    seed_high: int
    offset: int
    rescale: float  #: 1 / (1 - p)
    head_step: int = 1  #: head x of the call, batch included, is head x * head_step + first_head of the mask
    first_head: int = 0


def check_dropout(dropout_p: Any, dropout_seed: Any, dropout_offset: Any) -> Dropout:
    """Return the three arguments in the form that kernels take; raises as documented at `dropout_mask`.

    >>> check_dropout(0.25, 2**32 + 5, 7)[:5]
    (3221225472, 5, 1, 7, 1.3333333333333333)
    """
    p = real("dropout_p", dropout_p, "a finite number from 0 to below 1 is needed", lambda p: 0 <= p < 1)
    seed = integer("dropout_seed", dropout_seed, 0, 2**64 - 1)
    offset = integer("dropout_offset", dropout_offset, 0, 2**32 - 1)
    return Dropout(int((1.0 - p) * 2.0**32), seed & 0xFFFFFFFF, seed >> 32, offset, 1.0 / (1.0 - p))


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
    """Return the probabilities that `cuattn.attention` keeps with these dropout arguments.

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
    seed, offset = dropout.seed_high << 32 | dropout.seed_low, dropout.offset
    named = {"batch": batch, "num_heads": num_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    b, h, n, m = shape = tuple(integer(name, extent, 0, MAX_EXTENT) for name, extent in named.items())
    # 64-bit words of the generator, some at a time, for every element
    told = ", ".join(f"{name} {extent}" for name, extent in zip(named, shape, strict=True))
    with allocating(f"a mask of {told}", 48 * math.prod(shape)):
        return dropout_keep((b, h, n, m), dropout_p=dropout_p, dropout_seed=seed, dropout_offset=offset)
