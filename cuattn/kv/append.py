"""append_kv: new keys and values into the slots of a cache, rotated and quantized on the way.

Pages of slots are those of W. Kwon et al., "Efficient memory management for large language model serving with
PagedAttention", 2023 (arXiv:2309.06180). The rotation is that of Su et al., "RoFormer", 2021 (arXiv:2104.09864); the
formats of 4 bits are those of B. Darvish Rouhani et al., "Microscaling data formats for deep learning", 2023
(arXiv:2310.10537).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.compile import Constant
from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.formats import KV_FORMATS, KVFormat
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.kv.arguments import AppendProblem, Side, check
from cuattn.ops.rotary.arguments import NO_ANGLES, Angles, Rotary
from cuattn.runtime.executor import MAX_GRID
from cuattn.runtime.structs import struct_layout

__all__ = ["append_kv"]

NUM_WARPS = 4
_SIZES = {"NUM_WARPS": NUM_WARPS, "MAX_HEAD_DIM": MAX_HEAD_DIM}

_STRIDES = (np.int64, 3)


def append_kv(
    k: Any,
    v: Any,
    k_pages: Any,
    v_pages: Any,
    slot_mapping: Any,
    *,
    positions: Any = None,
    rope: Rotary | None = None,
    kv_format: str | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
) -> None:
    """Write the keys and values of new tokens into slots of a cache; turn the keys and quantize both on the way.

    One launch reads every new number once and writes every code once. Nothing else is written: slots that are not
    listed keep every bit.

    A number is stored as the code that is nearest to number / scale (/ block scale), ties to even, and what lies beyond
    the largest code becomes that one. NaN stays NaN in "e4m3fn" and "e5m2"; the other formats have no code for it and
    store 0, but a scale that is made here from numbers with a NaN is NaN itself, so that what it multiplies does not
    pass for a number.

    Parameters
    ----------
    k : array [tokens, kv_heads, head_dim]; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; an array whose last axis is not
        contiguous is copied. Head dims are 1 to 512, and even for formats of 4 bits.
    v : array [tokens, kv_heads, head_dim_v], dtype of ``k``
    k_pages, v_pages : arrays [num_pages, page_size, kv_heads, head_dim] and [..., head_dim_v], written in place
        Of any strides: head-major pages are a transposed view, and a contiguous cache [batch, capacity, ...] is one
        page for each sequence. The dtype of ``k``, or that of ``kv_format``: "e4m3fn" and "e5m2" in arrays of that
        float8 dtype of `ml_dtypes` or of uint8, "int8" in int8, "nvfp4" and "mxfp4" in uint8 with two numbers a byte,
        [..., head_dim / 2], the first in the low four bits. float64 is not quantized.
    slot_mapping : integers [tokens]
        ``page * page_size + slot`` for each token; negative: the token is skipped. A list, a NumPy array, or an int32
        or int64 array on the device of ``k``. See `slot_mapping`.
    positions : integers [tokens], optional
        Of the tokens, for ``rope``; as those of `rope`.
    rope : Rotary, optional
        How keys are turned before they are stored, as by `rope`, to the bit.
    kv_format : str, optional
        What the pages hold; by default, what their dtype says.
    k_scale, v_scale : optional
        Numbers above 0 that are read, one or an array [] per tensor, or [kv_heads]; 1 by default. A float32 array
        [num_pages, page_size, kv_heads] is written: for each slot and head the largest magnitude (infinity counts as
        the largest float) over the largest code, 448, 57344 or 127. Formats of 4 bits take one per tensor only.
    k_block_scales, v_block_scales : arrays [num_pages, page_size, kv_heads, blocks], written in place
        Of "nvfp4" for 16 numbers each, e4m3 (``float8_e4m3fn`` or uint8): the largest magnitude / 6 / scale. Of "mxfp4"
        for 32 numbers each, powers of two (``float8_e8m0fnu`` or uint8, with a bias of 127): the largest one that is
        not above largest magnitude / scale / 4. Needed by these formats and by no other.

    Raises
    ------
    ArrayTypeError
        An argument is no array, is read-only but would be written, is missing, or arrays are not of one kind.
    DTypeError
        Dtypes that are not in the list or do not fit each other.
    ShapeError
        Shapes that do not fit each other, or a head dim outside of the list.
    ArgumentError
        A slot that does not exist or is listed twice, if the host sees it; an unknown ``kv_format``; a scale that is
        not above 0, or that the format has not; positions without ``rope`` or the reverse. `NonFiniteError` for a scale
        that is not finite.
    OverlapError
        Something that is written shares memory with something else.

    Nothing has been written then. Slots on a device are not looked at (``CUATTN_CHECK=1`` does): one that does not
    exist is skipped, and of two tokens for one slot it is not known whose numbers are in it.

    References
    ----------
    Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.
    Su et al., "RoFormer", 2021. Darvish Rouhani et al., "Microscaling data formats for deep learning", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> k = np.array([[[0.5, -3.0]]], np.float32)  # one token, one head
    >>> pages = np.zeros((2, 4, 1, 2), np.int8)  # two pages of four slots
    >>> scales = np.zeros((2, 4, 1), np.float32)
    >>> cuattn.append_kv(k, k, pages, pages.copy(), [6], k_scale=scales)
    >>> pages[1, 2, 0].tolist(), float(scales[1, 2, 0] * 127)
    ([21, -127], 3.0)
    """
    problem = check(
        k,
        v,
        k_pages,
        v_pages,
        slot_mapping,
        positions=positions,
        rope=rope,
        kv_format=kv_format,
        k_scale=k_scale,
        v_scale=v_scale,
        k_block_scales=k_block_scales,
        v_block_scales=v_block_scales,
    )
    write(problem)


def write(problem: AppendProblem) -> None:
    """Launch the kernel: all that comes after the checks, which write nothing."""
    num_tokens, num_heads = (int(extent) for extent in problem.k.new.shape[:2])
    if not num_tokens * num_heads * problem.k.pages.shape[0]:
        return
    angles, positions = problem.angles, problem.positions
    num_pages, page_size = problem.k.pages.shape[:2]
    layout = struct_layout("append_kv", "AppendLayout").pack(
        k=_side(problem, problem.k),
        v=_side(problem, problem.v),
        num_tokens=num_tokens,
        num_slots=num_pages * page_size,
        page_size=page_size,
        slots_stride=problem.slots.strides[0] // problem.slots.dtype.itemsize,
        positions_stride=0 if positions is None else positions.seq_stride,
        num_heads=num_heads,
        num_pairs=0 if angles is None else angles.num_pairs,
        slots_are_64_bit=problem.slots.dtype.itemsize == 8,
        positions_are_64_bit=positions is not None and positions.are_64_bit,
        tables=(0, 0, 0) if angles is None else angles.table_layout,
    )
    executor = problem.executor
    kernel = executor.kernel("append_kv", constants(problem.dtype, problem.kv_format, angles), "cuattn_append_kv")
    args = {
        "g_k": problem.k.new,
        "g_v": problem.v.new,
        "g_k_cache": problem.k.pages,
        "g_v_cache": problem.v.pages,
        "g_slots": problem.slots,
        "g_k_scales": problem.k.scale.array,
        "g_v_scales": problem.v.scale.array,
        "g_k_blocks": problem.k.blocks,
        "g_v_blocks": problem.v.blocks,
        "g_positions": None if positions is None else positions.array,
        **(NO_ANGLES if angles is None else angles.arrays),
        "layout": layout,
    }
    grid = min(-(-2 * num_tokens * num_heads // NUM_WARPS), MAX_GRID[0])
    executor.launch(kernel, (grid,), (NUM_WARPS * WARP_SIZE,), args)


def _side(problem: AppendProblem, side: Side) -> dict[str, Any]:
    """Return the fields of the struct Side of kernels/append_kv.cu."""
    itemsize = problem.dtype.itemsize
    token, head, _ = side.new.strides
    *outer, item_bytes = side.pages.strides
    contiguous = item_bytes == side.pages.dtype.itemsize or side.pages.shape[-1] == 1
    word_bytes = 4 if problem.kv_format.quantized else 16
    whole_words = problem.kv_format.quantized or side.head_dim * itemsize % word_bytes == 0
    *blocks, block = (0, 0, 0, 0) if side.blocks is None else side.blocks.strides
    return {
        "token_stride": token // itemsize,
        "head_stride": head // itemsize,
        "cache": tuple(stride // side.pages.dtype.itemsize for stride in outer),
        "item_stride": item_bytes // side.pages.dtype.itemsize,
        "scales": side.scale.strides,
        "blocks": tuple(blocks),
        "block_stride": block,
        "scale": side.scale.value,
        "head_dim": side.head_dim,
        "wide_loads": side.head_dim * itemsize % 16 == 0 and (address(side.new) | token | head) % 16 == 0,
        "wide_stores": contiguous and whole_words and not any(x % word_bytes for x in (address(side.pages), *outer)),
        "slot_scales": side.scale.per_slot,
    }


def constants(dtype: np.dtype[Any], kv_format: KVFormat, angles: Angles | None) -> dict[str, Constant]:
    """Return the kernel's compile-time constants."""
    if angles is None:
        rotation: dict[str, Constant] = {"INTERLEAVED": False, "TABLES": False, "Table": ELEMENTS[dtype.name][1]}
    else:
        rotation = {
            name: x for name, x in angles.constants(dtype).items() if name in ("INTERLEAVED", "TABLES", "Table")
        }
    return {
        "Element": ELEMENTS[dtype.name][0],
        **_SIZES,
        "ROTATE": angles is not None,
        "Storage": kv_format.storage,
        **rotation,
    }


def variants() -> Iterator[dict[str, Constant]]:
    """Return the constants of every kernel that a call can ask for."""
    for name in ELEMENTS:
        dtype = KV_FORMATS[name]
        formats = [row for row in KV_FORMATS.values() if row is dtype or (row.quantized and name != "float64")]
        tables = ("float32", "float64") if name == "float64" else ("float32",)
        for row in formats:
            element: dict[str, Constant] = {"Element": dtype.storage, **_SIZES, "Storage": row.storage}
            plain = ELEMENTS[name][1]
            yield {**element, "ROTATE": False, "INTERLEAVED": False, "TABLES": False, "Table": plain}
            for interleaved in (False, True):
                turned: dict[str, Constant] = {**element, "ROTATE": True, "INTERLEAVED": interleaved}
                yield {**turned, "TABLES": False, "Table": plain}
                for table in tables:
                    yield {**turned, "TABLES": True, "Table": ELEMENTS[table][0]}
