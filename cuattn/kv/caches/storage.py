"""The arrays of a paged cache: pages of keys and values of every layer, and the scales of quantized ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuattn.allocation import allocating
from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, ShapeError
from cuattn.formats import KV_FORMATS, KVFormat, numpy_dtype
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.kv.caches.journal import Journal
from cuattn.messages import shown
from cuattn.runtime.executor import executor_for
from cuattn.runtime.places import HOST, describe, host_array, host_list, place
from cuattn.scalars import as_real, check_dtype, choice, real

__all__ = ["PageStorage"]


class PageStorage:
    """Arrays [num_pages, num_layers, page_size, num_kv_heads, ...]: a page's layers lie together.

    So one copy moves a page whole: for copy-on-write, or to the host and back. A layer's view has the shape [num_pages,
    page_size, ...] and a large page stride, which kernels take like any other.

    Attributes
    ----------
    executor : Executor
        Of the device that was current when the cache was made.
    arrays : dict
        By name: "k_pages", "v_pages"; "k_scale", "v_scale" (float32, one number a slot and head) or "k_block_scales",
        "v_block_scales", where the format has them and nothing was calibrated.
    layers : list of dict
        What `append_kv` and `paged_attention` take of each layer, by the name of the parameter.
    """

    def __init__(
        self,
        array_module: Any,
        extents: tuple[int, int, int, int],
        head_dims: tuple[int, int],
        kv_format: KVFormat,
        given_scales: dict[str, Any],
    ) -> None:
        num_pages, num_layers, page_size, num_kv_heads = extents
        self.kv_format = kv_format
        fixed = {name: _scales(name, scale, num_layers, num_kv_heads) for name, scale in given_scales.items()}
        slots = (num_pages, num_layers, page_size, num_kv_heads)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for side, head_dim in zip("kv", head_dims, strict=True):
            shapes[f"{side}_pages"] = (*slots, kv_format.items(head_dim)), kv_format.dtypes[-1]
            if kv_format.block_size:
                shapes[f"{side}_block_scales"] = (*slots, kv_format.blocks(head_dim)), kv_format.block_scale_dtypes[-1]
            elif kv_format.quantized and f"{side}_scale" not in fixed:
                shapes[f"{side}_scale"] = slots, "float32"
        made = {name: (shape, numpy_dtype(dtype)) for name, (shape, dtype) in shapes.items()}
        nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in made.values())
        told = f"a cache of {num_pages * page_size} slots, num_layers {num_layers} and num_kv_heads {num_kv_heads},"
        with allocating(told, nbytes if array_module is np else 0):
            self.arrays = {name: array_module.zeros(shape, dtype) for name, (shape, dtype) in made.items()}
        self.executor = executor_for(**self.arrays)
        with self.executor.on_device():
            put = {name: x if isinstance(x, float) else self.executor.put(x, np.float32) for name, x in fixed.items()}
            self.layers = [
                {
                    "kv_format": kv_format.name,
                    **{name: x[:, layer] for name, x in self.arrays.items()},
                    **{name: x if isinstance(x, float) else x[layer] for name, x in put.items()},
                }
                for layer in range(num_layers)
            ]

    @property
    def nbytes(self) -> int:
        return sum(int(x.nbytes) for x in self.arrays.values())

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages whole, on the device."""
        from cuattn.kv.copy import copy_pages

        src, dst = (np.array(pages, np.int64) for pages in (sources, targets))
        for x in self.arrays.values():
            copy_pages(x, src, dst)

    def keep(self, journal: Journal, pages: Sequence[int]) -> None:
        """Let what pages hold be put back if what the caller does next is undone: for pages that were just evicted."""
        if pages:
            with self.executor.on_device():
                index = self.executor.put(np.array(pages, np.int64), np.int64)
                journal.note(self._put_back, index, [x[index] for x in self.arrays.values()])

    def _put_back(self, index: Any, contents: Sequence[Any]) -> None:
        with self.executor.on_device():
            for x, values in zip(self.arrays.values(), contents, strict=True):
                x[index] = values

    def to_host(self, pages: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
        """Return the contents of pages, once the device has computed them."""
        with self.executor.on_device():
            index = self.executor.put(np.array(pages, np.int64), np.int64)
            copies = [x[index] for x in self.arrays.values()]
            host = [x if isinstance(x, np.ndarray) else x.get() for x in copies]
        return list(zip(*host, strict=True))

    def from_host(self, pages: Sequence[int], contents: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Write what `to_host` read onto other pages."""
        with self.executor.on_device():
            index = self.executor.put(np.array(pages, np.int64), np.int64)
            for x, values in zip(self.arrays.values(), zip(*contents, strict=True), strict=True):
                x[index] = self.executor.put(np.stack(values), x.dtype)


def check_format(dtype: Any, kv_format: Any, head_dims: dict[str, int]) -> KVFormat:
    """Return the format of a cache for numbers of ``dtype``; raises `DTypeError` or `ArgumentError`."""
    dtype = check_dtype("dtype", dtype, ELEMENTS)
    kv_format = dtype.name if kv_format is None else choice("kv_format", kv_format, KV_FORMATS, optional=True)
    row = KV_FORMATS[kv_format]
    if not row.quantized and row.name != dtype.name:
        raise ArgumentError(f"kv_format is {kv_format!r}, but dtype {dtype}; a plain format is the dtype's own")
    if row.quantized and dtype == np.float64:
        raise DTypeError(f"dtype is float64; kv_format {row.name} takes float16, bfloat16 and float32")
    for name, head_dim in head_dims.items():
        if head_dim > MAX_HEAD_DIM:
            raise ArgumentError(f"{name} is {head_dim}; 1 to {MAX_HEAD_DIM} are allowed")
        if head_dim % row.elements_per_item:
            raise ArgumentError(
                f"{name} is {head_dim}; kv_format {row.name} needs a multiple of {row.elements_per_item}"
            )
    return row


def check_scales(kv_format: KVFormat, scales: dict[str, Any]) -> dict[str, Any]:
    """Return the scales that were given, and those that a format with block scales has if none were."""
    given = {name: scale for name, scale in scales.items() if scale is not None}
    if given and not kv_format.quantized:
        raise ArgumentError(f"{next(iter(given))} was given; kv_format {kv_format.name} has no scales")
    if kv_format.name == "nvfp4":  # its block scales are float8, which reach neither far up nor far down
        return {name: 1.0 if scale is None else scale for name, scale in scales.items()}
    if given and kv_format.block_size:
        raise ArgumentError(f"{next(iter(given))} was given; kv_format {kv_format.name} has only block scales")
    return given


def _scales(name: str, scale: Any, num_layers: int, num_kv_heads: int) -> float | np.ndarray:
    """Return scales as a number, or float32 [num_layers, num_kv_heads]."""
    shape = num_layers, num_kv_heads
    if as_real(scale) is not None:
        values = np.array(real(name, scale))
    else:
        found = place(name, scale) if not isinstance(scale, list | tuple) else HOST
        if found != HOST:
            raise ArrayTypeError(f"{name} is {describe(found, scale)}; numbers on the host are allowed")
        values = host_list(name, scale) if isinstance(scale, list | tuple) else host_array(name, scale)
    if values.dtype.kind not in "iuf" and values.dtype not in DTYPES:
        raise DTypeError(f"{name} has dtype {values.dtype}; numbers are needed")
    if values.shape not in ((), shape[1:], shape, (num_layers, 1), (1, num_kv_heads), (1,)):
        allowed = f"a number, [{num_kv_heads}] and [{num_layers}, {num_kv_heads}]"
        raise ShapeError(f"{name} has shape {list(values.shape)}; {allowed} are allowed")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise NonFiniteError(f"{name} is {shown(scale)}; finite numbers above 0 are needed")
    return np.ascontiguousarray(np.broadcast_to(values, shape)) if values.ndim else float(values)
