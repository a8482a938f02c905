"""The host executor itself: its speed with and without checkers, and what it counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cuattn import host
from cuattn.benchmark import inputs, memory, verify
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step
from cuattn.runtime.timer import HOST_METHOD, Timing, significant, time_host
from cuattn.testing.cases import AttentionCase, SoftmaxCase

#: The problem that the speed of the host executor is stated for.
SPEED_CASE = AttentionCase(1, 1024, 8, 64)
SPEED_CASES = (
    SPEED_CASE,
    AttentionCase(1, 1024, 8, 64, causal=True),
    AttentionCase(1, 1024, 8, 64, dtype="bfloat16"),
    AttentionCase(1, 1024, 8, 128),
    AttentionCase(1, 256, 8, 64, dtype="float32"),
)
COUNTED_CASES: tuple[AttentionCase | SoftmaxCase, ...] = (
    AttentionCase(1, 1024, 2, 64),
    AttentionCase(1, 1024, 2, 64, causal=True),
    AttentionCase(1, 1024, 2, 128),
    AttentionCase(1, 256, 2, 64, dtype="float32"),
    SoftmaxCase(64, 1024),
    SoftmaxCase(4, 65536),
    SoftmaxCase(64, 1024, kind="logsumexp"),
)
ATTEMPTS = 3
FREE = 0.9  # of the cores that the host executor may use: a measurement with fewer was disturbed
MMA_FLOPS = 2 * 16 * 8 * 16  # of one mma.sync.m16n8k16


def speed_steps(options: Options) -> list[Step]:
    """Steps that measure speed: checkers off, then on."""
    steps = [Step("host", case.name, 4.0, partial(speed_records, case, options)) for case in SPEED_CASES]
    return [*steps, Step("host", "checkers", 10.0, partial(checker_records, options))]


def count_steps(options: Options) -> list[Step]:
    """Steps that count what a kernel executes and moves, beside what the formula needs."""
    return [Step("counters", case.name, 2.0, partial(count_records, case, options)) for case in COUNTED_CASES]


def speed_records(case: AttentionCase, options: Options) -> Iterator[Record]:
    """Measure one problem without checkers."""
    with host.check(), host.schedule("eager"):
        arrays = inputs.make(case, "host", options.seed)
        out, _ = case.run(arrays)
        verify.require(verify.attention_error(case, arrays, out), case.dtype)
        timing = undisturbed(lambda: case.run(arrays), budget_s=max(2.0, options.budget_s))
    metrics = {
        **timing.metrics(),
        "gflop_per_s": significant(case.flops / timing.median_us / 1e3),
        "best_gflop_per_s": significant(case.flops / min(timing.samples_us) / 1e3),
        "gflop_per_core_s": significant(case.flops / (timing.cpu_us or math.nan) / 1e3),
    }
    goals = {"gflop_per_s": ">= 10"} if case == SPEED_CASE else {}
    of_time: dict[str, Any] = {"method": HOST_METHOD, "samples": timing.samples()}
    yield Record("host", f"{case.name}_unchecked", metrics, executor="host", goals=goals, **of_time)


def undisturbed(call: Callable[[], object], *, budget_s: float) -> Timing:
    """Time a call; again, up to twice, where other programs had a part of the cores meanwhile."""
    attempts = []
    for _ in range(ATTEMPTS):
        attempts.append(time_host(call, budget_s=budget_s))
        if (attempts[-1].cores or 0) >= FREE * host.current().threads:
            break
    return max(attempts, key=lambda timing: timing.cores or 0)


def checker_records(options: Options) -> Iterator[Record]:
    """Measure the stated problem with each checker, and with all; unchecked calls in between, for the ratio."""
    case = SPEED_CASE
    arrays = inputs.make(case, "host", options.seed)
    for name, checks in {"mem": ("mem",), "init": ("init",), "race": ("race",), "all": ("all",)}.items():
        with host.schedule("eager"):
            with host.check():
                without = undisturbed(lambda: case.run(arrays), budget_s=1.0)
            with host.check(*checks):
                timing = undisturbed(lambda: case.run(arrays), budget_s=2.0)
            with host.check():
                without = without + undisturbed(lambda: case.run(arrays), budget_s=1.0)
        metrics = {
            **timing.metrics(),
            "gflop_per_s": significant(case.flops / timing.median_us / 1e3),
            "gflop_per_core_s": significant(case.flops / (timing.cpu_us or math.nan) / 1e3),
            "fraction_of_unchecked": significant(without.median_us / timing.median_us, 3),
            "fraction_per_core": significant((without.cpu_us or math.nan) / (timing.cpu_us or math.nan), 3),
            "unchecked_cores": significant(without.cores or math.nan, 2),
        }
        goals = {"fraction_of_unchecked": ">= 0.3"} if name == "all" else {}
        of_time: dict[str, Any] = {"method": HOST_METHOD, "samples": timing.samples()}
        yield Record("host", f"{case.name}_check_{name}", metrics, executor="host", goals=goals, **of_time)


def count_records(case: AttentionCase | SoftmaxCase, options: Options) -> Iterator[Record]:
    """Count bytes and instructions of one problem, and the memory that it takes beside its results."""
    arrays = inputs.make(case, "host", options.seed)
    with memory.allocations() as allocated, host.profile() as profile:
        result = case.run(arrays)
    results = result if isinstance(result, tuple) else (result,)
    moved = profile.bytes["global"]
    metrics: dict[str, Value] = {
        "launches": profile.launches,
        "warp_instructions": profile.warp_instructions,
        "active_lanes": significant(profile.active_lane_fraction, 3),
        "global_read_bytes": moved["read"],
        "global_write_bytes": moved["write"],
        "bytes_over_least": significant((moved["read"] + moved["write"]) / case.num_bytes),
        "workspace_bytes": allocated.peak_bytes - sum(x.nbytes for x in results),
    }
    products = sum(count for name, count in profile.opcodes.items() if name.startswith("mma.sync"))
    if products:
        metrics["mma"] = products
        metrics["mma_flops_over_formula"] = significant(products * MMA_FLOPS / case.flops)
    exponentials = 32 * sum(count for name, count in profile.opcodes.items() if name.startswith("ex2"))
    metrics["exp2_per_element"] = significant(exponentials / num_elements(case))
    yield Record(
        "counters",
        case.name,
        metrics,
        executor="host",
        method="counted by the host executor: warp instructions executed, bytes asked of global memory by active "
        "lanes; the least is each input read and each output written once",
    )


def num_elements(case: AttentionCase | SoftmaxCase) -> float:
    """Logits whose exponential the formula needs; half of them under a causal mask, as for FLOPs."""
    if isinstance(case, SoftmaxCase):
        return case.rows * case.columns
    return case.batch * case.num_heads * case.seqlen_q * case.num_keys / (2 if case.causal else 1)
