"""What the backward kernels say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn import compile
from cuattn.ops.attention.backward.bias_config import BIAS_BWD_CONFIGS
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS, FlashBwdConfig, Launch
from cuattn.ops.attention.backward.listed_config import LISTED_BWD_CONFIGS
from cuattn.ops.attention.shipped import CAUSAL, WINDOW, largest_head_dim, nvrtc_ms, products_mark
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions
from cuattn.ops.registry import ARCHS, CHUNKED_KEYS, EXTREME_LOGITS, TYPICAL_DTYPE, KernelGroup, Variant

__all__ = ["GROUPS", "launches_of", "variant_of"]


def _variants() -> Iterator[Variant]:
    """Every row and each of its launches, in a fixed order and in any: plain, causal, and with every option that the
    row is meant for.
    """
    for row in FLASH_BWD_CONFIGS:
        most = EVERYTHING if row.score_options else WINDOW
        for launch in launches_of(row):
            yield from (variant_of(row, launch, options) for options in (PLAIN, CAUSAL, most))
            yield variant_of(row, launch, most, aligned=False)
    for row in LISTED_BWD_CONFIGS:
        for launch in row.launches():
            for options in (PLAIN, WINDOW, *(EVERYTHING,) * row.score_options):
                yield variant_of(row, launch, options, listed=True)
    yield Variant("attention_backward_dq", "default", {"Element": "__half", "NUM_WARPS": 4})
    rows = {"Element": "__half", "Accumulator": "float", "NUM_WARPS": 4}
    yield Variant("attention_backward_rows", "default", rows)


def launches_of(row: FlashBwdConfig) -> list[Launch]:
    """Return the launches of a row. Those that add to dq are of 16-bit keys, and only where shared memory has room."""
    launches = list(row.launches())
    limit = max(compile.smem_limit_bytes(arch) for arch in ARCHS)
    if row.is_legal(largest_head_dim(row), largest_head_dim(row), limit, add_dq=True):
        launches += [launch for launch in row.launches(add_dq=True) if launch.add_dq]
    return launches


def variant_of(
    row: FlashBwdConfig, launch: Launch, options: ForwardOptions, *, aligned: bool = True, listed: bool = False
) -> Variant:
    """Return one launch of a row compiled with some options, for the largest head dim that the row is legal for."""
    dtype, head_dim = TYPICAL_DTYPE[row.itemsize], largest_head_dim(row)
    keys = "dk" * launch.grad_qk + "dv" * launch.grad_v + "_addsdq" * launch.add_dq
    return Variant(
        row.source,
        f"{'dq' if row.own == 'queries' else keys}_{dtype}{products_mark(row)}_d{head_dim}"
        f"_{row.block_own}x{row.block_other}_w{row.num_warps}_s{row.num_stages}_{options.label}"
        f"{'' if aligned else '_unaligned'}{'_listed' * listed}",
        row.constants(dtype, head_dim, head_dim, options, launch=launch, aligned=aligned, listed=listed),
        num_threads=row.num_threads,
        smem_bytes=row.smem_bytes(head_dim, head_dim, add_dq=launch.add_dq),
        nvrtc_ms=nvrtc_ms(head_dim, options),
    )


def _bias_variants() -> Iterator[Variant]:
    """Rows of the gradient of a bias: with the bias alone, under a causal mask, and with every option."""
    for row in BIAS_BWD_CONFIGS:
        dtype, head_dim = TYPICAL_DTYPE[row.itemsize], largest_head_dim(row)
        for options in (ForwardOptions(bias=True), ForwardOptions(bias=True, bound_right=True), EVERYTHING):
            yield Variant(
                row.source,
                f"{dtype}{products_mark(row)}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.num_warps}_{options.label}",
                row.constants(dtype, head_dim, head_dim, options),
                num_threads=row.num_threads,
                smem_bytes=row.smem_bytes(head_dim, head_dim),
            )
    sums = {"Real": "float", "BiasElement": "float", "NUM_THREADS": 256}
    yield Variant("attention_backward_bias_sum", "default", sums)
    yield Variant("attention_backward_sinks", "default", {"Real": "float", "Element": "__half", "NUM_WARPS": 32})


GROUPS = (
    KernelGroup(
        "attention_backward",
        kernels=(
            *("attention_backward", "attention_backward_fma"),
            *("attention_backward_dq", "attention_backward_rows"),
        ),
        variants=_variants,
        tests=("operations/backward", "operations/sparse/test_block_sparse_backward.py", EXTREME_LOGITS, CHUNKED_KEYS),
        page="attention_backward.md",
    ),
    KernelGroup(
        "attention_backward_bias",
        kernels=(
            *("attention_backward_bias", "attention_backward_bias_fma", "attention_backward_bias_sum"),
            "attention_backward_sinks",
        ),
        variants=_bias_variants,
        tests=("operations/backward", EXTREME_LOGITS, CHUNKED_KEYS),
        page="attention_backward_bias.md",
    ),
)
