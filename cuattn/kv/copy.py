"""copy_pages: pages of a cache onto other pages, as copy-on-write wants it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.addresses import address, as_bytes, share_elements
from cuattn.compile import Constant
from cuattn.errors import ArgumentError, OverlapError, ShapeError
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.runtime.checks import check_axis, check_writable
from cuattn.runtime.executor import MAX_GRID, Executor, executor_for
from cuattn.runtime.structs import struct_layout
from cuattn.scalars import MAX_EXTENT

__all__ = ["copy_pages"]

NUM_THREADS = 256
NUM_AXES = 4
UNITS_PER_THREAD = 4
#: What a thread moves at once, by its bytes.
UNITS = {16: "uint4", 8: "uint2", 4: "unsigned", 2: "unsigned short", 1: "unsigned char"}


def copy_pages(pages: Any, src: Any, dst: Any, *, axis: int = 0) -> None:
    """Copy page ``src[i]`` onto page ``dst[i]`` for every i, in place and in one launch.

    Bytes are copied as they are, whatever they stand for. All copies are made at once, in no order: no page that is
    read may be written.

    Parameters
    ----------
    pages : array of any rank and dtype, written in place
        Of any strides. NumPy arrays run on the host executor, CuPy arrays on the GPU. The keys and values of all layers
        in one array [layers, 2, num_pages, ...] are copied together, with ``axis=2``.
    src, dst : integers [n]
        Lists, NumPy arrays, or int32 or int64 arrays on the device of ``pages``.
    axis : int
        The axis of ``pages`` that counts them; the others are parts of a page.

    Raises
    ------
    ArrayTypeError, DTypeError
        An argument is no array, or is read-only; ``src`` or ``dst`` holds no integers; arrays are not of one kind.
    ShapeError
        ``pages`` has rank 0, or ``src`` and ``dst`` are not lists of one length.
    ArgumentError
        ``axis`` is not one of ``pages``; or, of what the host sees: a page that does not exist, one that is written
        twice, or one that is both read and written.
    OverlapError
        Elements of ``pages`` share memory, among themselves or with the lists.

    Nothing has been written then. Lists on a device are not looked at (``CUATTN_CHECK=1`` does): a pair with a page
    that does not exist is skipped, and what a page holds that is written twice, or both read and written, is not known.

    References
    ----------
    Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023
    (arXiv:2309.06180), section 4.4.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> pages = np.arange(8).reshape(4, 2)
    >>> cuattn.copy_pages(pages, [3, 3], [0, 1])
    >>> pages.tolist()
    [[6, 7], [6, 7], [4, 5], [6, 7]]
    """
    lists = {name: x for name, x in (("src", src), ("dst", dst)) if rotary_arguments.on_device(name, x)}
    executor = executor_for(pages=pages, **lists)
    pages = executor.asarray("pages", pages)
    axis = check_axis(axis, pages.ndim, "pages")
    (src, src_seen), (dst, dst_seen) = (
        rotary_arguments.integers(executor, name, x) for name, x in (("src", src), ("dst", dst))
    )
    _check(pages, axis, src, dst)
    _check_pages(int(pages.shape[axis]), src_seen, dst_seen)
    if not pages.size or not src.shape[0]:
        return
    for part, runs in _parts(pages, axis):
        _launch(executor, part, runs, src, dst)


def _check(pages: Any, axis: int, src: Any, dst: Any) -> None:
    if src.ndim != 1 or src.shape != dst.shape:
        raise ShapeError(f"src has shape {tuple(src.shape)} and dst {tuple(dst.shape)}; lists of one length are needed")
    check_writable("pages", pages)
    for name, x in (("src", src), ("dst", dst)):
        if share_elements(pages, x):
            raise OverlapError(f"pages shares memory with {name}; what is written must lie apart")


def _check_pages(num_pages: int, src: np.ndarray[Any, Any] | None, dst: np.ndarray[Any, Any] | None) -> None:
    """Check the page numbers that the host sees."""
    for name, pages in (("src", src), ("dst", dst)):
        if pages is None or not pages.size:
            continue
        wrong = (pages < 0) | (pages >= num_pages)
        if wrong.any():
            i = int(wrong.argmax())
            raise ArgumentError(f"{name}[{i}] is {int(pages[i])}; pages 0 to {num_pages - 1} exist")
    if dst is None:
        return
    used = np.sort(dst)
    twice = used[1:][used[1:] == used[:-1]]
    if twice.size:
        raise ArgumentError(f"dst holds page {int(twice[0])} twice; a page can be written once")
    both = np.intersect1d(dst, src) if src is not None else dst[:0]
    if both.size:
        raise ArgumentError(f"page {int(both[0])} is in src and in dst; the copies are made at once, in no order")


@dataclass(frozen=True, slots=True)
class Runs:
    """The bytes of a page: neighboring ones are a run, and runs are numbered over axes (extent, stride in bytes)."""

    num_pages: int
    page_stride: int
    axes: tuple[tuple[int, int], ...]
    run_bytes: int
    unit_bytes: int

    @property
    def num_runs(self) -> int:
        return math.prod(extent for extent, _ in self.axes)


def fold(pages: Any, axis: int) -> Runs:
    """Return the runs of a page of ``pages``, whose strides are not negative but for that of ``axis``.

    >>> fold(np.zeros((4, 2, 100, 16, 8, 64), np.float16), 2)
    Runs(num_pages=100, page_stride=16384, axes=((8, 1638400),), run_bytes=16384, unit_bytes=16)
    """
    dims = [(n, s) for i, (n, s) in enumerate(zip(pages.shape, pages.strides, strict=True)) if i != axis and n > 1]
    # In the order of memory: a transposed view is the same pages.
    dims.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, int]] = []
    for extent, stride in (*dims, (pages.dtype.itemsize, 1)):
        if merged and merged[-1][1] == extent * stride and merged[-1][0] * extent <= MAX_EXTENT:
            merged[-1] = (merged[-1][0] * extent, stride)
        else:
            merged.append((extent, stride))
    *axes, (run_bytes, _) = merged
    page_stride = pages.strides[axis] if pages.shape[axis] > 1 else 0
    unit_bytes = math.gcd(max(UNITS), address(pages), run_bytes, page_stride, *(stride for _, stride in axes))
    return Runs(int(pages.shape[axis]), page_stride, tuple(axes), run_bytes, unit_bytes)


def _parts(pages: Any, axis: int) -> Iterator[tuple[Any, Runs]]:
    """Return ``pages``, or the parts of it if a page has more strided axes than the kernel counts."""
    backward = tuple(slice(None, None, -1 if s < 0 and i != axis else 1) for i, s in enumerate(pages.strides))
    pages = pages[backward]  # from the lowest address on
    runs = fold(pages, axis)
    if len(runs.axes) <= NUM_AXES:
        yield pages, runs
        return
    first = next(i for i, extent in enumerate(pages.shape) if i != axis and extent > 1)
    for i in range(pages.shape[first]):
        yield from _parts(pages[(slice(None),) * first + (i,)], axis - (first < axis))


def _launch(executor: Executor, pages: Any, runs: Runs, src: Any, dst: Any) -> None:
    run_units = runs.run_bytes // runs.unit_bytes
    axes = [(1, 0)] * (NUM_AXES - len(runs.axes)) + list(runs.axes)
    layout = struct_layout("copy_pages", "PagesLayout").pack(
        num_pages=runs.num_pages,
        page_stride=runs.page_stride // runs.unit_bytes,
        strides=[stride // runs.unit_bytes for _, stride in axes],
        extents=[extent for extent, _ in axes],
        num_runs=runs.num_runs,
        run_units=run_units,
        src_stride=src.strides[0] // src.dtype.itemsize,
        dst_stride=dst.strides[0] // dst.dtype.itemsize,
        src_is_64_bit=src.dtype.itemsize == 8,
        dst_is_64_bit=dst.dtype.itemsize == 8,
    )
    block_x = min(NUM_THREADS, 1 << (-(-run_units // UNITS_PER_THREAD) - 1).bit_length())
    block_y = NUM_THREADS // block_x
    grid = (
        int(src.shape[0]),
        min(-(-run_units // (block_x * UNITS_PER_THREAD)), MAX_GRID[1]),
        min(-(-runs.num_runs // block_y), MAX_GRID[2]),
    )
    kernel = executor.kernel("copy_pages", constants(runs.unit_bytes), "cuattn_copy_pages")
    args = {"g_pages": as_bytes(pages), "g_src": src, "g_dst": dst, "layout": layout}
    executor.launch(kernel, grid, (block_x, block_y), args)


def constants(unit_bytes: int) -> dict[str, Constant]:
    """Return the kernel's compile-time constants."""
    return {"NUM_THREADS": NUM_THREADS, "Unit": UNITS[unit_bytes]}
