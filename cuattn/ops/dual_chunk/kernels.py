"""What the kernels of dual-chunk attention say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn.head_dims import COLUMNS
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, FlashFwdConfig
from cuattn.ops.attention.shipped import largest_head_dim, nvrtc_ms
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.dual_chunk.config import constants, rotation_constants, smem_bytes, source_of, takes_tables
from cuattn.ops.registry import TYPICAL_DTYPE, KernelGroup, Variant

__all__ = ["GROUPS", "ROWS", "variant_of"]

#: The rows of the forward table that calls select: all but those of tf32.
ROWS = tuple(row for row in FLASH_FWD_CONFIGS if row.products == "fma" or row.itemsize == 2)


def variant_of(
    row: FlashFwdConfig, dtype: str, *, softcap: bool = False, aligned: bool = True, table_dtype: str | None = None
) -> Variant:
    """Return a row compiled for the largest head dim that it is legal for."""
    head_dim = largest_head_dim(row)
    columns, blocks = COLUMNS[head_dim]
    rotation = rotation_constants(dtype, False, table_dtype)
    few = "_few" * bool(row.max_seqlen_q)
    more = "_softcap" * softcap + "_tables" * rotation["TABLES"] + "_unaligned" * (not aligned)
    return Variant(
        source_of(row),
        f"{dtype}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.num_warps}_s{row.num_stages}{few}{more}",
        constants(
            row,
            dtype,
            head_dim,
            columns,
            column_blocks=blocks,
            aligned=aligned,
            softcap=softcap,
            rotation=rotation,
        ),
        num_threads=row.num_threads,
        smem_bytes=smem_bytes(row, head_dim, columns, rotation["TABLES"]),
        nvrtc_ms=nvrtc_ms(head_dim, ForwardOptions(softcap=softcap)),
    )


def _variants() -> Iterator[Variant]:
    """Every row as a usual call takes it, and with all that a call can have."""
    for row in ROWS:
        dtype = TYPICAL_DTYPE[row.itemsize]
        yield variant_of(row, dtype)
        yield variant_of(row, dtype, softcap=row.score_options, aligned=False)
        if takes_tables(row):
            yield variant_of(row, dtype, table_dtype="float32")
    yield Variant("dual_chunk_schedule", "default", {"BLOCK_M": 128, "NUM_THREADS": 1024})


GROUPS = (
    KernelGroup(
        "dual_chunk_attention",
        kernels=("dual_chunk_attention", "dual_chunk_attention_fma", "dual_chunk_schedule"),
        variants=_variants,
        tests=("operations/dual_chunk",),
        page="dual_chunk_attention.md",
    ),
)
