"""The suites on the host executor, in small; and on a GPU as far as that can be tried without one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn.benchmark import (
    SUITES,
    BenchmarkError,
    Options,
    host_figures,
    inputs,
    machine,
    operations,
    peers,
    plan,
    run_suite,
    start,
    variants,
)
from cuattn.benchmark.suite import run_steps
from cuattn.dtypes import ELEMENTS
from cuattn.errors import ArgumentError
from cuattn.ops.attention.backward.listed_config import LISTED_BWD_CONFIGS
from cuattn.ops.attention.forward.listed_config import LISTED_FWD_CONFIGS
from cuattn.runtime.timer import Timing
from cuattn.testing.cases import AttentionCase, SoftmaxCase

TINY = Options(executor="host", dtypes=("float16",), seqlens=(16,), head_dims=(32,), budget_s=0.01)


def test_names() -> None:
    assert [step.suite for step in plan(["softmax", "softmax"], TINY)] == ["softmax"]
    with pytest.raises(ArgumentError, match=r"no suite 'speed': choose from smoke, attention"):
        run_suite(["speed"])


def test_every_suite_has_a_plan_with_estimates() -> None:
    for suite in SUITES.values():
        steps = suite.plan(Options(executor="host"))
        assert steps
        assert all(step.estimate_s > 0 for step in steps)
        assert suite.summary
        assert [step.label for step in steps if not re.fullmatch(r"[A-Za-z0-9_]+( sm_\w+| ptx)?", step.label)] == []
    assert sum(step.estimate_s for step in plan(["smoke"], Options(executor="host"))) < 60


@pytest.mark.skipif(machine.has_gpu(), reason="a GPU answers here")
def test_no_gpu() -> None:
    with pytest.raises(BenchmarkError, match="no GPU answers"):
        run_suite(["attention"], options=Options(executor="cuda"))
    assert Options().resolved() == "host"


@pytest.mark.smoke
def test_attention_and_softmax_on_the_host() -> None:
    report = run_suite(["attention", "softmax"], options=TINY)
    assert report.failures == ()
    assert [record.case for record in report.records] == [
        "attention_b1_n16_m16_h8_g8_d32_e32_float16",
        "attention_b1_n16_m16_h8_g8_d32_e32_float16_causal",
        "softmax_8192x16_float16_online",
    ]
    for record in report.records:
        assert record.executor == "host"
        assert "not a GPU time" in record.method
        assert record.metrics["samples"] >= 3
        assert 0 < record.metrics["relative_error"] < 4e-3
    attention, _, softmax = (record.metrics for record in report.records)
    assert attention["gflop_per_s"] == pytest.approx(4 * 8 * 16 * 16 * 32 / attention["time_us"] / 1e3, rel=1e-2)
    assert softmax["bandwidth_gb_per_s"] == pytest.approx(2 * 8192 * 16 * 2 / softmax["time_us"] / 1e3, rel=1e-2)


def test_every_suite_runs_in_every_dtype_that_it_is_offered() -> None:
    options = replace(TINY, dtypes=tuple(ELEMENTS))
    steps = plan(["attention", "backward", "softmax", "layout", "decode"], options)
    # One problem of a kind and dtype: the others differ in sizes, which other tests have.
    chosen = {(step.suite, *_kind(step.label)): step for step in steps if not step.label.startswith("generate_")}
    report = run_steps(list(chosen.values()))
    assert [record.error for record in report.failures] == []
    for suite in {step.suite for step in steps}:
        for dtype in ELEMENTS:
            assert any(record.suite == suite and f"_{dtype}" in record.case for record in report.records), (
                suite,
                dtype,
            )


def _kind(label: str) -> tuple[str, ...]:
    """The operation, the dtype, and the format of a cache."""
    return (label.partition("_")[0], *re.findall(r"b?float\d+|nvfp4|int8|e4m3fn|orderfree", label))


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionCase, "run", lambda case, arrays: (np.zeros_like(arrays["q"]), None))
    report = run_suite(["attention"], options=TINY)
    assert [record.metrics for record in report.records] == [{}, {}]
    assert all("WrongResultError: relative error 1 " in record.error for record in report.records)


def test_counters_are_exact() -> None:
    records = {record.case: record.metrics for record in run_suite(["counters"], options=TINY).records}
    short = records["softmax_64x1024_float32_online"]
    assert short["bytes_over_least"] == 1.0
    assert (short["global_read_bytes"], short["workspace_bytes"]) == (64 * 1024 * 4, 0)
    split = records["softmax_4x65536_float32_online"]
    assert split["launches"] == 2
    assert split["workspace_bytes"] == 4 * 8 * 8  # maximum and sum of 8 chunks of 4 rows
    attention = records["attention_b1_n1024_m1024_h2_g2_d64_e64_float16"]
    assert attention["mma_flops_over_formula"] == 1.0
    assert attention["mma"] == 4 * 2 * 1024 * 1024 * 64 // host_figures.MMA_FLOPS
    assert attention["workspace_bytes"] == 0


def test_compile_records() -> None:
    variant = next(variants.launched("attention_forward"))
    (record,) = variants.cubin_records(variant, "sm_80")
    assert record.verdicts["spill_bytes"]
    assert record.executor == "none"
    assert 16 <= record.metrics["registers"] <= 255
    assert record.metrics["smem_bytes"] >= variant.smem_bytes > 0
    assert record.metrics["ctas_per_sm"] >= 1
    (record,) = variants.ptx_records(variant)
    assert record.metrics["ptx_lines"] > 500


def test_compile_covers_every_row_on_both_architectures() -> None:
    labels = {variant.label for variant in variants.launched("attention_forward") if "_listed" not in variant.label}
    rows = cuattn.ops.attention.forward.config.FLASH_FWD_CONFIGS
    assert len(labels) == 4 * len(rows) + sum(row.itemsize == 2 for row in rows)
    backward = {variant.label for variant in variants.launched("attention_backward") if "_listed" not in variant.label}
    of_keys = [row for row in cuattn.ops.attention.backward.config.FLASH_BWD_CONFIGS if row.own == "keys"]
    launches = sum(len(row.launches()) for row in cuattn.ops.attention.backward.config.FLASH_BWD_CONFIGS)
    order_free = sum("_addsdq_" in label for label in backward)
    assert order_free == 4 * sum(row.itemsize == 2 for row in of_keys)
    assert len(backward) == 4 * launches + order_free
    with_everything = [label for label in labels if "_everything_" in label]
    assert len(with_everything) == sum(2 + (row.itemsize == 2) for row in rows if row.score_options)
    planned = [step.label for step in SUITES["compile"].plan(TINY)]
    for label in labels:
        assert {f"{label} sm_90a", f"{label} ptx"} <= set(planned)
    bias = {variant.label for variant in variants.launched("attention_backward_bias")}
    assert len(bias) == 3 * len(cuattn.ops.attention.backward.bias_config.BIAS_BWD_CONFIGS)
    assert {f"{label} sm_90a" for label in backward | bias} <= set(planned)


def test_compile_covers_every_row_over_lists_of_tiles() -> None:
    planned = {step.label for step in SUITES["compile"].plan(TINY)}
    forward = {variant.label for variant in variants.launched("attention_forward") if "_listed" in variant.label}
    assert len(forward) == sum(2 + row.score_options for row in LISTED_FWD_CONFIGS)
    backward = {variant.label for variant in variants.launched("attention_backward") if "_listed" in variant.label}
    assert len(backward) == sum((2 + row.score_options) * len(row.launches()) for row in LISTED_BWD_CONFIGS)
    assert {f"{label} sm_90a" for label in forward | backward} <= planned


def test_compile_covers_every_row_of_decoding() -> None:
    found = list(variants.launched("attention_decode"))
    rows = cuattn.ops.decode.config.FLASH_DECODE_CONFIGS
    on_tensor_cores = sum(row.products == "mma" for row in rows)
    assert len({variant.label for variant in found}) == len(found)
    assert len(found) == 4 * len(rows) + sum(row.itemsize < 8 for row in rows) + on_tensor_cores
    for options in ("plain", "causal", "everything"):
        assert sum(variant.label.endswith(f"_{options}") for variant in found) >= len(rows)
    planned = {step.label for step in SUITES["compile"].plan(TINY)}
    for variant in found:
        assert f"{variant.label} sm_90a" in planned
        limits = "sm_80", "sm_90a"
        fits = [arch for arch in limits if variant.smem_bytes <= cuattn.compile.smem_limit_bytes(arch)]
        assert {f"{variant.label} {arch}" for arch in fits} <= planned


def test_cold_means_cold() -> None:
    variant = next(variants.launched("attention_forward"))
    constants = variant.constants
    warm = cuattn.compile.build(variant.kernel, constants, arch="sm_80", kind="ptx")
    _, cold = variants.build_cold(variant, "sm_80", "ptx")
    assert cold.path != warm.path
    assert cold.image == warm.image
    assert not cold.path.exists()  # the cache was for this alone
    assert cuattn.compile.build(variant.kernel, constants, arch="sm_80", kind="ptx").path == warm.path


def test_call_overhead_launches_nothing() -> None:
    records = list(start.call_overhead(calls=20))
    assert [record.case for record in records] == ["call_overhead_attention", "call_overhead_softmax"]
    assert all(0 < record.metrics["overhead_us"] < 1e5 for record in records)
    x = np.ones((4, 8), np.float32)
    np.testing.assert_allclose(cuattn.softmax(x), 0.125)  # launches are back


def test_latencies_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PROCESSES", 1)
    (record,) = start.importing()
    assert record.metrics["heavy_modules"] == 0
    assert record.metrics["import_ms"] > 0
    (record,) = start.loading()
    assert record.metrics["heavy_modules"] == 0
    assert record.metrics["first_call_ms"] > 0
    with pytest.raises(BenchmarkError, match="no-such-thing"):
        start.in_fresh_processes("import sys; sys.exit('no-such-thing')", count=1)


class FakeTimer:
    """Times calls by what they return: the quicker a provider, the smaller its answer."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times = times
        self.order: list[str] = []

    def time(self, call: Callable[[], Any], *, budget_s: float) -> Timing:
        name = getattr(call, "provider", "cuattn")
        self.order.append(name)
        return Timing((self.times[name],) * 5)

    def synchronize(self) -> None:
        pass

    def release_memory(self) -> None:
        pass


