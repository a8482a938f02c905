"""`bench.gpu_check` goes on where an earlier run ended, wherever that was, and loses nothing of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import device_tests, gpu_check, gpu_run, gpu_steps
from cuattn.benchmark import Record
from cuattn.benchmark.suite import Step

ROOT = Path(__file__).resolve().parents[2]


#: A test that notes the processes of pytest and of the step, and takes a minute.
SLEEPS = """
import os, pathlib, time, pytest

@pytest.mark.parametrize("executor", ["host"])
def test_slow(executor):
    fresh = pathlib.Path({path!r} + ".fresh")
    fresh.write_text(f"{{os.getpid()}} {{os.getppid()}}")
    fresh.rename({path!r})
    time.sleep(60)
"""


class Killed(BaseException):
    """What ends a process in the middle of a part."""


def resumed(out: Path, seconds: float = 60.0) -> gpu_run.Run:
    return gpu_run.Run.resumed("forward", out, "cuda", seconds)


def problem(label: str, ran: list[str], ends: Callable[[], None] = lambda: None) -> Step:
    def run() -> Iterator[Record]:
        ran.append(label)
        yield Record("attention", label, {"time_us": float(len(ran))}, "cuattn")
        ends()
        yield Record("attention", label, {"time_us": 2.0}, "torch cuDNN")

    return Step("attention", label, 1.0, run)


def killed() -> None:
    raise Killed


def test_what_is_done_is_not_repeated_and_what_was_interrupted_is(tmp_path: Path) -> None:
    ran: list[str] = []
    run = resumed(tmp_path)
    with pytest.raises(Killed):
        run.measure([problem("a", ran), problem("b", ran, killed), problem("c", ran)])
    outcome, records = gpu_run.read_result(tmp_path, "forward")
    assert outcome["status"] == "unfinished"
    assert [(x.case, x.provider) for x in records] == [("a", "cuattn"), ("a", "torch cuDNN"), ("b", "cuattn")]
    again = resumed(tmp_path)
    again.measure([problem("a", ran), problem("b", ran), problem("c", ran)])
    assert ran == ["a", "b", "b", "c"]
    assert again.complete and not again.failed
    times = {record.case: record.metrics["time_us"] for record in again.records if record.provider == "cuattn"}
    assert times == {"a": 1, "b": 3, "c": 4}
    assert len(again.records) == 6


def test_a_part_that_ends_the_process_twice_is_given_up(tmp_path: Path) -> None:
    ran: list[str] = []
    for _ in range(2):
        with pytest.raises(Killed):
            resumed(tmp_path).measure([problem("a", ran, killed), problem("b", ran)])
    run = resumed(tmp_path)
    run.measure([problem("a", ran, killed), problem("b", ran)])
    assert ran == ["a", "a", "b"]
    assert run.failed and run.complete
    assert {x.case: x.error for x in run.records if x.provider == "cuattn"} == {"a": gpu_run.GIVEN_UP, "b": ""}


def test_checks_resume_too(tmp_path: Path) -> None:
    def wrong() -> None:
        raise AssertionError("not right")

    with pytest.raises(Killed):
        resumed(tmp_path).try_all({"a": wrong, "b": killed})
    run = resumed(tmp_path)
    run.try_all({"a": killed, "b": lambda: None})
    assert run.detail["cases"] == {"a": "AssertionError: not right", "b": "ok"}
    assert (run.failed, run.summary) == (True, "1 of 2 right; wrong: a")


def test_no_part_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    """By the longest of the latest that were measured."""
    ran: list[str] = []
    run = resumed(tmp_path, seconds=0.5)
    run.measure([problem("a", ran, lambda: time.sleep(0.3)), problem("b", ran), problem("c", ran)])
    assert ran == ["a"] and not run.complete
    assert run.summary == "2 records, 0 failed, 2 problems left out"
    assert all(not record.error for record in run.records)


def test_ceilings_belong_to_every_process(tmp_path: Path) -> None:
    ran: list[str] = []
    for _ in range(2):
        resumed(tmp_path).measure([Step("ceilings", "copy", 1.0, lambda: ran.append("copy") or [])])  # type: ignore[func-returns-value]
    assert ran == ["copy", "copy"]


def test_results_of_other_sources_are_kept_aside(tmp_path: Path) -> None:
    plan = gpu_check.Plan(tmp_path, "host", (), time.monotonic() + 60)
    identity = {"executor": "host", "source_sha256": "1", "gpu": None}
    assert gpu_check.begin(plan, identity, anew=False) == {}
    gpu_run.Run("smoke", plan.steps, "host", 1.0).save("ok")
    assert gpu_check.begin(plan, identity, anew=False)["smoke"][0].is_done
    assert gpu_check.begin(plan, {**identity, "source_sha256": "2"}, anew=False) == {}
    assert (tmp_path / "steps-before-1" / "smoke.json").exists()
    gpu_run.Run("smoke", plan.steps, "host", 1.0).save("ok")
    assert gpu_check.begin(plan, {**identity, "source_sha256": "2"}, anew=True) == {}
    assert (tmp_path / "steps-before-2" / "smoke.json").exists()


def test_a_step_that_raised_or_was_cut_short_is_tried_again() -> None:
    assert all(gpu_check.Outcome("smoke", status).is_done for status in ("ok", "failed"))
    assert not any(gpu_check.Outcome("smoke", status).is_done for status in ("unfinished", "timeout", "crashed"))
    assert not gpu_check.Outcome("smoke", "failed", traceback="RuntimeError").is_done


def test_a_run_that_is_killed_leaves_what_it_has_and_nothing_running(tmp_path: Path) -> None:
    """In the middle of a step, whose processes must not go on alone."""
    script = (
        "from bench import gpu_check, gpu_steps\n"
        "gpu_steps.STEPS = tuple(s for s in gpu_steps.STEPS if s.name in ('environment', 'tests'))\n"
        "gpu_check.main()\n"
    )
    out, pids = tmp_path / "out", tmp_path / "pids"
    (tmp_path / "test_slow.py").write_text(SLEEPS.format(path=str(pids)))
    arguments = ["--out", str(out), "--executor", "host", "--tests", str(tmp_path / "test_slow.py")]
    for number, statuses in ((signal.SIGKILL, ["ok"]), (signal.SIGTERM, ["ok", "unfinished"])):
        pids.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not pids.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        running = [int(pid) for pid in pids.read_text().split()]
        assert all(map(_is_alive, running))
        process.send_signal(number)
        process.wait(30)
        while any(map(_is_alive, running)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_is_alive, running))
        data = json.loads((out / "gpu_check.json").read_text())
        assert [step["status"] for step in data["steps"]] == statuses


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_tests_that_have_results_are_not_run_again(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.parametrize('executor', ['host'])\ndef test_{}(executor):\n    assert {}\n"
    (tmp_path / "test_one.py").write_text(source.format("one", "True"))
    first = device_tests.run("host", (str(tmp_path),), tmp_path, until=time.monotonic() + 60)
    assert (first["passed"], first["failed"]) == (1, 0)
    (tmp_path / "test_one.py").write_text(source.format("one", "False"))
    (tmp_path / "test_two.py").write_text(source.format("two", "True"))
    with (tmp_path / "tests.jsonl").open("a") as file:
        file.write('{"stopped": true}\n{"test": "cut o')
    again = device_tests.run("host", (str(tmp_path),), tmp_path, until=time.monotonic() + 60)
    assert (again["passed"], again["failed"], again["stopped"]) == (2, 0, False)


@pytest.mark.parametrize("status, later", [("ok", "auto"), ("failed", "off"), ("timeout", "off")])
def test_steps_do_without_a_hopper_kernel_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, later: str
) -> None:
    seen = {}

    def run_step(
        plan: gpu_check.Plan, step: gpu_steps.Step, startup_s: float
    ) -> tuple[gpu_check.Outcome, list[Record]]:
        seen[step.name] = plan.environment.get("CUATTN_HOPPER")
        return gpu_check.Outcome(step.name, status if step.name == "hopper" else "ok"), []

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    CliRunner().invoke(gpu_check.main, ["--out", str(tmp_path), "--executor", "host"])
    assert (seen["smoke"], seen["hopper"]) == ("off", "auto")
    assert {seen[step.name] for step in gpu_steps.STEPS[3:]} == {later}
    seen.clear()
    CliRunner().invoke(gpu_check.main, ["--out", str(tmp_path), "--executor", "host", "--only", "attention"])
    assert seen == {"attention": None}
