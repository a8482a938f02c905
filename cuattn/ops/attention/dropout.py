"""Which probabilities dropout keeps: Philox4x32-10, a function of (seed, offset, batch, head, query, key) alone.

John K. Salmon, Mark A. Moraes, Ron O. Dror and David E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011
(doi:10.1145/2063384.2063405).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.allocation import allocating
from cuattn.errors import ArgumentError
from cuattn.messages import shown
from cuattn.reference.dropout import dropout_keep
from cuattn.scalars import MAX_EXTENT, integer, real

__all__ = ["Dropout", "DropoutOrigin", "check_dropout", "check_origin", "dropout_mask"]

_BLOCK = 16  # queries and keys of a block of the mask, in which four elements share a call of the generator
_LOW_WORD = 2**32 - 1


class DropoutOrigin(NamedTuple):
    """Where a call lies in a larger one, so that dropout drops in it what it drops there: ``dropout_origin``.

    The mask of the larger call is that of `cuattn.dropout_mask`. Element (b, h, i, j) of the call has there the place
    (``batch`` + b, ``head`` + h, ``query`` + i * ``step``, ``key`` + j * ``step``). So a part of a sequence that some
    other device has the rest of, a part of the heads, or one sequence of many keeps what it would keep in the whole.

    Attributes
    ----------
    batch, head, query, key : int, from 0 to 2^31 - 1
        The place of the first element. With packed sequences queries and keys count from the start of each.
    num_heads : int, optional
        Of the larger call; by default as many as the call has.
    step : int, from 1 to 2^31 - 1
        From a query, and a key, of the call to the next one: more than 1 where positions are dealt out in turn.

    Notes
    -----
    Tensor-core kernels draw one random number for four elements where ``query`` and ``key`` are multiples of 16 and
    ``step`` is 1; elsewhere one for each.

    Examples
    --------
    >>> import cuattn
    >>> whole = cuattn.dropout_mask(2, 4, 48, 48, dropout_p=0.5)
    >>> origin = cuattn.DropoutOrigin(batch=1, head=2, query=16, key=32, num_heads=4)
    >>> part = cuattn.dropout_mask(1, 2, 32, 16, dropout_p=0.5, dropout_origin=origin)
    >>> bool((part == whole[1:, 2:, 16:, 32:]).all())
    True
    """

    batch: int = 0
    head: int = 0
    query: int = 0
    key: int = 0
    num_heads: int | None = None
    step: int = 1


class Dropout(NamedTuple):
    """Dropout as a kernel takes it: a 32-bit random word below ``threshold`` keeps its probability."""

    threshold: int  #: floor((1 - p) 2^32): 2^32 keeps everything, so 64 bits are needed to compare
    seed_low: int
    seed_high: int
    offset: int
    rescale: float  #: 1 / (1 - p)
    head_step: int = 1  #: head x of the call, batch included, is head x * head_step + first_head of the mask
    first_head: int = 0
    absent_heads: int = 0  #: that the mask has more in each batch entry
    first_query: int = 0
    first_key: int = 0
    step: int = 1
    by_element: bool = False  #: whether the elements that share a call of the generator are not those of a thread

    def of_part(self, origin: DropoutOrigin, num_heads: int) -> Dropout:
        """Return the dropout of a call with so many heads that begins at ``origin``, which has been checked."""
        of_mask = num_heads if origin.num_heads is None else origin.num_heads
        return self._replace(
            first_head=(origin.batch * of_mask + origin.head) & _LOW_WORD,
            absent_heads=of_mask - num_heads,
            first_query=origin.query,
            first_key=origin.key,
            step=origin.step,
            by_element=origin.step != 1 or origin.query % _BLOCK != 0 or origin.key % _BLOCK != 0,
        )

    def of_stream(self, stream: int) -> Dropout:
        """Return that of every second head: the pairs of streams become the heads. Heads are counted modulo 2^32."""
        return self._replace(head_step=2, first_head=(self.first_head + stream) & _LOW_WORD)


def check_origin(origin: Any, shape: Sequence[int | None]) -> DropoutOrigin:
    """Check ``dropout_origin`` of a call with [batch, heads, seqlen_q, seqlen_k], the lengths None if nobody knows.

    Raises `ArgumentError` for what is no place of a mask, or a place that leaves no room for the call.

    >>> check_origin((0, 0, 32, 7), (1, 1, 1, 1))
    DropoutOrigin(batch=0, head=0, query=32, key=7, num_heads=None, step=1)
    """
    if not isinstance(origin, tuple) or len(origin) not in (4, len(DropoutOrigin._fields)):
        raise ArgumentError(
            f"dropout_origin is {shown(origin)}; (batch, head, query, key), a cuattn.DropoutOrigin or None is needed"
        )
    given = DropoutOrigin(*origin)
    batch, head, query, key = (
        integer(f"{name} of dropout_origin", value, 0, MAX_EXTENT)
        for name, value in zip(DropoutOrigin._fields[:4], given[:4], strict=True)
    )
    step = integer("step of dropout_origin", given.step, 1, MAX_EXTENT)
    _, num_heads, *seqlens = shape
    assert num_heads is not None
    of_mask = None
    if given.num_heads is not None:
        of_mask = integer("num_heads of dropout_origin", given.num_heads, 0, MAX_EXTENT)
    if head + num_heads > (num_heads if of_mask is None else of_mask):
        has = "no num_heads" if of_mask is None else f"num_heads {of_mask}"
        raise ArgumentError(
            f"dropout_origin has head {head} and {has}; the mask needs as many heads as that and the {num_heads} of "
            "the call"
        )
    for name, first, seqlen in zip(("query", "key"), (query, key), seqlens, strict=True):
        if seqlen and first + step * (seqlen - 1) >= MAX_EXTENT:
            raise ArgumentError(
                f"dropout_origin has {name} {first} and step {step}; the last of {seqlen} would lie behind the "
                f"{MAX_EXTENT} that a mask may have"
            )
    return DropoutOrigin(batch, head, query, key, of_mask, step)


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
    dropout_origin: DropoutOrigin | tuple[int, ...] | None = None,
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
    dropout_origin : (batch, head, query, key) or DropoutOrigin, optional
        The mask is the part of a larger one that begins there: `cuattn.DropoutOrigin`.

    Returns
    -------
    kept : bool array [batch, num_heads, seqlen_q, seqlen_k]
        True where a probability is kept; attention multiplies those by 1 / (1 - dropout_p).

    Raises
    ------
    ArgumentError
        An extent, the seed or the offset is not an integer of its range, ``dropout_p`` is no number of its range, or
        ``dropout_origin`` is no place for such a part.
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
    origin = None if dropout_origin is None else check_origin(dropout_origin, shape)
    # 64-bit words of the generator, some at a time, for every element, or for four together
    words = 1 if origin is None or origin.step == 1 else 4
    told = ", ".join(f"{name} {extent}" for name, extent in zip(named, shape, strict=True))
    with allocating(f"a mask of {told}", 48 * words * math.prod(shape)):
        of_mask: dict[str, Any] = {"dropout_seed": seed, "dropout_offset": offset, "dropout_origin": origin}
        return dropout_keep((b, h, n, m), dropout_p=dropout_p, **of_mask)
