"""What the kernels of differential attention say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn import compile
from cuattn.head_dims import BUCKETS, HEAD_DIM_BUCKETS
from cuattn.ops.attention.shipped import CAUSAL, WINDOW
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions
from cuattn.ops.differential import rows
from cuattn.ops.differential.cached_launch import combine_variants
from cuattn.ops.differential.config import DIFFERENTIAL_CONFIGS, DifferentialConfig
from cuattn.ops.registry import ARCHS, TYPICAL_DTYPE, KernelGroup, Variant, named

__all__ = ["GROUPS", "largest_head_dims", "variant_of"]


def largest_head_dims(row: DifferentialConfig, *, shared_keys: bool = False) -> tuple[int, int]:
    """Return the largest buckets of D and E for which the row is legal somewhere, E first."""
    limit = max(compile.smem_limit_bytes(arch) for arch in ARCHS)
    sizes = [size for size in HEAD_DIM_BUCKETS if size <= BUCKETS[max(row.max_head_dim, row.max_head_dim_v)]]
    pairs = [
        (head_dim, head_dim_v)
        for head_dim_v in sizes
        for head_dim in sizes
        if head_dim <= row.max_head_dim
        and head_dim_v <= row.max_head_dim_v
        and row.is_legal(head_dim, head_dim_v, limit, shared_keys=shared_keys)
    ]
    return max(pairs, key=lambda pair: (pair[1], pair[0]))


def variant_of(
    row: DifferentialConfig, options: ForwardOptions, *, shared_keys: bool = False, aligned: bool = True
) -> Variant:
    """Return a row compiled with some options, for the largest head dims that it is legal for."""
    head_dims, dtype = largest_head_dims(row, shared_keys=shared_keys), TYPICAL_DTYPE[row.itemsize]
    marks = "_few" * bool(row.max_seqlen_q) + "_shared" * shared_keys + "_unaligned" * (not aligned)
    shape = f"{row.block_m}x{row.block_n}_w{row.num_warps}_s{row.num_stages}"
    return Variant(
        row.source,
        f"{dtype}_d{head_dims[0]}_e{head_dims[1]}_{shape}{marks}_{options.label}",
        row.constants(dtype, *head_dims, options, shared_keys=shared_keys, aligned=aligned),
        num_threads=row.num_threads,
        smem_bytes=row.smem_bytes(*head_dims, shared_keys=shared_keys),
    )


def _variants() -> Iterator[Variant]:
    """Every row at the largest head dims that it is legal for: plain, causal, and with every option it is meant for."""
    for row in DIFFERENTIAL_CONFIGS:
        most = EVERYTHING if row.score_options else WINDOW
        yield from (variant_of(row, options) for options in (PLAIN, CAUSAL, most))
        yield variant_of(row, CAUSAL, shared_keys=True)
        yield variant_of(row, most, aligned=False)
    for kernel, constants in rows.variants():
        yield from named(kernel, [constants])
    yield from named("differential_combine", combine_variants())


GROUPS = (
    KernelGroup(
        "differential_attention",
        kernels=(
            *("differential_attention", "differential_attention_fma"),
            *("differential_backward_rows", "differential_backward_sums", "differential_combine"),
        ),
        variants=_variants,
        tests=("operations/differential",),
        page="differential_attention.md",
    ),
)
