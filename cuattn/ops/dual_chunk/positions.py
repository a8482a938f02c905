"""Where keys and queries of dual-chunk attention stand, and how much sharper a longer context makes its logits.

* Chenxin An, Fei Huang, Jun Zhang, Shansan Gong, Xipeng Qiu, Chang Zhou and Lingpeng Kong, "Training-free long-context
  scaling of large language models", 2024 (arXiv:2402.17463).
* An Yang et al., "Qwen2.5-1M technical report", 2025 (arXiv:2501.15383).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from cuattn.errors import ArgumentError, DTypeError
from cuattn.scalars import as_integer, as_real, choice, integer, real

__all__ = ["Chunking", "LogitFactorKind", "check_chunking", "dual_chunk_logit_factor", "dual_chunk_positions"]

MAX_CHUNK = 2**31
LogitFactorKind = Literal["qwen", "chunkllama"]
_WEIGHTS = {"qwen": 0.1, "chunkllama": 0.05}


class Chunking(NamedTuple):
    """C = ``chunk_size`` and W = ``local_size`` that have been checked."""

    chunk_size: int
    local_size: int

    @property
    def length(self) -> int:
        """L, the keys of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def far_position(self) -> int:
        """Where queries stand to keys of older chunks; to those of the chunk before, none stands beyond."""
        return min(2 * self.length - 1, self.chunk_size)

    def last_position(self, seqlen_q: int, seqlen_k: int) -> int:
        """Return the last position that a query or a key of a sequence stands at; -1 without keys."""
        last = min(seqlen_k, self.length) - 1  # of keys
        first, end = max(seqlen_k - seqlen_q, 0), seqlen_k  # of the queries that see keys
        if first >= end:
            return last
        within = self._last_within(first, end)
        last = max(last, within)
        if end > self.length:
            within = self._last_within(max(first, self.length), end)
            last = max(last, min(within + self.length, self.chunk_size))
        return max(last, self.far_position) if end > 2 * self.length else last

    def _last_within(self, first: int, end: int) -> int:
        """Return the largest p mod L of the positions ``first`` to ``end`` - 1."""
        length = self.length
        return length - 1 if end // length > first // length else (end - 1) % length


def check_chunking(chunk_size: Any, local_size: Any) -> Chunking:
    """Return C and W. Raises `ArgumentError` unless 0 < W < C <= 2^31."""
    chunk = integer("chunk_size", chunk_size, 2, MAX_CHUNK)
    local = as_integer(local_size)
    if local is None or not 0 < local < chunk:
        integer("local_size", local_size, 1, chunk - 1)
    return Chunking(chunk, int(local or 0))


def dual_chunk_positions(positions: Any, chunk_size: int, local_size: int) -> Any:
    """Return where keys of dual-chunk attention stand: position modulo L, with L = chunk_size - local_size.

    Keys that are turned there once serve queries at any distance: `cuattn.append_kv` with these positions fills a
    cache for `cuattn.dual_chunk_decode`, and ``rope`` of them is what ``keys_rotated=True`` asks for.

    Parameters
    ----------
    positions : int, or integers of any shape
        Of keys in their sequences. A list becomes a NumPy array; a CuPy array stays on its device.
    chunk_size : int, C, from 2 to 2**31
    local_size : int, W, from 1 to C - 1

    Returns
    -------
    int or array
        Of the kind, shape and dtype of ``positions``.

    Raises
    ------
    ArgumentError
        Not 0 < W < C <= 2**31.
    DTypeError
        ``positions`` are no integers.

    Examples
    --------
    >>> import cuattn
    >>> cuattn.dual_chunk_positions([0, 5, 6, 13], 8, 2)
    array([0, 5, 0, 1])
    """
    length = check_chunking(chunk_size, local_size).length
    number = as_integer(positions)
    if number is not None:
        return number % length
    array = np.asarray(positions) if isinstance(positions, list | tuple) else positions
    kind = getattr(getattr(array, "dtype", None), "kind", None)
    if isinstance(array, np.ndarray) and array.size == 0 and kind == "f":  # a list without elements
        return array.astype(np.int64)
    if kind is None or kind not in "iu":
        raise DTypeError(f"positions has dtype {getattr(array, 'dtype', type(array).__name__)}; integers are allowed")
    return array % array.dtype.type(length) if length <= np.iinfo(array.dtype).max else array % length


def dual_chunk_logit_factor(seqlen: Any, trained: int, kind: LogitFactorKind) -> Any:
    """Return ``logit_factor`` for a context of ``seqlen`` tokens, of a model that was trained on ``trained``.

    (0.1 ln s + 1)^2 for "qwen", (0.05 ln s + 1)^2 for "chunkllama", with s = max(1, seqlen / trained). It belongs to a
    call, not to its keys: a cache serves every length.

    Parameters
    ----------
    seqlen : int, or integers [batch]
        A list becomes a NumPy array; a CuPy array stays on its device.
    trained : int
    kind : {"qwen", "chunkllama"}

    Returns
    -------
    float, or array [batch], float64

    Raises
    ------
    ArgumentError
        ``trained`` below 1, an unknown ``kind``, or a ``seqlen`` that is no number.

    Examples
    --------
    >>> import cuattn
    >>> round(cuattn.dual_chunk_logit_factor(1_000_000, 262_144, "qwen"), 4)
    1.2857
    """
    weight = _WEIGHTS[choice("kind", kind, _WEIGHTS)]
    trained_on = real("trained", trained, "a number of at least 1 is allowed", lambda number: number >= 1)
    number = as_real(seqlen)
    if number is not None:
        seqlen = real("seqlen", seqlen)
        return float((weight * np.log(max(1.0, seqlen / trained_on)) + 1) ** 2)
    array = np.asarray(seqlen) if isinstance(seqlen, list | tuple) else seqlen
    if getattr(getattr(array, "dtype", None), "kind", "O") not in "iuf":
        raise ArgumentError(f"seqlen is of type {type(seqlen).__name__}; a number or an array of numbers is allowed")
    stretched = (array / trained_on).clip(1.0, None)
    return (weight * np.log(stretched) + 1) ** 2
