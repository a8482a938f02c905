"""Global memory on the host: arrays that count as never written, and the regions that a launch may touch."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from ..addresses import address
from ..allocation import new_bytes
from ..errors import DTypeError, UninitializedReadError
from ..scalars import any_dtype, integer
from .library import ReadOnlyStruct, RegionStruct
from .settings import checks

ALIGNMENT = 256  # what cudaMalloc gives
ADDRESSABLE, READY = 1, 3  # executor.h
RECORD_BYTES = 16  # GlobalStamp of race_records.c
FRESH_BYTES = 1 << 25  # from here on an allocation is new pages from the kernel, which are zero
_MOST = 2**63 - 1


@dataclass(slots=True, eq=False)
class _Tracked:
    """State bytes of an array made by `empty`, for as long as ``owner``, which has its memory, lives."""

    base: int
    state: np.ndarray
    owner: weakref.ref[np.ndarray]


# By address. Threads share it: it is changed by single operations, and never iterated over but as a copy.
_tracked: dict[int, _Tracked] = {}


def _track(raw: np.ndarray, base: int, nbytes: int) -> None:
    def released(owner: weakref.ref[np.ndarray]) -> None:
        found = _tracked.get(base)
        if found is not None and found.owner is owner:
            _tracked.pop(base, None)

    # An entry appears together with what removes it, so that an exception between two instructions leaves none behind.
    _tracked[base] = _Tracked(base, np.full(nbytes, ADDRESSABLE, np.uint8), weakref.ref(raw, released))


def empty(shape: Sequence[int] | int, dtype: DTypeLike) -> np.ndarray:
    """Make an array that nothing has written yet.

    While a checker is on its bytes are poison (0xFF: NaN in every float format), and with the init checker kernels may
    not read what no kernel wrote, until `finish` makes it an ordinary array. Aligned as memory from ``cudaMalloc`` is.
    """
    dtype = any_dtype("dtype", dtype)
    if dtype.hasobject or not dtype.itemsize:
        raise DTypeError(f"dtype is {dtype}; memory of a kernel holds neither Python objects nor elements of no size")
    return new_array(_extents(shape), dtype)


def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Do what `empty` does, of a shape and dtype that are known to be good."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = new_bytes("an array", shape, nbytes + ALIGNMENT)
    base = address(raw)
    start = -base % ALIGNMENT
    active = checks()
    if active:
        raw[start : start + nbytes] = 0xFF
    if "init" in active and nbytes:
        _track(raw, base + start, nbytes)
    return np.ndarray(shape, dtype, raw, start)


def _extents(shape: Sequence[int] | int) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list):
        return (integer("shape", shape, 0, _MOST),)
    return tuple(integer(f"shape[{i}]", extent, 0, _MOST) for i, extent in enumerate(shape))


def finish(*arrays: np.ndarray) -> None:
    """Make arrays from `empty` ordinary ones.

    Raises
    ------
    UninitializedReadError
        The init checker is on and some element was never written: whoever reads the result would read it.
    """
    for array in arrays:
        found = _tracked_of(array)
        if found is None:
            continue
        _tracked.pop(found.base, None)
        if "init" in checks():
            offset = bounds(array)[0] - found.base
            states = _element_states(array, found.state[offset:])
            if not (states == READY).all():
                index = np.argwhere(states != READY)[0]
                where = ", ".join(str(i) for i in index[: array.ndim])
                missing = int((states != READY).any(axis=-1).sum())
                raise UninitializedReadError(
                    f"{missing} of {array.size} elements of a result of shape {array.shape} were never written, "
                    f"the first at [{where}]"
                )


def _element_states(array: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Return the state bytes of each element of ``array``: shape [*array.shape, itemsize]."""
    return np.lib.stride_tricks.as_strided(state, (*array.shape, array.itemsize), (*array.strides, 1), writeable=True)


def _tracked_of(array: np.ndarray) -> _Tracked | None:
    if not _tracked or not array.size:
        return None
    low, high = bounds(array)
    found = _tracked.get(low)
    if found is None:
        found = next((t for t in list(_tracked.values()) if t.base <= low and high <= t.base + t.state.size), None)
    return found if found is not None and found.owner() is not None else None


