"""Cases of the backward, the suites of its speed and of its costs; and its peers as far as that goes without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn.benchmark import SUITES, Options, gradients, inputs, operations, peers, tables, verify
from cuattn.errors import ArgumentError
from cuattn.runtime.timer import Timing
from cuattn.testing.backward_cases import BackwardCase, VarlenBackwardCase
from cuattn.testing.backward_cases import gradients as arrays_of
from cuattn.testing.cases import AttentionCase, Case, VarlenCase
from cuattn.testing.tolerance import ToleranceError

HOST = Options(executor="host", budget_s=0.01)
TINY = Options(executor="host", dtypes=("float16",), seqlens=(16,), head_dims=(32,), budget_s=0.01)
EVERYTHING = BackwardCase(
    AttentionCase(
        2, 40, 4, 32, num_kv_heads=2, seqlen_k=50, causal=True, window=(20, None), softcap=10.0, alibi=True,
        sinks=True, bias="hm", mask="bnm",
    ),
    dbias=True,
    dlse=True,
)  # fmt: skip
DROPOUT = BackwardCase(AttentionCase(1, 70, 2, 32, dropout_p=0.3))
PACKED = VarlenBackwardCase(VarlenCase((30, 0, 1), 4, 32, seqlens_k=(20, 5, 9), num_kv_heads=2, causal=True))
CASES: list[Any] = [EVERYTHING, DROPOUT, PACKED]
IDS = ["everything", "dropout", "packed"]


def test_names_are_unique_and_say_what_is_asked_for() -> None:
    for executor in ("host", "cuda"):
        names = [case.name for case in gradients.backward_cases(Options(), executor)]
        assert len(set(names)) == len(names)
        assert all(name.replace("_", "").isalnum() for name in names)
    assert EVERYTHING.name == f"backward_{EVERYTHING.forward.name}_dlse_dbias"
    case = BackwardCase(AttentionCase(1, 8, 1, 32), deterministic=False, with_forward=True)
    assert case.name == f"forward_backward_{case.forward.name}_orderfree"
    assert tables.label(case.name) == "forward and backward B 1 N 8 H 1 D 32 float16 orderfree"


def test_the_suite_has_every_option_and_type_in_both_orders() -> None:
    for executor, head_dims in (("host", {64, 128, 256}), ("cuda", {64, 128, 256})):
        cases = gradients.backward_cases(Options(), executor)
        assert {case.deterministic for case in cases} == {True, False}
        assert {case.forward.head_dim for case in cases} == head_dims
        assert {case.dtype for case in cases} >= {"float16", "bfloat16", "float32"}
        words = " ".join(case.name for case in cases)
        for word in ("causal", "dropout", "window", "softcap", "dbias", "varlen", "forward_backward"):
            assert f"{word}_" in words, word
        assert any(case.forward.num_kv_heads for case in cases)


def test_what_is_no_case() -> None:
    with pytest.raises(ArgumentError, match="dbias is True; it needs a bias"):
        BackwardCase(AttentionCase(1, 8, 1, 32), dbias=True)
    with pytest.raises(ArgumentError, match="dtype is 'float8_e5m2'"):
        BackwardCase(AttentionCase(1, 8, 1, 32, dtype="float8_e5m2"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_case_runs_and_knows_a_wrong_gradient(case: Case) -> None:
    arrays = case.make_inputs(seed=1)
    grads = case.run(arrays)
    case.check(arrays, grads)
    operations.check(case, arrays, grads)
    for name, grad in arrays_of(grads).items():
        wrong = grad.copy()
        wrong[np.unravel_index(np.argmax(np.abs(grad)), grad.shape)] *= -1
        with pytest.raises(ToleranceError):
            case.check(arrays, grads._replace(**{name: wrong}))
        with pytest.raises(verify.WrongResultError):
            operations.check(case, arrays, grads._replace(**{name: np.flip(grad).copy()}))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bytes_are_those_of_inputs_and_gradients(case: Any) -> None:
    arrays = case.make_inputs()
    grads = arrays_of(case.run(arrays))
    small = ("sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "dsinks")
    given = sum(x.nbytes for name, x in (arrays | grads).items() if name not in small)
    assert case.num_bytes == given
    assert case.flops == 5 * case.forward.flops // 2


def test_with_the_forward_it_is_the_same_gradients_and_more_work() -> None:
    alone = BackwardCase(AttentionCase(1, 40, 2, 32, causal=True))
    both = BackwardCase(alone.forward, with_forward=True)
    arrays = alone.make_inputs()
    for first, second in zip(alone.run(arrays)[:3], both.run(arrays | {"out": 0, "lse": 0})[:3], strict=True):
        np.testing.assert_array_equal(first, second)
    assert both.flops == alone.flops + alone.forward.flops == 7 * alone.forward.flops // 2
    assert both.num_bytes == alone.num_bytes + alone.forward.num_bytes
    assert operations.workspace_bytes(both, arrays) == operations.workspace_bytes(alone, arrays)


@pytest.mark.parametrize("case", [EVERYTHING, DROPOUT], ids=IDS[:2])
def test_big_cases_are_looked_at_in_parts(case: BackwardCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "WHOLE_LOGITS", 10)
    monkeypatch.setattr("cuattn.testing.backward_cases.SAMPLE", 16)
    arrays = case.make_inputs(seed=2)
    grads = case.run(arrays)
    operations.check(case, arrays, grads)
    for name in ("dq", "dk", "dv"):
        wrong = getattr(grads, name).copy()
        wrong[0, 3, 0] *= 2
        with pytest.raises(verify.WrongResultError):
            operations.check(case, arrays, grads._replace(**{name: wrong}))


def test_the_suite_on_the_host() -> None:
    report = cuattn.benchmark.run_suite(["backward"], options=TINY)
    assert report.failures == ()
    assert len(report.records) == 4  # plain and causal, in a fixed order and in any
    for record in report.records:
        assert record.executor == "host"
        assert 0 < record.metrics["relative_error"] < 4e-3
        rows = 8 * 16 * 4  # of one number each
        assert record.metrics["workspace_bytes"] == rows * (2 + 32 * record.case.endswith("orderfree"))
    plain = report.records[0].metrics
    flops = 5 * 2 * 8 * 16 * 16 * 32
    assert plain["gflop_per_s"] == pytest.approx(flops / plain["time_us"] / 1e3, rel=1e-2)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = BackwardCase.run
    monkeypatch.setattr(BackwardCase, "run", lambda case, arrays: run(case, arrays)._replace(dk=arrays["k"]))
    report = cuattn.benchmark.run_suite(["backward"], options=TINY)
    assert all("WrongResultError" in record.error for record in report.records)


def test_costs_are_counted_beside_the_forward() -> None:
    wanted = ("gradient_plain", "gradient_causal", "gradient_float32_causal", "gradient_bias_m_dbias", "workspace")
    steps = [step for step in SUITES["gradients"].plan(HOST) if step.label in wanted]
    records = {record.case: record for step in steps for record in step.run()}
    plain = records["gradient_plain"].metrics
    assert plain["mma_over_forward"] == 3.5  # seven products, where the forward has two
    assert plain["order_free_instructions"] != plain["warp_instructions"]
    assert plain["order_free_mma_over_forward"] == 2.5  # and here five
    assert plain["logits_bytes"] == 4 * 2 * 512 * 512
    assert plain["order_free_workspace_bytes"] == plain["workspace_bytes"] + 4 * 2 * 512 * 64  # dq in float32
    assert plain["workspace_bytes"] == 2 * 4 * 2 * 512  # two numbers a row
    assert 0.5 < records["gradient_causal"].metrics["warp_instructions"] / plain["warp_instructions"] < 0.8
    assert records["gradient_float32_causal"].metrics["mma"] == 0
    assert records["gradient_bias_m_dbias"].metrics["launches"] > plain["launches"]
    sizes = [record for name, record in records.items() if name.startswith("workspace_")]
    assert len(sizes) == len(gradients.WORKSPACE_SEQLENS)
    assert all(all(record.verdicts.values()) for record in sizes)
    assert sizes[1].metrics["workspace_bytes"] == 4 * sizes[0].metrics["workspace_bytes"]  # linear in N


class FakeTimer:
    """Every call takes as long."""

    def time(self, call: Callable[[], Any], *, budget_s: float) -> Timing:
        call()
        return Timing((100.0,) * 5)

    def synchronize(self) -> None:
        pass

    def release_memory(self) -> None:
        pass


def test_peers_on_a_gpu_are_checked_gradient_by_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy arrays, a peer that is right and one whose dk is wrong."""

    def right(case: BackwardCase, arrays: Any) -> Callable[[], Any]:
        grads = cuattn.reference.attention_backward(**arrays, **case.options)
        return lambda: peers.PeerGrads(grads.dq, grads.dk, grads.dv)

    def wrong(case: BackwardCase, arrays: Any) -> Callable[[], Any]:
        return lambda: right(case, arrays)()._replace(dk=arrays["k"])

    others = [peers.Peer("right", right), peers.Peer("wrong", wrong)]
    make = inputs.make
    monkeypatch.setattr(inputs, "make", lambda case, executor, seed: make(case, "host", seed))
    monkeypatch.setattr(peers, "of", lambda *_: others)
    monkeypatch.setattr(peers, "as_array", lambda out: out)
    bench = operations.CudaBench("backward", Options(executor="cuda"))
    bench._timer = FakeTimer()  # type: ignore[assignment]
    case = BackwardCase(AttentionCase(1, 64, 2, 32, causal=True))
    records = {record.provider: record for record in bench.records(case)}
    assert list(records) == ["cuattn", "right", "wrong"]
    assert records["cuattn"].metrics["speed_over_best_peer"] == 1.0
    assert records["cuattn"].metrics["tflop_per_s"] == pytest.approx(case.flops / 100e-6 / 1e12, rel=1e-3)
    assert records["cuattn"].metrics["workspace_bytes"] > 0
    assert "workspace_bytes" not in records["right"].metrics
    assert "relative error" in records["wrong"].error
    free = BackwardCase(case.forward, deterministic=False)
    assert [record.provider for record in bench.records(free)] == ["cuattn"]  # its peers have been timed
