"""Compiling: the time of NVRTC for each variant, and what ptxas says about the kernel. Nothing runs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from cuattn import compile
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step
from cuattn.compile import nvrtc, occupancy
from cuattn.compile.resources import Resources
from cuattn.formats import KV_FORMATS
from cuattn.head_dims import BUCKETS, COLUMNS, HEAD_DIM_BUCKETS
from cuattn.ops.attention.backward.bias_config import BIAS_BWD_CONFIGS, BiasBwdConfig
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS, FlashBwdConfig, Launch
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, FlashFwdConfig
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS, FlashDecodeConfig
from cuattn.ops.decode.launch import score_constants
from cuattn.ops.softmax import config as softmax_config
from cuattn.runtime.timer import significant

ARCHS = ("sm_80", "sm_90a")
CAUSAL = ForwardOptions(bound_right=True)
WINDOW = ForwardOptions(bound_left=True, bound_right=True)
DTYPE = {2: "float16", 4: "float32", 8: "float64"}
METHOD = (
    "NVRTC with an empty cache, source to CUBIN, once, wall-clock and processor time; figures from ptxas; occupancy "
    "computed from them"
)
PTX_METHOD = "NVRTC with an empty cache, source to PTX, once, wall-clock and processor time"
SOFTMAX_SAMPLE = 26  # every so many of the softmax variants


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with its constants, and how it is launched."""

    label: str
    source: str
    constants: Mapping[str, Any]
    num_threads: int
    smem_bytes: int
    nvrtc_ms: int | None = 1000  # what its compilation may take


def attention_variants() -> Iterator[Variant]:
    """Every row of the table at the largest head dim that selects it: plain, causal, and with every option that the row
    is meant for. 8-bit elements share the rows of 16-bit ones.
    """
    for row in FLASH_FWD_CONFIGS:
        dtype = DTYPE[row.itemsize]
        most = EVERYTHING if row.score_options else WINDOW
        yield from (attention_variant(row, dtype, options) for options in (PLAIN, CAUSAL, most))
        yield attention_variant(row, dtype, most, aligned=False)
        if row.itemsize == 2:
            yield attention_variant(row, "float8_e4m3fn", most)


def attention_variant(row: FlashFwdConfig, dtype: str, options: ForwardOptions, *, aligned: bool = True) -> Variant:
    """A row compiled with some options, for the largest head dim that it is legal for."""
    head_dim = largest_head_dim(row)
    columns, blocks = COLUMNS[head_dim]
    products = "_tf32" if row.products == "mma" and row.itemsize == 4 else ""
    few = "_few" if row.max_seqlen_q else ""
    return Variant(
        f"{row.source}_{dtype}{products}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.num_warps}_s{row.num_stages}"
        f"{few}_{options.label}{'' if aligned else '_unaligned'}",
        row.source,
        row.constants(dtype, head_dim, columns, options, aligned=aligned, column_blocks=blocks),
        row.num_threads,
        row.smem_bytes(head_dim, columns),
        1000 if head_dim <= 128 and options in (PLAIN, CAUSAL) else None,
    )


def backward_variants() -> Iterator[Variant]:
    """The same of every row of the backward, and of each of its launches, in a fixed order and in any."""
    for row in FLASH_BWD_CONFIGS:
        most = EVERYTHING if row.score_options else WINDOW
        for launch in backward_launches(row):
            yield from (backward_variant(row, launch, options) for options in (PLAIN, CAUSAL, most))
            yield backward_variant(row, launch, most, aligned=False)


def backward_launches(row: FlashBwdConfig) -> list[Launch]:
    """Every launch of a row. Those that add to dq are of 16-bit keys, and only where there is shared memory for it."""
    launches = list(row.launches())
    limit = max(compile.smem_limit_bytes(arch) for arch in ARCHS)
    if row.is_legal(largest_head_dim(row), largest_head_dim(row), limit, add_dq=True):
        launches += [launch for launch in row.launches(add_dq=True) if launch.add_dq]
    return launches


