"""Timing, the check before it, occupancy, progress: the parts that suites are made of."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cuattn import reference
from cuattn.benchmark import Options, Record, verify
from cuattn.benchmark.suite import Step, run_steps
from cuattn.compile import occupancy
from cuattn.errors import ArgumentError
from cuattn.runtime.timer import Timing, significant, time_host
from cuattn.testing.cases import AttentionCase, SoftmaxCase


@pytest.mark.smoke
def test_time_host_takes_the_median_of_many() -> None:
    calls = []
    timing = time_host(lambda: calls.append(time.sleep(0.002)), budget_s=0.05, least=3)
    assert len(timing.samples_us) == len(calls) - 1 >= 3  # one to warm up
    assert timing.median_us >= 2000
    assert timing.cpu_us is not None and timing.cpu_us < timing.median_us  # it slept
    assert set(timing.metrics()) == {"time_us", "best_us", "spread", "samples", "cpu_us", "cores"}


def test_time_host_keeps_to_its_limits() -> None:
    assert len(time_host(lambda: None, budget_s=60, most=7).samples_us) == 7
    assert len(time_host(lambda: time.sleep(0.01), budget_s=0.001, least=3).samples_us) == 3


def test_timing_figures() -> None:
    timing = Timing((1.0, 2.0, 3.0), 4.0) + Timing((4.0, 5.0), 9.0)
    assert timing.median_us == 3.0
    assert timing.cpu_us == 6.0  # a call, of five
    assert timing.cores == 2.0
    assert (Timing((1.0,)) + Timing((2.0,), 1.0)).cores is None
    assert timing.spread == pytest.approx(1 / 3)
    assert significant(1234.567) == 1235.0
    assert significant(0.00123456, 2) == 0.0012


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_verify_attention(dtype: str, causal: bool | str) -> None:
    case = AttentionCase(2, 300, 2, 16, seqlen_k=320, num_kv_heads=1, dtype=dtype, causal=causal)
    inputs = case.make_inputs()
    out = reference.attention(*inputs.values(), causal=causal)[0].astype(inputs["q"].dtype)
    verify.require(verify.attention_error(case, inputs, out), dtype)
    other = True if causal == "top_left" else "top_left"
    wrong_mask = reference.attention(*inputs.values(), causal=other)[0]
    with pytest.raises(verify.WrongResultError, match="relative error"):
        verify.require(verify.attention_error(case, inputs, wrong_mask.astype(out.dtype)), dtype)
    out[-1, -1, -1, -1] = np.nan
    with pytest.raises(verify.WrongResultError, match="relative error nan"):
        verify.require(verify.attention_error(case, inputs, out), dtype)


@pytest.mark.parametrize("kind", ["softmax", "log_softmax", "logsumexp"])
def test_verify_softmax(kind: str) -> None:
    case = SoftmaxCase(50, 70, "float32", kind)
    inputs = case.make_inputs()
    out = getattr(reference, kind)(inputs["x"], -1).astype(np.float32)
    verify.require(verify.softmax_error(case, inputs, out), "float32")
    with pytest.raises(verify.WrongResultError):
        verify.require(verify.softmax_error(case, inputs, out * np.float32(1.01)), "float32")


# Checked by hand against the limits: registers in units of 256 a warp, 1 KiB of shared memory a CTA for the system.
@pytest.mark.parametrize(
    ("arch", "num_threads", "registers", "smem_bytes", "expected"),
    [
        ("sm_80", 128, 32, 0, 16),  # warps: 64 / 4
        ("sm_80", 32, 16, 0, 32),  # CTAs
        ("sm_86", 32, 16, 0, 16),
        ("sm_80", 256, 255, 0, 1),  # registers: 65536 / (8 * 8192)
        ("sm_80", 256, 168, 0, 1),
        ("sm_80", 256, 128, 0, 2),
        ("sm_90a", 128, 168, 0, 3),
        ("sm_80", 128, 32, 80 * 1024, 2),  # shared memory: 164 / 81
        ("sm_80", 128, 32, 82 * 1024, 1),
        ("sm_90a", 128, 32, 113 * 1024, 2),  # 228 / 114
        ("sm_90a", 128, 32, 227 * 1024, 1),
    ],
)
def test_occupancy(arch: str, num_threads: int, registers: int, smem_bytes: int, expected: int) -> None:
    ctas = occupancy.ctas_per_sm(arch, num_threads=num_threads, registers=registers, smem_bytes=smem_bytes)
    assert ctas == expected
    assert 0 < occupancy.fraction(arch, ctas, num_threads) <= 1


def test_occupancy_knows_every_architecture() -> None:
    from cuattn.compile import arch

    assert set(occupancy.LIMITS) == set(arch.SMEM_KIB)
    for capability, (smem_kib, _, _) in occupancy.LIMITS.items():
        assert smem_kib == arch.SMEM_KIB[capability] + 1


def _step(name: str, run) -> Step:
    return Step("demo", name, 2.0, run)


def test_a_failing_step_leaves_a_record_and_the_run_goes_on() -> None:
    def fail():
        yield Record("demo", "before")
        raise ValueError("no such luck\nand more")

    seen: list[str] = []
    progress: list[tuple[float, float, str]] = []
    report = run_steps(
        [_step("fails", fail), _step("works", lambda: [Record("demo", "works")])],
        progress=lambda *state: progress.append(state),
        on_record=lambda record: seen.append(record.case),
    )
    assert [(record.case, record.error) for record in report.records] == [
        ("before", ""),
        ("fails", "ValueError: no such luck"),
        ("works", ""),
    ]
    assert seen == ["before", "fails", "works"]
    assert progress == [(0.0, 4.0, "fails"), (2.0, 4.0, "works"), (4.0, 4.0, "done")]


def test_steps_after_the_deadline_are_left_out() -> None:
    report = run_steps([_step("late", lambda: [Record("demo", "late")])], until=time.monotonic() - 1)
    assert [record.error for record in report.records] == ["left out: the time is up"]


def test_unknown_executor_is_refused() -> None:
    with pytest.raises(ArgumentError, match="allowed are auto, host and cuda"):
        Options(executor="tpu").resolved()