@pytest.fixture
def cuda_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[operations.CudaBench]:
    """The bench for a GPU with NumPy arrays, a fake timer, and three peers: one right, one wrong, one that refuses."""

    def right(case: AttentionCase, arrays: Any) -> Callable[[], Any]:
        def call() -> Any:
            return cuattn.reference.attention(*arrays.values(), causal=case.causal)[0]

        call.provider = "right"  # type: ignore[attr-defined]
        return call

    def wrong(case: AttentionCase, arrays: Any) -> Callable[[], Any]:
        return lambda: arrays["v"]

    def refuses(case: AttentionCase, arrays: Any) -> Callable[[], Any]:
        raise peers.PeerError("not today")

    others = [peers.Peer("right", right), peers.Peer("wrong", wrong), peers.Peer("refuses", refuses)]
    make = inputs.make
    monkeypatch.setattr(inputs, "make", lambda case, executor, seed: make(case, "host", seed))
    monkeypatch.setattr(peers, "of", lambda kind, *_: others if kind == "attention" else [])
    monkeypatch.setattr(peers, "as_array", lambda out: out)
    bench = operations.CudaBench("attention", Options(executor="cuda"))
    bench._timer = FakeTimer({"cuattn": 50.0, "right": 100.0})  # type: ignore[assignment]
    bench.copy_gb_per_s, bench.matmul_tflop_per_s = 4000.0, 800.0
    yield bench