def forget(arrays: Iterable[tuple[int, np.ndarray]]) -> None:
    """Stop tracking arrays that go to a launch without checkers: nobody notes what it writes."""
    if _tracked:
        for _, array in arrays:
            found = _tracked_of(array)
            if found is not None:
                _tracked.pop(found.base, None)


def bounds(array: np.ndarray) -> tuple[int, int]:
    """Return the first byte of an array, and one past the last."""
    start = array.__array_interface__["data"][0]
    if array.flags.c_contiguous:
        return start, start + array.nbytes
    low = high = start
    for extent, stride in zip(array.shape, array.strides, strict=True):
        if extent == 0:
            return start, start
        if stride < 0:
            low += (extent - 1) * stride
        else:
            high += (extent - 1) * stride
    return low, high + array.itemsize


@dataclass(slots=True)
class _Extent:
    low: int
    high: int
    array: np.ndarray
    argument: int


class Regions:
    """The stretches of memory that a launch may touch, as C structs. Keeps alive what they point to."""

    def __init__(self, arrays: Iterable[tuple[int, np.ndarray]], *, init: bool, race: bool, mem: bool) -> None:
        extents = [_Extent(*bounds(array), array, argument) for argument, array in arrays if array.size]
        extents.sort(key=lambda e: e.low)
        groups: list[list[_Extent]] = []
        top = -1
        for extent in extents:
            if groups and extent.low < top:
                groups[-1].append(extent)
            else:
                groups.append([extent])
                top = -1
            top = max(top, extent.high)
        self.keep: list[np.ndarray] = []
        self.structs = (RegionStruct * max(1, len(groups)))()
        self.count = len(groups)
        for struct, group in zip(self.structs, groups, strict=False):
            low, high = group[0].low, max(e.high for e in group)
            struct.base, struct.end, struct.argument = low, high, group[0].argument
            struct.granule_log2 = min(4, *(e.array.itemsize for e in group), 4).bit_length() - 1
            if init or mem:
                struct.state = self._state(group, low, high, init)
            if race:
                lines = (high >> 4) - (low >> 4) + 1
                total = lines + ((high - low) >> struct.granule_log2) + 1
                struct.writes = self._records(lines, total)
                struct.reads = struct.writes + total * RECORD_BYTES

    def _records(self, lines: int, total: int) -> int:
        """Make room for ``total`` records of writes, then of reads; first one for each line of 16 bytes.

        Those behind the lines are made when they are first used, so only the lines are cleared; but large memory comes
        cleared and without cost, page by page as it is used.
        """
        shape = (2, total, RECORD_BYTES)
        if math.prod(shape) >= FRESH_BYTES:
            memory = np.zeros(shape, np.uint8)
        else:
            memory = np.empty(shape, np.uint8)
            memory[:, :lines] = 0
        self.keep.append(memory)
        return address(memory)

    def _state(self, group: list[_Extent], low: int, high: int, init: bool) -> int | None:
        tracked = _tracked_of(group[0].array)
        if tracked is not None:
            self.keep.append(tracked.state)
            return tracked.state.ctypes.data + low - tracked.base
        if all(e.array.flags.forc and e.low == low and e.high == high for e in group):
            return None
        state = np.zeros(high - low, np.uint8)
        for extent in group:
            start = extent.array.__array_interface__["data"][0] - low
            _element_states(extent.array, state[start:])[...] = READY
        self.keep.append(state)
        return state.ctypes.data

    @property
    def address(self) -> int:
        return ctypes.addressof(self.structs)


def read_only_stretches(arrays: Sequence[tuple[int, np.ndarray]]) -> ctypes.Array[ReadOnlyStruct] | None:
    """Find what a launch must not write, as C structs: its read-only arrays, but where writable ones cover them.

    None where there is nothing of the kind, as almost always.
    """
    protected = [(argument, array) for argument, array in arrays if not array.flags.writeable and array.size]
    if not protected:
        return None
    writable = sorted(bounds(array) for _, array in arrays if array.flags.writeable and array.size)
    stretches = []
    for argument, array in protected:
        low, high = bounds(array)
        for start, end in writable:
            if start < high and low < end:
                if low < start:
                    stretches.append(ReadOnlyStruct(low, start, argument))
                low = max(low, end)
        if low < high:
            stretches.append(ReadOnlyStruct(low, high, argument))
    return (ReadOnlyStruct * len(stretches))(*stretches)
