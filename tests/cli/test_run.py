"""`cuattn-bench run`: problems of one's own, models, peers, and what is kept of a run that does not end."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cli import run as cli_run
from cli.main import main
from cuattn import benchmark
from cuattn.benchmark import Options, Problem, Record, from_json, models, operations, peers, tables
from cuattn.benchmark.decode import decode_cases
from cuattn.benchmark.gradients import backward_cases
from cuattn.benchmark.suite import Step, Suite
from cuattn.errors import ArgumentError
from cuattn.testing.cases import AttentionCase

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--dtype", "float16", "--seqlen", "16", "--head-dim", "32", "--budget", "0.01", "--executor", "host")
PLAIN = ("run", *TINY, "--heads", "2", "--batch", "1", "--no-causal")

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, arguments, prog_name="cuattn-bench")


def steps_of(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], Iterator[Record]]) -> None:
    """Let the short suite be these steps."""

    def plan(options: Options) -> list[Step]:
        return [Step("smoke", f"step{index}", 1.0, step) for index, step in enumerate(steps)]

    monkeypatch.setitem(benchmark.SUITES, "smoke", Suite("smoke", "made up", plan))


def test_a_problem_of_ones_own(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    sizes = ("--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-dim-v", "64", "--seqlen-k", "24")
    options = ("--causal", "--window", "7", "--softcap", "20", "--alibi")
    result = run("run", *TINY, *sizes, *options, "--dtype", "float16", "--json", str(path))
    assert result.exit_code == 0, result.output
    (record,) = from_json(path.read_text()).records  # a repeated --dtype runs once
    assert record.case == "attention_b2_n16_m24_h4_g2_d32_e64_float16_causal_window_7_0_softcap_20_alibi"
    assert record.metrics["samples"] == len(record.samples["time_us"]) >= 3
    assert np.median(record.samples["time_us"]) == pytest.approx(record.metrics["time_us"], rel=1e-3)


@pytest.mark.parametrize("executor", ["host", "cuda"])
def test_problems_of_every_suite_that_reads_them(executor: str) -> None:
    options = Options(problem=Problem(batch=3, heads=6, kv_heads=2, causal=True), seqlens=(40, 40), dtypes=("float16",))
    (case,) = {case.seqlen_q: case for case in operations.attention_cases(options, executor)}.values()
    assert (case.batch, case.num_heads, case.num_kv_heads, case.causal) == (3, 6, 2, True)
    for gradient in backward_cases(options, executor):
        assert (gradient.forward.num_heads, gradient.forward.seqlen_q) == (6, 40)
    problem = Problem(
        batch=3, kv_heads=4, page_size=0, splits=2, queries=2, kv_format="int8", window=(9, 0), sinks=True
    )
    (decoded,) = decode_cases(executor, Options(problem=problem, seqlens=(40,), head_dims=(64,)))
    assert (decoded.batch, decoded.context, decoded.num_kv_heads, decoded.page_size) == (3, 40, 4, 0)
    assert decoded.name.endswith("_contiguous_int8_splits2_window_9_0_sinks")
    for wrong in (Problem(heads=3, kv_heads=2), Problem(kv_heads=7)):
        with pytest.raises(ArgumentError, match="no multiple of"):
            operations.attention_cases(Options(problem=wrong), executor)
    with pytest.raises(ArgumentError, match="no narrow format"):
        decode_cases(executor, Options(problem=Problem(kv_format="int8"), dtypes=("float64",)))


def test_without_a_suite_the_options_choose_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr("cli.run.report_of", lambda names, *_: chosen.append(names))
    for arguments in (
        *((), ("--budget", "1"), ("--heads", "4"), ("--kv-heads", "2", "--softcap", "3"), ("--page-size", "8")),
        *(("--splits", "2", "--seqlen", "64"), ("--model", "minilm"), ("softmax", "--seqlen", "3")),
    ):
        assert run("run", *arguments).exit_code == 0
    attention, decode = ("attention",), ("decode",)
    every = ("attention", "decode", "backward")
    assert chosen == [("smoke",), ("smoke",), attention, attention, decode, decode, every, ("softmax",)]


def test_models_expand_to_their_calls() -> None:
    options = Options("host", models=tuple(models.MODELS), seqlens=(8192,))
    prompts = [step.label for step in benchmark.plan(["attention"], options)]
    decoded = [step.label for step in benchmark.plan(["decode"], options)]
    trained = [step.label for step in benchmark.plan(["backward"], options)]
    kinds = {name: len(model.layers) for name, model in models.MODELS.items()}
    assert len(prompts) == sum(kinds.values()) and len(trained) == 2 * len(prompts)
    assert len(decoded) == len(prompts) - 1  # MiniLM writes nothing
    assert prompts[0] == "llama_3_8b_prefill_attention_b1_n8192_m8192_h32_g8_d128_e128_bfloat16_causal"
    gemma = next(label for label in decoded if label.startswith("gemma"))
    assert gemma == "gemma_2_9b_decode_decode_b1_n1_m8192_h16_g8_d256_bfloat16_page16_window_4095_0_softcap_50"
    assert tables.label(prompts[3]).startswith(
        "Mistral-7B prefill: attention B 1 N 8192 H 32 G 8 D 128 bfloat16 causal"
    )
    longer = Options("host", models=("SmolLM2",), seqlens=(32,), problem=Problem(batch=2, softcap=9.0))
    (label,) = (step.label for step in benchmark.plan(["attention"], longer))
    assert label == "smollm2_prefill_attention_b2_n32_m32_h9_g3_d64_e64_bfloat16_causal_softcap_9"
    with pytest.raises(ArgumentError, match="there is no model 'GPT'"):
        benchmark.plan(["attention"], Options("host", models=("GPT",)))


def test_named_peers_are_timed_on_a_cpu_and_missing_ones_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(*PLAIN, "--peers", "numpy-unfused,torch-flash,jax", "--format", "csv")
    assert result.exit_code == 0, result.output
    rows = {row["provider"]: row for row in csv.DictReader(io.StringIO(result.stdout))}
    assert float(rows["NumPy, unfused"]["relative_error"]) < 1e-3
    assert rows["torch FLASH"]["error"] == "on a GPU only"
    assert rows["cuattn"]["error"] == ""
    result = run(*PLAIN, "--peers", "torch-flash")
    assert "missing peers: torch FLASH (on a GPU only)" in result.stdout
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = peers.missing("attention", True, "cuda")
    assert found["flash-attn 4"] == "not installed: pip install --pre flash-attn-4"
    assert {"torch cuDNN", "torch FlexAttention", "xformers", "FlashInfer", "cuDNN", "JAX"} <= set(found)
    assert peers.of("attention", True, "cuda") == [] and peers.missing("attention", False, "cuda") == {}
    with pytest.raises(ArgumentError, match="there is no peer 'nobody'"):
        peers.of("attention", ("nobody",), "cuda")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_of_a_cpu_are_right(causal: bool, dtype: str) -> None:
    """As far as they can be tried here; what needs a GPU is checked there before it is timed."""
    case = AttentionCase(2, 24, 4, 16, num_kv_heads=2, causal=causal, dtype=dtype, scale=0.3)
    arrays = case.make_inputs(1)
    found = peers.of("attention", tuple(peers.names()), "host")
    assert {"NumPy, unfused"} <= {peer.name for peer in found}
    for peer in found:
        operations.check(case, arrays, peers.as_array(peer.prepare(case, arrays)()))


def test_the_file_is_opened_first_and_written_after_every_record(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "x.json", []

    def step() -> Iterator[Record]:
        for index in range(3):
            report = from_json(path.read_text())
            seen.append((len(report.records), report.complete))
            yield Record("smoke", f"case{index}", {"time_us": 1.0})

    steps_of(monkeypatch, step)
    assert run("run", "--json", str(path)).exit_code == 0
    assert seen == [(0, False), (1, False), (2, False)]
    report = from_json(path.read_text())
    assert report.complete and len(report.records) == 3
    write_text, left = cli_run.write_text, iter([True, True])

    def full_disk(where: Path, text: str) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write_text(where, text)

    def unchecked() -> Iterator[Record]:
        for index in range(3):
            yield Record("smoke", f"case{index}", {"time_us": 1.0})

    steps_of(monkeypatch, unchecked)
    monkeypatch.setattr(cli_run, "write_text", full_disk)
    result = run("run", "--json", str(path))
    assert result.exit_code == 1 and result.stderr.count("No space left on device") == 2
    assert "case2" in result.stdout and len(from_json(path.read_text()).records) == 1
    steps_of(monkeypatch, step)
    seen.clear()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(
        cli_run, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    result = run("run", "--json", str(tmp_path / "folder" / "y.json"))
    assert result.exit_code == 1 and "Permission denied" in result.stderr
    assert seen == []  # nothing was measured whose result could not be kept


def test_ctrl_c_prints_and_keeps_what_is_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> Iterator[Record]:
        yield Record("smoke", "early", {"time_us": 1.5})

    def interrupted() -> Iterator[Record]:
        raise KeyboardInterrupt
        yield

    steps_of(monkeypatch, measured, interrupted, measured)
    path = tmp_path / "x.json"
    result = run("run", "--json", str(path))
    assert result.exit_code == 130
    assert "early" in result.stdout and "interrupted" in result.stderr
    report = from_json(path.read_text())
    assert [record.case for record in report.records] == ["early"] and not report.complete


@pytest.mark.slow
def test_a_real_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    command = [sys.executable, "-m", "cli", "run", "counters", "host", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (path.exists() and from_json(path.read_text()).records):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"counters" in out and b"Traceback" not in errors
    report = from_json(path.read_text())
    assert report.records and not report.complete


def test_forms(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> Iterator[Record]:
        yield Record("smoke", "one", {"time_us": 2101.5, "samples": 3}, goals={"time_us": "<= 1"})

    steps_of(monkeypatch, measured)
    data: dict[str, Any] = json.loads(run("run", "--format", "json").stdout)
    assert data["records"][0]["metrics"] == {"time_us": 2101.5, "samples": 3}
    assert run("run", "--format", "csv").stdout.splitlines()[1] == "smoke,one,cuattn,none,2101.5,3,missed: <= 1,"
    assert "| one | 2,10" in run("run", "--format", "markdown").stdout
    assert "samples" in run("run", "--full").stdout and "samples" not in run("run").stdout
