"""What bias and mask do to each tile of the logits: hide it, leave it open, or neither (attention_mask_tiles.cu)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import WARP_SIZE
from cuattn.ops.attention.option_checks import LogitArray
from cuattn.ops.attention.options import Options
from cuattn.ops.attention.variants import EVERYTHING, LOGIT_FLAGS
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout

__all__ = ["find", "shape"]

_NUM_WARPS = 4  # one tile a warp
_NO_STRIDES = 0, 0, 0, 0


def shape(options: Options, block_m: int, block_n: int) -> tuple[int, int, int, int] | None:
    """Return the shape of the classes, [batch, heads, query tiles, key tiles], an axis 1 where both are broadcast.

    None where there is nothing to classify: neither bias nor mask, or a kernel without tiles.
    """
    if (options.bias is None and options.mask is None) or block_n == 0:
        return None
    batch, heads, seqlen_q, seqlen_k = _extents(options)
    return batch, heads, -(-seqlen_q // block_m), -(-seqlen_k // block_n)


def find(executor: Executor, options: Options, block_m: int, block_n: int, classes: Any) -> LogitArray:
    """Fill ``classes``, a uint8 array of `shape`, and say how it is broadcast."""
    if classes.size:
        given = {"bias": options.bias, "mask": options.mask}
        batch, heads, seqlen_q, seqlen_k = (np.int32(extent) for extent in _extents(options))
        strides_of = struct_layout("attention_mask_tiles", "LogitStrides")
        args = {
            **{f"g_{name}": None if x is None else x.array for name, x in given.items()},
            "g_tile_class": classes,
            **{name: strides_of.pack(**_by_axis(x)) for name, x in given.items()},
            "num_batch": batch,
            "num_heads": heads,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "block_m": np.int32(block_m),
            "block_n": np.int32(block_n),
        }
        kernel = _kernel(executor, "float32" if options.bias is None else options.bias.array.dtype.name)
        executor.launch(kernel, (-(-classes.size // _NUM_WARPS),), (_NUM_WARPS * WARP_SIZE,), args)
    executor.finish(classes)
    _, heads, q_tiles, k_tiles = classes.shape
    strides = heads * q_tiles * k_tiles, q_tiles * k_tiles, k_tiles, 1
    return LogitArray(
        classes,
        tuple(stride if extent > 1 else 0 for stride, extent in zip(strides, classes.shape, strict=True)),  # type: ignore[arg-type]
    )


def _by_axis(x: LogitArray | None) -> dict[str, int]:
    return dict(zip(("batch", "head", "query", "key"), _NO_STRIDES if x is None else x.strides, strict=True))


def _extents(options: Options) -> list[int]:
    """Return the extents of the axes along which bias or mask vary; 1 of the others."""
    given = [x for x in (options.bias, options.mask) if x is not None]
    return [
        extent if any(x.strides[axis] for x in given) else min(extent, 1)
        for axis, extent in enumerate(given[0].array.shape)
    ]


@cache
def _kernel(executor: Executor, bias_dtype: str) -> Kernel:
    constants = replace(EVERYTHING, bias_dtype=bias_dtype).constants()
    wanted = {name: constants[name] for name in (*map(str.upper, LOGIT_FLAGS), "BiasElement")}
    return executor.kernel("attention_mask_tiles", {**wanted, "NUM_WARPS": _NUM_WARPS}, "cuattn_attention_mask_tiles")
