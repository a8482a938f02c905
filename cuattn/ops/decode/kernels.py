"""What the decode kernels say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cuattn.formats import KV_FORMATS
from cuattn.head_dims import COLUMNS
from cuattn.ops.decode import reduce
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS, FlashDecodeConfig
from cuattn.ops.decode.launch import score_constants
from cuattn.ops.registry import CHUNKED_KEYS, EXTREME_LOGITS, ODD_STRIDES, TYPICAL_DTYPE, KernelGroup, Variant, named

__all__ = ["GROUPS"]


def _variants() -> Iterator[Variant]:
    """Rows over pages: plain, causal, and with every option; also on numbers of 4 bits, where the row serves them.
    The options of a decode kernel are its bounds, softcap with ALiBi, and RoPE.
    """
    for row in FLASH_DECODE_CONFIGS:
        dtype = TYPICAL_DTYPE[row.itemsize]
        yield from (_variant(row, dtype, options) for options in ("plain", "causal", "everything"))
        yield _variant(row, dtype, "everything", aligned=False)
        if row.itemsize < 8:
            yield _variant(row, "nvfp4", "everything")
        if row.products == "mma":
            yield _variant(row, "int8", "everything", slot_scales=True)
    for row in FLASH_DECODE_CONFIGS:
        yield from _by_format(row)


def _variant(
    row: FlashDecodeConfig, format_name: str, options: str, *, aligned: bool = True, slot_scales: bool = False
) -> Variant:
    """Return a row compiled with some options and for a format of the cache, at the largest head dim meant for it."""
    head_dim, everything = row.max_head_dim, options == "everything"
    marks = "_slotscales" * slot_scales + "_unaligned" * (not aligned)
    return Variant(
        row.source,
        f"{format_name}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.warps_m}x{row.warps_n}_{options}{marks}",
        _constants(row, format_name, options, ALIGNED=aligned, SLOT_SCALES=slot_scales),
        num_threads=row.num_threads,
        smem_bytes=row.smem_bytes(head_dim, COLUMNS[head_dim][0], KV_FORMATS[format_name]),
        nvrtc_ms=1000 if head_dim <= 128 and not everything else None,
    )


def _by_format(row: FlashDecodeConfig) -> Iterator[Variant]:
    """Yield a row on caches of its own dtype, of 8 and of 4 bits, in the words of calls: dtype of queries, format."""
    dtype = TYPICAL_DTYPE[row.itemsize]
    for format_name in (dtype, *(("int8", "nvfp4") if row.itemsize < 8 else ())):
        for options in ("plain", "everything"):
            yield Variant(
                row.source,
                f"{dtype}_{format_name}_d{row.max_head_dim}_{row.block_m}x{row.block_n}"
                f"_w{row.warps_m}x{row.warps_n}_s{row.num_stages}_{options}",
                _constants(row, format_name, options),
            )


def _constants(row: FlashDecodeConfig, format_name: str, options: str, **changes: bool) -> dict[str, Any]:
    """Return the constants over aligned pages, unless something else is said."""
    everything = options == "everything"
    flags: dict[str, Any] = {
        **{"ALIGNED": True, "PAGED": True, "SLOT_SCALES": False},
        **{"BOUND_LEFT": everything, "BOUND_RIGHT": options != "plain"},
        **{"ROTATE": everything, "INTERLEAVED": False, "TABLES": False, "Table": "float"},
        **score_constants(everything),
        **changes,
    }
    dtype, (columns, blocks) = TYPICAL_DTYPE[row.itemsize], COLUMNS[row.max_head_dim]
    return row.constants(dtype, KV_FORMATS[format_name], row.max_head_dim, columns, flags, column_blocks=blocks)


GROUPS = (
    KernelGroup(
        "attention_decode",
        kernels=("attention_decode", "attention_decode_fma"),
        variants=_variants,
        tests=("operations/decode", "kv/test_append_and_attend.py", ODD_STRIDES, EXTREME_LOGITS, CHUNKED_KEYS),
        page="attention_decode.md",
    ),
    KernelGroup(
        "attention_decode_reduce",
        kernels=("attention_decode_reduce",),
        variants=lambda: named("attention_decode_reduce", reduce.variants()),
        tests=("operations/decode/test_decode_reduce.py", "operations/decode/test_decode_properties.py"),
        page="attention_decode.md",
    ),
)