def test_cuda_bench_compares_with_peers_that_are_right(cuda_bench: operations.CudaBench) -> None:
    case = AttentionCase(1, 64, 2, 32, causal=True)
    records = {record.provider: record for record in cuda_bench.records(case)}
    assert list(records) == ["cuattn", "right", "wrong", "refuses"]
    own = records["cuattn"].metrics
    assert own["speed_over_best_peer"] == 2.0
    assert own["kernel"] == "attention_forward 64x64"  # which one it was depends on the device
    assert own["tflop_per_s"] == pytest.approx(case.flops / 50e-6 / 1e12, rel=1e-3)
    assert own["fraction_of_matmul"] == pytest.approx(own["tflop_per_s"] / 800, rel=1e-2)
    assert own["samples"] == 10  # two rounds
    assert "speed_over_best_peer" not in records["right"].metrics
    assert "relative error" in records["wrong"].error
    assert records["refuses"].error == "PeerError: not today"
    assert {record.executor for record in records.values()} == {"cuda"}
    assert cuda_bench.timer.order == ["cuattn", "right"] * 2


def test_cuda_bench_without_peers(cuda_bench: operations.CudaBench) -> None:
    case = SoftmaxCase(64, 128)
    (record,) = cuda_bench.records(case)
    assert "kernel" not in record.metrics
    assert "speed_over_best_peer" not in record.metrics
    assert record.metrics["bandwidth_gb_per_s"] == pytest.approx(case.num_bytes / 50 / 1e3, rel=1e-3)
    assert record.metrics["fraction_of_copy"] == pytest.approx(case.num_bytes / 50 / 1e3 / 4000, rel=1e-2)


def test_an_installed_wheel_is_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    asked = []

    def flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: float | None, causal: bool) -> Any:
        asked.append((softmax_scale, causal))
        return v.clone(), "lse"  # in the layout of q, k and v

    wheel = ModuleType("flash_attn_interface")
    wheel.__dict__.update(flash_attn_func=flash_attn_func, __spec__=ModuleSpec("flash_attn_interface", None))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", wheel)
    (peer,) = (peer for peer in peers.of("attention", ("flash-attn 3",), "cuda"))
    case = AttentionCase(1, 16, 2, 32, causal=True)
    arrays = case.make_inputs(0)
    out = peer.prepare(case, arrays)()
    assert asked == [(None, True)]
    assert torch.equal(out.transpose(1, 2), torch.from_dlpack(arrays["v"]))  # [B, H, N, E], as SDPA returns it


def test_a_disturbed_measurement_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([Timing((10.0,), 5.0), Timing((8.0,), 12.0), Timing((9.0,), 9.0)])
    monkeypatch.setattr(host_figures, "time_host", lambda call, budget_s: next(timings))
    with cuattn.host.schedule("eager", threads=2):
        assert host_figures.undisturbed(lambda: None, budget_s=1.0).median_us == 8.0
    timings = iter([Timing((10.0,), 19.0), Timing((1.0,), 2.0)])
    with cuattn.host.schedule("eager", threads=2):
        assert host_figures.undisturbed(lambda: None, budget_s=1.0).median_us == 10.0
