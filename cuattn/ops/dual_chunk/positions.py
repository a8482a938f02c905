"""Where keys and queries of dual-chunk attention stand, and how much sharper a longer context makes its logits.

* Chenxin An, Fei Huang, Jun Zhang, Shansan Gong, Xipeng Qiu, Chang Zhou and Lingpeng Kong, "Training-free long-context
  scaling of large language models", 2024 (arXiv:2402.17463).
* An Yang et al., "Qwen2.5-1M technical report", 2025 (arXiv:2501.15383).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np

from cuattn.allocation import allocating
from cuattn.errors import DTypeError
from cuattn.ops.rotary.arguments import on_device
from cuattn.runtime.executor import Executor, executor_for, executor_of_module
from cuattn.scalars import MAX_EXTENT, as_integer, choice, integer

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
        Of the kind and shape of ``positions``, int64.

    Raises
    ------
    ArgumentError
        Not 0 < W < C <= 2**31.
    ArrayTypeError, DTypeError
        ``positions`` are no integers.
    OutOfMemoryError
        The host has not got the memory for so many.

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
    executor, array = _integers("positions", positions)
    with executor.on_device(), _allocating(executor, "where positions stand", 16 * array.size):
        return array.astype(np.int64) % length


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
        ``trained`` below 1, a ``seqlen`` below 0, one of either above 2**31 - 1, or an unknown ``kind``.
    ArrayTypeError, DTypeError
        ``seqlen`` is no integer and no array of them.
    OutOfMemoryError
        The host has not got the memory for so many.

    Examples
    --------
    >>> import cuattn
    >>> round(cuattn.dual_chunk_logit_factor(1_000_000, 262_144, "qwen"), 4)
    1.2857
    """
    weight = _WEIGHTS[choice("kind", kind, _WEIGHTS)]
    trained_on = integer("trained", trained, 1, MAX_EXTENT)
    if as_integer(seqlen) is not None:
        number = integer("seqlen", seqlen, 0, MAX_EXTENT)
        return float((weight * math.log(max(1.0, number / trained_on)) + 1) ** 2)
    executor, array = _integers("seqlen", seqlen)
    with executor.on_device(), _allocating(executor, "factors for seqlen", 24 * array.size):
        stretched = executor.xp.maximum(array / trained_on, 1.0)
        return (weight * executor.xp.log(stretched) + 1) ** 2


def _allocating(executor: Executor, what: str, nbytes: int) -> AbstractContextManager[None]:
    return allocating(what, nbytes if executor.name == "host" else 0)


def _integers(name: str, x: Any) -> tuple[Executor, Any]:
    """Return an array, or a list as one, and the executor that it belongs to. Raises `ArrayTypeError`, `DTypeError`."""
    executor = executor_for(**{name: x}) if on_device(name, x) else executor_of_module(np)
    array = executor.metadata(name, x)
    if array.dtype.kind not in "iu" and (array.size or array.dtype != np.float64):  # that of a list without elements
        raise DTypeError(f"{name} has dtype {array.dtype}; integers are allowed")
    return executor, array