def backward_variant(row: FlashBwdConfig, launch: Launch, options: ForwardOptions, *, aligned: bool = True) -> Variant:
    """One launch of a row compiled with some options, for the largest head dim that the row is legal for."""
    dtype, head_dim = DTYPE[row.itemsize], largest_head_dim(row)
    products = "_tf32" if row.products == "mma" and row.itemsize == 4 else ""
    keys = "dk" * launch.grad_qk + "dv" * launch.grad_v + "_addsdq" * launch.add_dq
    return Variant(
        f"{row.source}_{'dq' if row.own == 'queries' else keys}_{dtype}{products}_d{head_dim}"
        f"_{row.block_own}x{row.block_other}_w{row.num_warps}_s{row.num_stages}_{options.label}"
        f"{'' if aligned else '_unaligned'}",
        row.source,
        row.constants(dtype, head_dim, head_dim, options, launch=launch, aligned=aligned),
        row.num_threads,
        row.smem_bytes(head_dim, head_dim, add_dq=launch.add_dq),
        1000 if head_dim <= 128 and options in (PLAIN, CAUSAL) else None,
    )


def bias_variants() -> Iterator[Variant]:
    """Every row of the gradient of a bias: with the bias alone, under a causal mask, and with every option."""
    for row in BIAS_BWD_CONFIGS:
        dtype, head_dim = DTYPE[row.itemsize], largest_head_dim(row)
        products = "_tf32" if row.products == "mma" and row.itemsize == 4 else ""
        for options in (ForwardOptions(bias=True), ForwardOptions(bias=True, bound_right=True), EVERYTHING):
            yield Variant(
                f"{row.source}_{dtype}{products}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.num_warps}_{options.label}",
                row.source,
                row.constants(dtype, head_dim, head_dim, options),
                row.num_threads,
                row.smem_bytes(head_dim, head_dim),
                None,
            )


def decode_variants() -> Iterator[Variant]:
    """Every row of decoding over pages: plain, causal, and with every option; also on numbers of 4 bits, where the row
    serves them. The options of a decode kernel are its bounds, softcap with ALiBi, and RoPE.
    """
    for row in FLASH_DECODE_CONFIGS:
        dtype = DTYPE[row.itemsize]
        yield from (decode_variant(row, dtype, options) for options in ("plain", "causal", "everything"))
        yield decode_variant(row, dtype, "everything", aligned=False)
        if row.itemsize < 8:
            yield decode_variant(row, "nvfp4", "everything")
        if row.products == "mma":
            yield decode_variant(row, "int8", "everything", slot_scales=True)


def decode_variant(
    row: FlashDecodeConfig, format_name: str, options: str, *, aligned: bool = True, slot_scales: bool = False
) -> Variant:
    """A row compiled with some options and for a format of the cache, at the largest head dim that it is meant for."""
    kv_format, head_dim, everything = KV_FORMATS[format_name], row.max_head_dim, options == "everything"
    columns, blocks = COLUMNS[head_dim]
    flags: dict[str, Any] = {
        **{"ALIGNED": aligned, "PAGED": True, "SLOT_SCALES": slot_scales},
        **{"BOUND_LEFT": everything, "BOUND_RIGHT": options != "plain"},
        **{"ROTATE": everything, "INTERLEAVED": False, "TABLES": False, "Table": "float"},
        **score_constants(everything),
    }
    marks = "_slotscales" * slot_scales + "_unaligned" * (not aligned)
    return Variant(
        f"{row.source}_{format_name}_d{head_dim}_{row.block_m}x{row.block_n}_w{row.warps_m}x{row.warps_n}"
        f"_{options}{marks}",
        row.source,
        row.constants(DTYPE[row.itemsize], kv_format, head_dim, columns, flags, column_blocks=blocks),
        row.num_threads,
        row.smem_bytes(head_dim, columns, kv_format),
        1000 if head_dim <= 128 and not everything else None,
    )


def all_attention() -> Iterator[Variant]:
    """Forward, backward, the gradient of a bias, and decoding."""
    yield from attention_variants()
    yield from backward_variants()
    yield from bias_variants()
    yield from decode_variants()


def largest_head_dim(row: FlashFwdConfig | FlashBwdConfig | BiasBwdConfig) -> int:
    """The largest bucket for which the row is legal somewhere."""
    limit = max(compile.smem_limit_bytes(arch) for arch in ARCHS)
    sizes = (size for size in HEAD_DIM_BUCKETS if size <= BUCKETS[row.max_head_dim])
    return max(size for size in sizes if row.is_legal(size, COLUMNS[size][0], limit))


