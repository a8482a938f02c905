"""Cases with options, and the suites of their costs and of memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import cuattn
from cuattn.benchmark import SUITES, Options, memory, option_costs, seed, verify
from cuattn.errors import ArgumentError
from cuattn.testing import attention_cases
from cuattn.testing.cases import AttentionCase, VarlenCase
from cuattn.testing.tolerance import ToleranceError

HOST = Options(executor="host", budget_s=0.01)
EVERYTHING = AttentionCase(
    2, 40, 4, 32, num_kv_heads=2, seqlen_k=50, causal=True, window=(20, None), softcap=10.0, alibi=True, sinks=True,
    bias="hm", mask="bnm",
)  # fmt: skip


def test_names_are_unique_and_say_the_options() -> None:
    for executor in ("host", "cuda"):
        names = [case.name for case in option_costs.cases(executor).values()]
        assert len(set(names)) == len(names)
        assert all(name.replace("_", "").isalnum() for name in names)
    assert EVERYTHING.name.endswith("d32_e32_float16_causal_window_20_inf_softcap_10_alibi_sinks_bias_hm_mask_bnm")


@pytest.mark.parametrize("axes", ["mn", "x", "nn"])
def test_axes_that_are_none(axes: str) -> None:
    with pytest.raises(ArgumentError, match=f"bias is '{axes}'"):
        AttentionCase(1, 8, 1, 32, bias=axes)


def test_inputs_have_the_axes_that_are_named() -> None:
    inputs = EVERYTHING.make_inputs(seed=3)
    assert inputs["bias"].shape == (1, 4, 1, 50)
    assert inputs["mask"].shape == (2, 1, 40, 50)
    assert inputs["mask"].dtype == np.bool_
    assert inputs["sinks"].shape == inputs["alibi_slopes"].shape == (4,)
    arrays = sum(x.nbytes for name, x in inputs.items() if name not in ("sinks", "alibi_slopes"))
    assert EVERYTHING.num_bytes == arrays + 2 * 40 * 4 * (32 * 2 + 4)


def test_flops_of_a_window_are_those_of_the_keys_that_it_shows() -> None:
    case = AttentionCase(1, 100, 2, 32, window=(10, 0))
    visible = sum(min(i, 10) + 1 for i in range(100))
    assert case.flops == 2 * visible * 2 * 64
    assert AttentionCase(1, 100, 2, 32, window=(10, 5), causal=True).flops == case.flops


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_cases, "_MAX_LOGITS", 500)
    yield


@pytest.mark.parametrize("case", [EVERYTHING, AttentionCase(1, 70, 2, 32, dropout_p=0.3)], ids=["all", "dropout"])
def test_big_cases_are_checked_by_samples(samples: None, case: AttentionCase) -> None:
    inputs = case.make_inputs(seed=1)
    out, lse = case.run(inputs)
    case.check(inputs, (out, lse))
    verify.require(verify.attention_error(case, inputs, out), case.dtype)
    wrong = out.copy()
    wrong[0, 3, 0] *= 2
    with pytest.raises(ToleranceError):
        case.check(inputs, (wrong, lse))
    with pytest.raises(verify.WrongResultError):
        verify.require(verify.attention_error(case, inputs, wrong), case.dtype)


def test_packed_cases() -> None:
    case = VarlenCase((30, 0, 1), 4, 32, seqlens_k=(20, 5, 9), num_kv_heads=2, causal=True)
    assert case.name == "varlen_b3_t31_max30_h4_g2_d32_e32_float16_causal"
    inputs = case.make_inputs()
    out, lse = case.run(inputs)
    case.check(inputs, (out, lse))
    verify.require(verify.varlen_error(case, inputs, out), case.dtype)
    assert case.flops == 4 * (30 * 20 + 1 * 9) * 64
    assert case.num_bytes == sum(inputs[name].nbytes for name in "qkv") + out.nbytes + lse.nbytes


def test_peak_memory_is_of_what_is_alive_at_once() -> None:
    executor = cuattn.runtime.executor.executor_for(x=np.zeros(1))
    with memory.allocations() as allocated:
        first = executor.empty((4, 8), np.float32)
        view = first[1:]
        del first
        second = executor.empty(16, np.float64)
        assert allocated.peak_bytes == 128 + 128  # the view keeps all of the first alive
        del view, second
        third = executor.empty(300, np.uint8)
    assert third.nbytes == allocated.peak_bytes == 300
    assert allocated.total_bytes == 556


def test_memory_of_the_unfused_way_is_that_of_two_squares() -> None:
    case = AttentionCase(2, 256, 1, 64, dtype="float32")
    (record,) = seed.records(case, "host", HOST)
    array, square, lse = 2 * 256 * 64 * 4, 2 * 256 * 256 * 4, 2 * 256 * 4
    assert record.metrics["flash_memory_bytes"] == 4 * array + lse
    assert record.metrics["standard_memory_bytes"] == 4 * array + 2 * square + lse
    assert record.metrics["saved_percent"] == 66.6
    assert record.verdicts == {"saved_percent": True}


def test_every_length_saves_what_was_published() -> None:
    """By the two formulas that the test above counts."""
    for seqlen, published in seed.PUBLISHED_SAVED_PERCENT.items():
        array, square, lse = 64 * seqlen, seqlen**2, seqlen
        assert 100 * 2 * square / (4 * array + lse + 2 * square) >= published


def test_a_large_shape_runs_the_unfused_way_on_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(3, 32, 2, 32, causal=True)
    monkeypatch.setattr(seed, "SHAPES", (case,))
    (record,) = seed.records(case, "host", HOST)
    array, square, lse = 32 * 2 * 32 * 2, 2 * 32 * 32, 2 * 32 * 4
    assert record.metrics["flash_memory_bytes"] == 3 * (4 * array + lse)
    assert record.metrics["standard_memory_bytes"] == 3 * (4 * array + lse + square * (4 + 2))
    assert "first entry of the batch" in record.method


def test_option_costs_are_relative_to_the_plain_case_of_the_dtype() -> None:
    wanted = ("option_plain", "option_causal", "option_float32", "option_float32_causal")
    steps = [step for step in SUITES["options"].plan(HOST) if step.label in wanted]
    records = {record.case: record for step in steps for record in step.run()}
    assert list(records) == list(wanted)
    assert not any(record.error for record in records.values())
    ratios = [record.metrics["ratio"] for record in records.values()]
    assert ratios[0] == ratios[2] == 1.0
    assert 0.5 < ratios[1] < 0.7
    assert 0.5 < ratios[3] < 0.7
