"""The orchestration of `bench.gpu_check`: every step in a dry run, and steps that crash, hang or have no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench import device_tests, gpu_check, gpu_run, gpu_steps, instruction_fixtures
from cuattn.benchmark import Record, from_json, machine
from cuattn.testing import instructions

ROOT = Path(__file__).resolve().parents[2]

PASSES_AND_FAILS = """
import pytest

@pytest.mark.parametrize("executor", ["host", "cuda"])
def test_passes(executor):
    assert executor == "host"

@pytest.mark.parametrize("executor", ["host"])
def test_fails(executor):
    assert executor == "cuda", "a reason"

@pytest.mark.parametrize("executor", ["host"])
def test_skips(executor):
    pytest.skip("not here")

def test_of_no_executor():
    raise AssertionError

@pytest.mark.cuda
def test_of_a_gpu():
    raise AssertionError
"""
EMPTY: dict[str, Any] = {"cases": 0, "opcodes": [], "different": 0, "differences": [], "refused": 0, "errors": []}
SLOW = """
import time, pytest

@pytest.mark.parametrize("executor", ["host"])
@pytest.mark.parametrize("number", range(40))
def test_slow(executor, number):
    time.sleep(0.2)
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_dry_run(tmp_path: Path, machine_paths) -> None:
    (tmp_path / "test_some.py").write_text(PASSES_AND_FAILS)
    out = tmp_path / "out"
    arguments = ("--out", str(out), "--executor", "host", "--minutes", "30", "--tests", str(tmp_path / "test_some.py"))
    result = command(*arguments)
    data = json.loads((out / "gpu_check.json").read_text())
    steps = {step["name"]: step for step in data["steps"]}
    assert tuple(steps) == gpu_steps.NAMES
    assert {name for name, step in steps.items() if step["status"] != "ok"} == {"tests"}, result.stdout
    assert result.returncode == 1  # for the test that fails
    assert steps["tests"]["detail"]["passed"] == steps["tests"]["detail"]["failed"] == 1
    assert "a reason" in steps["tests"]["detail"]["failures"][0]["message"]
    assert set(steps["smoke"]["detail"]["cases"].values()) == {"ok"}
    assert all(row["different"] == row["refused"] == 0 for row in steps["instructions"]["detail"]["families"].values())
    report = from_json((out / "results.json").read_text())
    assert {record.suite for record in report.records} == {
        *("attention", "backward", "decode", "options", "seed", "layout", "softmax", "latency"),
    }
    again = command(*arguments)
    assert again.stdout.count("done before") == len(gpu_steps.NAMES)
    assert json.loads((out / "gpu_check.json").read_text())["steps"] == data["steps"]
    assert from_json((out / "results.json").read_text()).records == report.records
    assert report.environment["numpy"]
    for name in ("gpu_check.json", "results.json"):
        assert machine_paths((out / name).read_text().replace(str(tmp_path), "")) == []
    assert (out / "steps" / "instruction_answers.npz").exists()


@pytest.mark.skipif(machine.has_gpu(), reason="a GPU answers here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = command("--out", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("Error: no GPU answers")
    assert list(tmp_path.iterdir()) == []


def plan(out: Path, seconds: float = 60.0) -> gpu_check.Plan:
    result = gpu_check.Plan(out, "host", ("tests",), time.monotonic() + seconds)
    result.steps.mkdir()
    return result


def python_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Make steps run a shell script in the place of Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "survived"
    python_that(monkeypatch, tmp_path, f"(sleep 2; touch {marker}) & sleep 60")
    began = time.monotonic()
    outcome, records = gpu_check.run_step(plan(tmp_path), gpu_steps.Step(gpu_steps.smoke, 0.1, 0))
    assert time.monotonic() - began < 2
    assert (outcome.status, records) == ("timeout", [])
    time.sleep(2.2)
    assert not marker.exists()


def test_a_step_that_crashes_leaves_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that(monkeypatch, tmp_path, "echo the driver is on fire; exit 3")
    outcome, _ = gpu_check.run_step(plan(tmp_path), gpu_steps.Step(gpu_steps.smoke, 10, 0))
    assert outcome.status == "crashed"
    assert "exit code 3" in outcome.traceback
    assert "the driver is on fire" in outcome.traceback


def test_a_result_of_an_earlier_run_is_not_taken_for_this_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that(monkeypatch, tmp_path, "exit 3")
    its_plan = plan(tmp_path)
    run = gpu_run.Run("smoke", its_plan.steps, "host", 1.0)
    run.add(Record("smoke", "found before"))
    run.save("ok")
    outcome, records = gpu_check.run_step(its_plan, gpu_steps.Step(gpu_steps.smoke, 10, 0))
    assert outcome.status == "crashed"
    assert records == run.records  # but what it has found is not lost


def test_without_time_a_step_is_left_out(tmp_path: Path) -> None:
    outcome, _ = gpu_check.run_step(plan(tmp_path, seconds=1.0), gpu_steps.Step(gpu_steps.smoke, 60))
    assert outcome.status == "left out"


def test_a_step_that_raises_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: gpu_steps.Run) -> None:
        run.detail["found"] = 1
        raise RuntimeError("half way")

    monkeypatch.setattr(gpu_steps, "STEPS", tuple(gpu_steps.Step(broken, 1) for _ in gpu_steps.STEPS))
    result = CliRunner().invoke(
        gpu_steps.main, ["smoke", "--out", str(tmp_path), "--executor", "host", "--seconds", "1"]
    )
    assert result.exit_code == 1
    outcome, _ = gpu_run.read_result(tmp_path, "smoke")
    assert (outcome["status"], outcome["detail"]["found"]) == ("failed", 1)
    assert "RuntimeError: half way" in outcome["traceback"]