def softmax_variants() -> Iterator[Variant]:
    """A sample of the softmax kernels."""
    for index, (source, constants) in enumerate(softmax_config.variants()):
        if index % SOFTMAX_SAMPLE == 0:
            label = "_".join(str(value).lower() for value in constants.values())
            yield Variant(f"{source}_{label}", source, constants, int(constants["NUM_THREADS"]), 0)


def compile_steps(options: Options) -> list[Step]:
    """The attention rows, forward, backward and decoding, then the sample of softmax; on each architecture, and as PTX
    for the host; of the many of the backward and of decoding, those whose time has a limit.
    """
    steps = [
        Step("compile", f"{variant.label} {arch}", 0.7, partial(cubin_records, variant, arch))
        for variant in (*all_attention(), *softmax_variants())
        for arch in ARCHS
        if variant.smem_bytes <= compile.smem_limit_bytes(arch)
    ]
    return steps + [
        Step("compile", f"{variant.label} ptx", 0.5, partial(ptx_records, variant))
        for variant in all_attention()
        if variant.source.startswith("attention_forward") or variant.nvrtc_ms is not None
    ]


def cubin_records(variant: Variant, arch: str) -> Iterator[Record]:
    """Time and resources of one variant."""
    times, binary = build_cold(variant, arch, "cubin")
    for entry, figures in binary.resources.items():
        name = variant.label if len(binary.resources) == 1 else f"{variant.label}_{entry}"
        metrics = {**times, **resources(variant, arch, figures), "cubin_bytes": len(binary.image)}
        goals = {"spill_bytes": "== 0"}
        if variant.nvrtc_ms is not None:
            goals["nvrtc_ms"] = f"<= {variant.nvrtc_ms}"
        yield Record("compile", f"{name}_{arch}", metrics, method=METHOD, goals=goals)


def resources(variant: Variant, arch: str, figures: Resources) -> dict[str, Value]:
    """What a kernel takes of a multiprocessor, and how many CTAs of it that leaves room for."""
    smem_bytes = variant.smem_bytes + figures.static_smem_bytes
    ctas = occupancy.ctas_per_sm(
        arch, num_threads=variant.num_threads, registers=figures.registers, smem_bytes=smem_bytes
    )
    return {
        "registers": figures.registers,
        "spill_bytes": figures.spill_stores + figures.spill_loads,
        "stack_bytes": figures.stack_bytes,
        "smem_bytes": smem_bytes,
        "ctas_per_sm": ctas,
        "occupancy": significant(occupancy.fraction(arch, ctas, variant.num_threads), 3),
    }


def ptx_records(variant: Variant) -> Iterator[Record]:
    """Time and length of the PTX that the host executor runs."""
    times, binary = build_cold(variant, ARCHS[0], "ptx")
    metrics = {**times, "ptx_lines": binary.image.count(b"\n")}
    goals = {} if variant.nvrtc_ms is None else {"nvrtc_ms": f"<= {variant.nvrtc_ms}"}
    yield Record("compile", f"{variant.label}_ptx", metrics, method=PTX_METHOD, goals=goals)


def build_cold(variant: Variant, arch: str, kind: str) -> tuple[dict[str, float], compile.Binary]:
    """Compile without any cache, and say what it took; NVRTC itself is loaded and warm."""
    with empty_cache():
        compile.build_source("", name="nothing.cu", arch=arch, kind="ptx")
        start, start_cpu = time.perf_counter(), time.process_time() + nvrtc.cpu_seconds()
        binary = compile.build(variant.source, variant.constants, arch=arch, kind=kind)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() + nvrtc.cpu_seconds() - start_cpu
    return {"nvrtc_ms": significant(1e3 * seconds), "nvrtc_cpu_ms": significant(1e3 * cpu_seconds)}, binary


@contextmanager
def empty_cache() -> Iterator[None]:
    """A new cache directory for the time being, and nothing remembered in this process."""
    with (
        tempfile.TemporaryDirectory(prefix="cuattn-") as directory,
        mock.patch.dict(os.environ, {"CUATTN_CACHE_DIR": directory}),
    ):
        compile.forget()
        try:
            yield
        finally:
            compile.forget()
