"""The orchestration of `bench.gpu_check`: every step in a dry run, and steps that crash, hang or have no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import device_tests, gpu_check, gpu_steps, instruction_fixtures
from cuattn.benchmark import Record, from_json, machine

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
    result = command(
        "--out", str(out), "--executor", "host", "--minutes", "30", "--tests", str(tmp_path / "test_some.py")
    )
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
    gpu_steps.Run("smoke", its_plan.steps, "host", 1.0).save("ok")
    outcome, _ = gpu_check.run_step(its_plan, gpu_steps.Step(gpu_steps.smoke, 10, 0))
    assert outcome.status == "crashed"


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
    outcome, _ = gpu_steps.read_result(tmp_path, "smoke")
    assert (outcome["status"], outcome["detail"]) == ("failed", {"found": 1})
    assert "RuntimeError: half way" in outcome["traceback"]


def test_a_suite_in_a_step_keeps_its_records_one_by_one(tmp_path: Path) -> None:
    run = gpu_steps.Run("softmax", tmp_path, "host", 60.0)
    gpu_steps.softmax(run)
    assert not run.failed
    _, records = gpu_steps.read_result(tmp_path, "softmax")
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
    from dataclasses import replace

    from cuattn.testing import instructions

    cases = instructions.cases_for("integer", 80)[:4]
    broken = replace(cases[1], opcode="frobnicate.s32")
    wrong = replace(cases[2], expected=tuple((value[0] ^ 1,) for value in cases[2].expected))
    table = (cases[0], broken, wrong, cases[3])
    monkeypatch.setattr(instructions, "FAMILIES", {"integer": None})
    monkeypatch.setattr(instructions, "ARCHITECTURES", (80,))
    monkeypatch.setattr(instructions, "cases_for", lambda name, arch: table)
    found = instruction_fixtures.run_table("host", tmp_path, tiny=False, until=time.monotonic() + 60)
    row = found["integer_sm_80"]
    assert (row["cases"], row["different"], row["refused"]) == (4, 1, 1)
    assert row["errors"][0].startswith("frobnicate.s32: UnsupportedPTXError")
    assert row["differences"][0].startswith(f"{wrong.opcode} lane 0")
    assert (
        json.loads((tmp_path / "instruction_answers.json").read_text())["integer_sm_80"]["opcodes"][1] == broken.opcode
    )


@pytest.mark.parametrize("status, later", [("ok", "auto"), ("failed", "off"), ("timeout", "off")])
def test_steps_do_without_a_hopper_kernel_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, later: str
) -> None:
    seen = {}

    def run_step(plan: gpu_check.Plan, step: gpu_steps.Step) -> tuple[gpu_check.Outcome, list[Record]]:
        seen[step.name] = plan.environment.get("CUATTN_HOPPER")
        return gpu_check.Outcome(step.name, status if step.name == "hopper" else "ok"), []

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    CliRunner().invoke(gpu_check.main, ["--out", str(tmp_path), "--executor", "host"])
    assert (seen["smoke"], seen["hopper"]) == ("off", "auto")
    assert {seen[step.name] for step in gpu_steps.STEPS[3:]} == {later}
    seen.clear()
    CliRunner().invoke(gpu_check.main, ["--out", str(tmp_path), "--executor", "host", "--only", "attention"])
    assert seen == {"attention": None}
