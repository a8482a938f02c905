"""`cuattn-bench fuzz` and `verify`: what they print, their exit codes, and what they say to wrong input."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cuattn.benchmark import machine
from cuattn.testing.fuzzing import OPERATIONS, Array, Case, workers
from cuattn.testing.fuzzing.coverage import Coverage
from cuattn.testing.fuzzing.engine import Failure
from cuattn.testing.fuzzing.workers import Plan, Progress

ROOT = Path(__file__).resolve().parents[2]
RIGHT = Case("softmax", {"x": Array((2, 3), "float32"), "axis": -1, "algorithm": "online"})
WRONG = Case("softmax", {**RIGHT.arguments, "axis": 5})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="cuattn-bench")


def test_operations_are_listed() -> None:
    result = run("fuzz", "--list", "--format", "csv")
    assert result.exit_code == 0
    assert [row["operation"] for row in csv.DictReader(io.StringIO(result.stdout))] == list(OPERATIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fuzz", "sofmax"), "no operation 'sofmax'; known are attention"),
        (("fuzz", "--checkers", "mem,ini"), "'ini' is none of mem, init, race"),
        (("fuzz", "--minutes", "0"), "0"),
        (("fuzz", "--replay", "no/such/file"), "no/such/file"),
        (("verify", "sofmax"), "no operation 'sofmax'"),
        (("fuzz", "rope", "--executor", "cuda"), "no GPU answers here"),
        (("verify", "rope", "--executor", "cuda"), "no GPU answers here"),
        (("verify", "rope", "--dtype", "int8"), "nothing to verify in int8"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    result = run(*arguments)
    assert result.exit_code == (1 if "GPU" in message else 2)
    assert message in result.stderr and "Traceback" not in result.output


def test_replay(tmp_path: Path) -> None:
    for name, case in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.json").write_text(case.to_json())
    result = run("fuzz", "--replay", str(tmp_path / "right.json"))
    assert result.exit_code == 0 and "0 of 1 wrong" in result.stdout
    result = run("fuzz", "--replay", str(tmp_path), "--format", "json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)["replayed"]
    assert [row["result"] for row in rows] == ["right", "wrong"]
    (tmp_path / "none.json").write_text("[]")
    result = run("fuzz", "--replay", str(tmp_path / "none.json"))
    assert result.exit_code == 1 and "no case of the fuzzer" in result.stderr


def test_failures_are_printed_as_programs_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure(WRONG, "ArgumentError: axis is 5", whole=False)
    coverage = Coverage()
    coverage.cases["softmax"], coverage.margins["softmax"] = 7, 0.25

    def told(plan: Plan) -> Iterator[Progress]:
        yield from (Progress(1.0, coverage, [failure], failure), Progress(2.0, coverage, [failure]))

    monkeypatch.setattr(workers, "fuzz", told)
    result = run("fuzz", "softmax", "--save", str(tmp_path / "new"))
    assert result.exit_code == 1
    (saved,) = (tmp_path / "new").iterdir()
    assert Case.from_json(saved.read_text()) == WRONG
    assert WRONG.snippet() in result.stdout and f"--replay {saved}" in result.stdout
    assert "ArgumentError: axis is 5 (shrinking was cut off)" in result.stdout and "1 failure" in result.stdout


@pytest.mark.slow
def test_a_short_run_that_is_interrupted_sums_up() -> None:
    """In a terminal's process group of its own; Ctrl-C ends the workers too."""
    command = [sys.executable, "-m", "cli", "fuzz", "softmax", "--minutes", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stderr is not None and b"1 operation, seed 0, 1 worker, " in process.stderr.readline()
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err
    assert b"operations" in out and b"failures" in out
    for _ in range(100):  # what tracks the resources of processes ends by itself, a little later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker was left behind")


def test_verify_prints_fractions_of_what_is_allowed() -> None:
    result = run("verify", "rope", "--dtype", "float32", "--examples", "1", "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rope: options"]
    assert {row[""] for row in rows} == {"no option", "interleaved", "inverse", "all options"}
    assert all(0 < row["float32"] <= 1 for row in rows)


def test_verify_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def wrong(problem: object, results: object) -> None:
        raise AssertionError("out is wrong")

    monkeypatch.setitem(OPERATIONS, "softmax", replace(OPERATIONS["softmax"], check=wrong))
    result = run("verify", "softmax", "--dtype", "float32", "--examples", "1", "--no-rows")
    assert result.exit_code == 1
    assert "wrong: softmax, no option, float32: AssertionError: out is wrong" in result.stdout
