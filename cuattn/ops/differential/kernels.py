"""What the kernels of differential attention say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cuattn import compile
from cuattn.head_dims import HEAD_DIM_BUCKETS
from cuattn.ops.attention.forward import hopper_config
from cuattn.ops.attention.forward.hopper_config import ARCH
from cuattn.ops.attention.shipped import CAUSAL, WINDOW
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions
from cuattn.ops.differential import rows
from cuattn.ops.differential.cached_launch import combine_variants
from cuattn.ops.differential.config import DIFFERENTIAL_CONFIGS, DifferentialConfig
from cuattn.ops.differential.hopper_config import HOPPER_DIFFERENTIAL_CONFIGS, HopperDifferentialConfig
from cuattn.ops.registry import ARCHS, TYPICAL_DTYPE, KernelGroup, Variant, named

__all__ = ["GROUPS", "hopper_variant_of", "largest_head_dims", "variant_of"]


#: Buckets of D and E, of the Hopper kernel; the others have more.
HOPPER_SIZES = hopper_config.HEAD_DIM_BUCKETS


def largest_head_dims(
    row: DifferentialConfig | HopperDifferentialConfig,
    sizes: tuple[int, ...] = HEAD_DIM_BUCKETS,
    *,
    shared_keys: bool = False,
) -> tuple[int, int]:
    """Return the largest buckets of D and E for which the row is legal somewhere, E first."""
    limit = max(compile.smem_limit_bytes(arch) for arch in ARCHS)
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


def hopper_variant_of(
    row: HopperDifferentialConfig, options: ForwardOptions, *, shared_keys: bool, dtype: str = "bfloat16"
) -> Variant:
    """Return a row of the Hopper kernel compiled with some options, for the largest head dims that it is legal for."""
    head_dims = largest_head_dims(row, HOPPER_SIZES, shared_keys=shared_keys)
    return Variant(
        row.source,
        f"{dtype}_d{head_dims[0]}_e{head_dims[1]}_{row.block_m}x{row.block_n}_s{row.num_stages}"
        f"{'_shared' * shared_keys}_{options.label}",
        row.constants(dtype, *head_dims, options, shared_keys=shared_keys),
        ARCH,
    )


def _hopper_variants() -> Iterator[Variant]:
    """Every row for both kinds of keys, plain, causal, and with everything."""
    for row in HOPPER_DIFFERENTIAL_CONFIGS:
        for shared_keys in (False, True):
            for options in (PLAIN, CAUSAL, replace(WINDOW, softcap=True, alibi=True)):
                yield hopper_variant_of(row, options, shared_keys=shared_keys)


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
    KernelGroup(
        "differential_attention_hopper",
        kernels=("differential_attention_hopper",),
        variants=_hopper_variants,
        tests=("operations/hopper/test_differential_hopper*.py",),
        page="differential_attention.md",
    ),
)
