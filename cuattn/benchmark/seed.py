"""Problems with published figures: one small head in float32, fused beside unfused, and two usual training shapes.

Time, and memory: inputs, outputs and temporary arrays at their peak, as the executor allocates them. The unfused
baseline holds the logits S and the probabilities P, [B, H, N, N] each, so that with B = 2, H = 1, D = 64 it takes
``4 B N D + 2 B N N`` numbers where the fused kernel takes ``4 B N D``.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import cuattn
from cuattn.benchmark import inputs, memory, peers, verify
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step, failure
from cuattn.runtime.timer import CudaTimer, Timing, significant, time_host
from cuattn.testing.cases import AttentionCase

#: Memory saved against standard attention, in percent, as published for these lengths.
PUBLISHED_SAVED_PERCENT = {256: 48.6, 512: 74.3, 1024: 84.0, 2048: 92.0}
#: Times as published for torch's back ends on such a shape, in microseconds; memory of flash and of standard, in MiB.
PUBLISHED_US = {"torch MATH": 1013.4, "torch EFFICIENT": 428.0, "torch FLASH": 557.3, "torch SDPA": 558.8}
PUBLISHED_MIB = (192, 1128)
SEQLENS = (*PUBLISHED_SAVED_PERCENT, 4096)
SHAPES = (
    AttentionCase(32, 512, 16, 64, causal=True),
    AttentionCase(64, 256, 32, 32),
)
LONG_CALL_S = 3.0  # a call that takes longer is timed once
METHOD = (
    "memory: bytes of inputs and outputs, and of temporary arrays at their peak, counted from the allocations of the "
    "executor; time: median of calls"
)
PART = "; the unfused one on the first entry of the batch, its memory times the number of entries"


def cases() -> list[AttentionCase]:
    """One head at every length, then the two larger shapes."""
    return [AttentionCase(2, seqlen, 1, 64, dtype="float32") for seqlen in SEQLENS] + list(SHAPES)


def seed_steps(options: Options) -> list[Step]:
    """One step for each problem."""
    executor = options.resolved()
    # Of the unfused kernels in the interpreter: seconds for a million logits, once for the check and once more.
    return [
        Step(
            "seed", case.name, 1.0 + 4e-6 * case.num_heads * case.seqlen_q**2, partial(records, case, executor, options)
        )
        for case in cases()
    ]


def records(case: AttentionCase, executor: str, options: Options) -> Iterator[Record]:
    """Measure the fused and the unfused way through one problem."""
    # An interpreter takes minutes for the unfused kernels on the large shapes: there they get a part of the batch.
    part = replace(case, batch=1) if executor == "host" and case in SHAPES else case
    flash_bytes, flash = measure(case, cuattn.attention, executor, options)
    standard_bytes, standard = measure(part, cuattn.standard_attention, executor, options)
    standard_bytes *= case.batch // part.batch
    metrics: dict[str, Value] = {
        "flash_time_us": significant(flash.median_us),
        "standard_time_us": significant(standard.median_us * (case.batch // part.batch)),
        "flash_memory_bytes": flash_bytes,
        "standard_memory_bytes": standard_bytes,
        "saved_percent": significant(100 * (1 - flash_bytes / standard_bytes), 3),
    }
    goals = {}
    if case not in SHAPES and case.seqlen_q in PUBLISHED_SAVED_PERCENT:
        metrics["published_percent"] = PUBLISHED_SAVED_PERCENT[case.seqlen_q]
        goals["saved_percent"] = f">= {PUBLISHED_SAVED_PERCENT[case.seqlen_q]}"
    method = METHOD + (PART.replace("memory", "memory and time") if part != case else "")
    method += "; the host executor, not a GPU" if executor == "host" else ""
    samples = {
        f"{name}_time_us": [significant(x * parts, 5) for x in timing.samples_us]
        for name, timing, parts in (("flash", flash, 1), ("standard", standard, case.batch // part.batch))
    }
    yield Record("seed", case.name, metrics, executor=executor, method=method, goals=goals, samples=samples)
    if executor == "cuda" and case in SHAPES:
        yield from peer_records(case, executor, options)


def peer_records(case: AttentionCase, executor: str, options: Options) -> Iterator[Record]:
    """On a GPU: torch's back ends on the larger shapes, which have published figures; their time and peak memory."""
    found = [*peers.of("attention", options.peers, executor), *peers.of("shapes", options.peers, executor)]
    for peer in found:
        try:
            arrays = inputs.make(case, executor, options.seed)
            call = peer.prepare(case, arrays)
            out, nbytes = torch_memory(call, arrays)
            verify.require(verify.attention_error(case, arrays, peers.as_array(out)), case.dtype)
            timing = CudaTimer().time(call, budget_s=options.budget_s)
        except Exception as error:  # a peer may refuse in its own ways
            yield Record("seed", case.name, {}, peer.name, executor, error=failure(error))
            continue
        metrics: dict[str, Value] = {"flash_time_us": significant(timing.median_us), "flash_memory_bytes": nbytes}
        samples = {"flash_time_us": timing.samples()["time_us"]}
        yield Record("seed", case.name, metrics, peer.name, executor, METHOD, samples=samples)


def torch_memory(call: Callable[[], Any], arrays: dict[str, Any]) -> tuple[Any, int]:
    """The result of a call, and the bytes of its inputs and of what torch had allocated for it at its peak."""
    torch = importlib.import_module("torch")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return out, sum(int(x.nbytes) for x in arrays.values()) + torch.cuda.max_memory_allocated() - before


def measure(case: AttentionCase, function: Callable[..., Any], executor: str, options: Options) -> tuple[int, Timing]:
    """Measure peak memory and time of one way through a problem, after a check of its result."""
    arrays = inputs.make(case, executor, options.seed)
    call = partial(function, **arrays, return_lse=True, **case.options)
    began, began_cpu = time.perf_counter(), time.process_time()
    (out, _), nbytes = memory.of_call(call, arrays.values())
    once_us = 1e6 * (time.perf_counter() - began)
    once = Timing((once_us,), 1e6 * (time.process_time() - began_cpu))
    verify.require(verify.attention_error(case, arrays, out), case.dtype)
    del out
    if executor == "cuda":
        return nbytes, CudaTimer().time(call, budget_s=options.budget_s)
    if once_us > 1e6 * LONG_CALL_S:
        return nbytes, once
    return nbytes, time_host(call, budget_s=options.budget_s)