def test_a_suite_in_a_step_keeps_its_records_one_by_one(tmp_path: Path) -> None:
    run = gpu_run.Run("softmax", tmp_path, "host", 60.0)
    gpu_steps.softmax(run)
    assert not run.failed
    _, records = gpu_run.read_result(tmp_path, "softmax")
    assert records == run.records != []


def test_tests_that_take_too_long_are_stopped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW)
    until = time.monotonic() + device_tests.RESERVE_S + 2.5
    result = device_tests.run("host", (str(tmp_path / "test_slow.py"),), tmp_path, until=until)
    assert result["stopped"]
    assert 1 <= result["passed"] < 40
    assert result["failed"] == 0


def test_a_test_run_that_never_ends_is_ended(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW.replace("0.2", "60"))
    result = device_tests.run("host", (str(tmp_path / "test_slow.py"),), tmp_path, until=time.monotonic() + 3)
    assert result["stopped"]
    assert result["exit_code"] is None


def test_an_instruction_that_cannot_be_loaded_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = instructions.cases_for("integer", 80)[:4]
    broken = replace(cases[1], opcode="frobnicate.s32")
    wrong = replace(cases[2], expected=tuple((value[0] ^ 1,) for value in cases[2].expected))
    table = (cases[0], broken, wrong, cases[3])
    monkeypatch.setattr(instructions, "FAMILIES", {"integer": None})
    monkeypatch.setattr(instructions, "ARCHITECTURES", (80,))
    monkeypatch.setattr(instructions, "cases_for", lambda name, arch: table)
    monkeypatch.setattr(instruction_fixtures, "run_programs", lambda *_: {**EMPTY, "cases": 24})
    found, complete = instruction_fixtures.run_table("host", tmp_path, tiny=False, until=time.monotonic() + 60)
    assert complete
    row = found["integer_sm_80"]
    assert (row["cases"], row["different"], row["refused"]) == (4, 1, 1)
    assert row["errors"][0].startswith("frobnicate.s32: UnsupportedPTXError")
    assert row["differences"][0].startswith(f"{wrong.opcode} lane 0")
    assert (
        json.loads((tmp_path / "instruction_answers.json").read_text())["integer_sm_80"]["opcodes"][1] == broken.opcode
    )


def test_families_of_an_earlier_run_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(executor: str, scratch: Path, key: str, answers: instruction_fixtures.Answers) -> dict[str, Any]:
        answers[f"{key}_0"] = np.arange(3)
        return {**EMPTY, "cases": len(answers)}

    monkeypatch.setattr(instruction_fixtures, "run_programs", ran)
    monkeypatch.setattr(instructions, "ARCHITECTURES", (90,))
    later = time.monotonic() + 60
    monkeypatch.setattr(instruction_fixtures, "_families", lambda *_: {"a": partial(ran, "", tmp_path)})
    assert instruction_fixtures.run_table("host", tmp_path, tiny=True, until=later)[0]["a"]["cases"] == 1
    two = {"a": partial(ran, "", tmp_path), "b": partial(ran, "", tmp_path)}
    monkeypatch.setattr(instruction_fixtures, "_families", lambda *_: two)
    found, complete = instruction_fixtures.run_table("host", tmp_path, tiny=True, until=0)
    assert (list(found), complete) == (["a"], False)
    found, complete = instruction_fixtures.run_table("host", tmp_path, tiny=True, until=later)
    assert [found[name]["cases"] for name in "ab"] == [1, 2] and complete
    with np.load(tmp_path / "instruction_answers.npz") as file:
        assert sorted(file) == ["a_0", "b_0"]
