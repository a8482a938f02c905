"""What the forward kernels say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cuattn.head_dims import COLUMNS
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, FlashFwdConfig, PlainFwdConfig
from cuattn.ops.attention.forward.hopper_config import ARCH, HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.forward.hopper_listed import HOPPER_LISTED_CONFIGS, compiled_options
from cuattn.ops.attention.forward.listed_config import LISTED_FWD_CONFIGS
from cuattn.ops.attention.shipped import CAUSAL, WINDOW, largest_head_dim, nvrtc_ms, products_mark
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions
from cuattn.ops.registry import CHUNKED_KEYS, EXTREME_LOGITS, ODD_STRIDES, TYPICAL_DTYPE, KernelGroup, Variant

__all__ = ["GROUPS", "variant_of"]

CHUNK = replace(WINDOW, chunk=True)
#: Options that Hopper rows are shown with, and whether for packed sequences.
_HOPPER_OPTIONS = (
    (PLAIN, False),
    (CAUSAL, False),
    (ForwardOptions(softcap=True), False),
    (CHUNK, False),
    (replace(WINDOW, softcap=True, alibi=True), True),
    (replace(CHUNK, softcap=True, alibi=True), True),
)


def _variants() -> Iterator[Variant]:
    """Every row of the table at the largest head dim that selects it: plain, causal, and with every option that the row
    is meant for. 8-bit elements share the rows of 16-bit ones.
    """
    for row in FLASH_FWD_CONFIGS:
        dtype = TYPICAL_DTYPE[row.itemsize]
        most = EVERYTHING if row.score_options else WINDOW
        yield from (variant_of(row, dtype, options) for options in (PLAIN, CAUSAL, most))
        yield variant_of(row, dtype, most, aligned=False)
        if row.itemsize == 2:
            yield variant_of(row, "float8_e4m3fn", most)
    for row in LISTED_FWD_CONFIGS:
        for options in (PLAIN, WINDOW, *(EVERYTHING,) * row.score_options):
            yield variant_of(row, TYPICAL_DTYPE[row.itemsize], options, listed=True)
    yield Variant("attention_plain", "default", PlainFwdConfig().constants("float16", 0, 0))
    yield Variant("attention_schedule", "default", {"BLOCK_M": 128, "NUM_THREADS": 1024})
    flags = dict.fromkeys(("SOFTCAP", "ALIBI", "BIAS", "MASK"), True)
    yield Variant("attention_mask_tiles", "default", {**flags, "BiasElement": "__half", "NUM_WARPS": 4})


def variant_of(
    row: FlashFwdConfig, dtype: str, options: ForwardOptions, *, aligned: bool = True, listed: bool = False
) -> Variant:
    """Return a row compiled with some options, for the largest head dim that it is legal for."""
    head_dim = largest_head_dim(row)
    columns, blocks = COLUMNS[head_dim]
    few = "_few" if row.max_seqlen_q else ""
    return Variant(
        row.source,
        f"{dtype}{products_mark(row)}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.num_warps}_s{row.num_stages}"
        f"{few}_{options.label}{'' if aligned else '_unaligned'}{'_listed' * listed}",
        row.constants(dtype, head_dim, columns, options, aligned=aligned, column_blocks=blocks, listed=listed),
        num_threads=row.num_threads,
        smem_bytes=row.smem_bytes(head_dim, columns),
        nvrtc_ms=nvrtc_ms(head_dim, options),
    )


def _hopper_variants() -> Iterator[Variant]:
    for row in (*HOPPER_FWD_CONFIGS, *HOPPER_ALTERNATIVES):
        for options, packed in _HOPPER_OPTIONS:
            if row.serves(row.max_head_dim, row.max_head_dim_v, options, 1, row.itemsize):
                yield _hopper_variant(row, options, packed)
    for row in HOPPER_LISTED_CONFIGS:
        for options in compiled_options():
            if row.serves(row.max_head_dim, row.max_head_dim_v, options, 1):
                yield _hopper_variant(row, options, options.on_scores, listed=True)


def _hopper_variant(row: HopperFwdConfig, options: ForwardOptions, packed: bool, *, listed: bool = False) -> Variant:
    d, e = row.max_head_dim, row.max_head_dim_v
    dtype = "float8_e4m3fn" if row.itemsize == 1 else "bfloat16"
    shape = f"{dtype}_d{d}_e{e}_{row.block_m}x{row.block_n}_s{row.num_stages}"
    shape += "_pingpong" * row.ping_pong + "_few" * bool(row.max_seqlen_q)
    constants = row.constants(dtype, d, e, options, packed=packed, listed=listed)
    return Variant(row.source, f"{shape}_{options.label}{'_packed' * packed}{'_listed' * listed}", constants, ARCH)


GROUPS = (
    KernelGroup(
        "attention_forward",
        kernels=(
            *("attention_forward", "attention_forward_fma", "attention_plain"),
            *("attention_mask_tiles", "attention_schedule"),
        ),
        variants=_variants,
        tests=(
            *("operations/attention", "operations/compat", "operations/test_known_defects.py"),
            "operations/sparse/test_block_sparse*.py",
            *(ODD_STRIDES, EXTREME_LOGITS, CHUNKED_KEYS),
        ),
        page="attention_forward.md",
    ),
    KernelGroup(
        "attention_forward_hopper",
        kernels=("attention_forward_hopper",),
        variants=_hopper_variants,
        tests=("operations/hopper/test_*hopper*.py", EXTREME_LOGITS),
        page="attention_forward_hopper.md",
    ),
)
