"""Which keys a query may see because of its position: the checks of the options that say so, and what hosts plan with.

>>> Bounds(left=2, right=0).keys(np.array([0, 64]), np.array([63, 99]), np.array([28, 28]), np.array([128, 128]))
(array([26, 90]), array([ 92, 128]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ArgumentError
from cuattn.messages import shown
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import as_flag, as_integer, integer

if TYPE_CHECKING:
    from cuattn.ops.attention.option_checks import Call
    from cuattn.ops.attention.options import Options

__all__ = ["NO_BOUNDS", "Bounds", "check_causal", "check_chunk", "check_diagonal_offset", "check_window"]

Integers = NDArray[np.int64]


class Bounds(NamedTuple):
    """Query i sees the keys i + o - left to i + o + right, `UNBOUNDED` on a side where there is no bound.

    The diagonal o is ``offset``, and ``from_end`` the number of keys minus that of queries more. With a ``chunk``,
    the query sees those of them alone that lie with key i + o in one piece of so many keys.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    from_end: bool = True
    offset: int = 0
    chunk: int = 0

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether keys may be hidden before, and after, some position: what kernels are compiled for."""
        return self.left != UNBOUNDED or self.chunk != 0, self.right != UNBOUNDED or self.chunk != 0

    def width(self, tokens: int) -> int | None:
        """Return how many keys ``tokens`` queries in a row see at most; None where that grows with all keys."""
        widths = [self.left + self.right + tokens] if UNBOUNDED not in (self.left, self.right) else []
        if self.chunk:  # the first query may be the last of its piece
            widths.append(self.chunk * (1 + -(-(tokens - 1) // self.chunk)))
        return min(widths, default=None)

    def diagonal(self, seqlens_q: Integers, seqlens_k: Integers) -> Integers:
        """Return o of sequences of so many queries and keys."""
        return (seqlens_k - seqlens_q) * self.from_end + self.offset

    def keys(self, first: Integers, last: Integers, diagonal: Integers, seqlens_k: Integers) -> tuple[Integers, ...]:
        """Return the first key that one of the queries ``first`` to ``last`` sees, and the one behind the last."""
        begin, end = _stretch(first + diagonal, last + diagonal, self.left, self.right, seqlens_k)
        if self.chunk:
            begin = np.maximum(begin, self._piece(first + diagonal))
            end = np.minimum(end, self._piece(last + diagonal) + self.chunk)
        return np.minimum(begin, seqlens_k), np.maximum(end, 0)

    def queries(self, first: Integers, last: Integers, diagonal: Integers, seqlens_q: Integers) -> tuple[Integers, ...]:
        """Return the first query that sees one of the keys ``first`` to ``last``, and the one behind the last."""
        begin, end = _stretch(first - diagonal, last - diagonal, self.right, self.left, seqlens_q)
        if self.chunk:
            begin = np.maximum(begin, self._piece(first) - diagonal)
            end = np.minimum(end, self._piece(last) + self.chunk - diagonal)
        return np.minimum(begin, seqlens_q), np.maximum(end, 0)

    def _piece(self, keys: Integers) -> Integers:
        """Return the first key of the pieces that keys lie in."""
        return keys // self.chunk * self.chunk


NO_BOUNDS = Bounds()
_CAUSAL = Bounds(right=0)


def _stretch(first: Integers, last: Integers, before: int, behind: int, limit: Integers) -> tuple[Integers, ...]:
    """Return what lies from ``before`` places before ``first`` to ``behind`` behind ``last``, of 0 to ``limit``."""
    begin, end = np.zeros_like(limit), limit
    if before != UNBOUNDED:
        begin = np.clip(first - before, 0, limit)
    if behind != UNBOUNDED:
        end = np.clip(last + behind + 1, 0, limit)
    return begin, end


def check_causal(options: Options, call: Call, value: Any) -> bool:
    """Check ``causal``: a window without keys after the diagonal, and the diagonal where "top_left" puts it."""
    if isinstance(value, str) and value in ("bottom_right", "top_left"):
        options.bounds = options.bounds._replace(right=0, from_end=value == "bottom_right")
        return True
    is_causal = value if type(value) is bool else as_flag(value)
    if is_causal is None:
        raise ArgumentError(f"causal is {shown(value)}; allowed are False, True, 'bottom_right' and 'top_left'")
    if is_causal:
        options.bounds = _CAUSAL if options.bounds is NO_BOUNDS else options.bounds._replace(right=0)
    return is_causal


def check_window(options: Options, call: Call, value: Any) -> bool:
    """Check ``window``: keys on both sides of the diagonal; without a bound on either, it is no option."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentError(f"window is {shown(value)}; a pair (left, right) or None is allowed")
    left, right = (_side(value, side) for side in value)
    options.bounds = options.bounds._replace(left=left, right=min(right, options.bounds.right))
    return (left, right) != (UNBOUNDED, UNBOUNDED)


def _side(given: Any, side: Any) -> int:
    if side is None:
        return UNBOUNDED
    number = as_integer(side)
    if number is None or not 0 <= number < UNBOUNDED:
        raise ArgumentError(
            f"window is {shown(given)}; each side is None (unbounded) or an integer from 0 to {UNBOUNDED - 1}"
        )
    return number


def check_chunk(options: Options, call: Call, value: Any) -> bool:
    """Check ``chunk``: a query sees keys of one piece alone."""
    options.bounds = options.bounds._replace(chunk=integer("chunk", value, 1, UNBOUNDED, optional=True))
    return True


def check_diagonal_offset(options: Options, call: Call, value: Any) -> bool:
    """Check ``diagonal_offset``: one o for all sequences, or one for each."""
    number = as_integer(value)
    if number is not None:
        if not -(2**31) < number < 2**31:
            raise ArgumentError(f"diagonal_offset is {shown(value)}; its magnitude must be below 2^31")
    elif isinstance(value, bool | float | str | np.generic):
        raise ArgumentError(f"diagonal_offset is {shown(value)}; an integer or int32 [batch] is allowed")
    else:
        shapes = ((call.logits_shape[0],),)
        options.diagonal_offsets = small_array(call.executor, "diagonal_offset", value, shapes, np.dtype(np.int32))
    options.bounds = options.bounds._replace(from_end=False, offset=number or 0)
    return True
