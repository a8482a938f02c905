"""Compiling: the time of NVRTC for each variant, and what ptxas says about the kernel. Nothing runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from cuattn import compile
from cuattn.benchmark.replaced import variable
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step
from cuattn.catalogue import groups
from cuattn.compile import nvrtc, occupancy
from cuattn.compile.resources import Resources
from cuattn.ops.registry import ARCHS, Variant
from cuattn.ops.softmax import config as softmax_config
from cuattn.runtime.timer import significant

#: Groups whose rows are compiled, with what is known about their launches.
ATTENTION = ("attention_forward", "attention_backward", "attention_backward_bias", "attention_decode")
METHOD = (
    "NVRTC with an empty cache, source to CUBIN, once, wall-clock and processor time; figures from ptxas; occupancy "
    "computed from them"
)
PTX_METHOD = "NVRTC with an empty cache, source to PTX, once, wall-clock and processor time"
SOFTMAX_SAMPLE = 26  # every so many of the softmax variants
SOFTMAX_NVRTC_MS = 1000


def launched(group: str) -> Iterator[Variant]:
    """The variants of a group that say how they are launched: of attention, the rows of its table."""
    return (variant for variant in groups()[group].variants() if variant.num_threads)


def all_attention() -> Iterator[Variant]:
    """The variants of forward, backward, the gradient of a bias, and decoding."""
    return (variant for group in ATTENTION for variant in launched(group))


def softmax_variants() -> Iterator[Variant]:
    """A sample of the variants of the softmax kernels."""
    for index, (kernel, constants) in enumerate(softmax_config.variants()):
        if index % SOFTMAX_SAMPLE == 0:
            row = "_".join(str(value).lower() for value in constants.values())
            yield Variant(kernel, row, constants, num_threads=int(constants["NUM_THREADS"]), nvrtc_ms=SOFTMAX_NVRTC_MS)


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
        if variant.kernel.startswith("attention_forward") or variant.nvrtc_ms is not None
    ]


def cubin_records(variant: Variant, arch: str) -> Iterator[Record]:
    """Measure compile time and resources of one variant."""
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
    """Measure time and length of the PTX that the host executor runs."""
    times, binary = build_cold(variant, ARCHS[0], "ptx")
    metrics = {**times, "ptx_lines": binary.image.count(b"\n")}
    goals = {} if variant.nvrtc_ms is None else {"nvrtc_ms": f"<= {variant.nvrtc_ms}"}
    yield Record("compile", f"{variant.label}_ptx", metrics, method=PTX_METHOD, goals=goals)


def build_cold(variant: Variant, arch: str, kind: str) -> tuple[dict[str, float], compile.Binary]:
    """Compile without any cache and return the time it took; NVRTC itself is loaded and warm."""
    with empty_cache():
        compile.build_source("", name="nothing.cu", arch=arch, kind="ptx")
        start, start_cpu = time.perf_counter(), time.process_time() + nvrtc.cpu_seconds()
        binary = compile.build(variant.kernel, variant.constants, arch=arch, kind=kind)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() + nvrtc.cpu_seconds() - start_cpu
    return {"nvrtc_ms": significant(1e3 * seconds), "nvrtc_cpu_ms": significant(1e3 * cpu_seconds)}, binary


@contextmanager
def empty_cache() -> Iterator[None]:
    """Use a new cache directory in the block, and remember nothing from before in this process."""
    with (
        tempfile.TemporaryDirectory(prefix="cuattn-") as directory,
        variable("CUATTN_CACHE_DIR", directory),
    ):
        compile.forget()
        try:
            yield
        finally:
            compile.forget()
