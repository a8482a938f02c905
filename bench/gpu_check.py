"""The one command for a GPU: right or wrong, and how fast, in under ten minutes.

    python -m bench.gpu_check --out DIR

From a plain checkout: nothing is installed, CuPy must be there, torch and pytest may be. The steps that say most come
first, each in a process of its own with a time limit, so that a crash or a hang costs that step and no other. After
each step DIR holds what is known so far: ``gpu_check.json`` with every step, ``results.json`` in the form of
``bench/results/``, a log and the artefacts of each step in ``DIR/steps``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cuattn.benchmark import machine, tables
from cuattn.benchmark.results import Record, Report, scrub, write_text

from . import gpu_steps

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
HOST_PATIENCE = 5  # on the host executor, times the budget of a step: its C library may have to be compiled first
GRACE_S = 5.0  # between the moment a step is asked to end and the moment it is ended


@dataclass
class Outcome:
    """What is known of a step: status is "ok", "failed", "crashed", "timeout" or "left out"."""

    name: str
    status: str
    seconds: float = 0.0
    summary: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""


@dataclass(frozen=True)
class Plan:
    """How all steps are run."""

    out: Path
    executor: str
    tests: tuple[str, ...]
    deadline: float  # time.monotonic()
    environment: dict[str, str] = field(default_factory=dict)  # of the steps, beside that of this process

    @property
    def steps(self) -> Path:
        return self.out / "steps"


def run_step(plan: Plan, step: gpu_steps.Step) -> tuple[Outcome, list[Record]]:
    """Run one step in a process of its own, and read what it left behind."""
    budget_s = step.budget_s * (HOST_PATIENCE if plan.executor == "host" else 1)
    seconds = min(budget_s, plan.deadline - time.monotonic() - GRACE_S)
    if seconds < step.least_s:
        return Outcome(step.name, "left out", summary="the time is up"), []
    command = [sys.executable, "-m", "bench.gpu_steps", step.name, "--out", str(plan.steps)]
    command += ["--executor", plan.executor, "--seconds", f"{seconds:.1f}"]
    command += [word for test in plan.tests for word in ("--tests", test)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    (plan.steps / f"{step.name}.json").unlink(missing_ok=True)  # of an earlier run
    began = time.monotonic()
    with (plan.steps / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **plan.environment, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    outcome, records = gpu_steps.read_result(plan.steps, step.name)
    log_tail = (plan.steps / f"{step.name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
    result = Outcome(**outcome, seconds=round(time.monotonic() - began, 1))
    if code is None:
        result.status, result.traceback = "timeout", result.traceback or scrub(log_tail)
    elif code and result.status not in ("failed", "ok"):
        result.status, result.traceback = "crashed", scrub(f"exit code {code}\n{log_tail}")
    return result, records


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the step and what it started; it has a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(plan: Plan, outcomes: list[Outcome], records: list[Record], began: float) -> None:
    """Put everything known so far into the two files."""
    environment: dict[str, Any] = next((o.detail["environment"] for o in outcomes if "environment" in o.detail), {})
    report = Report(environment, tuple(records), machine.now(), round(time.monotonic() - began, 1))
    report.write(plan.out / "results.json")
    data = {
        "schema_version": SCHEMA_VERSION,
        "created": report.created,
        "executor": plan.executor,
        "duration_s": report.duration_s,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    write_text(plan.out / "gpu_check.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def overview(outcomes: list[Outcome]) -> Table:
    """A line a step."""
    table = Table(title="gpu_check", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("")
    for outcome in outcomes:
        words = outcome.summary or (outcome.traceback.strip().splitlines() or [""])[-1]
        color = "green" if outcome.status == "ok" else "red"
        table.add_row(outcome.name, f"[{color}]{outcome.status}[/]", f"{outcome.seconds:.0f}", words)
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option(
    "--executor",
    type=click.Choice(("cuda", "host")),
    default="cuda",
    show_default=True,
    help="host: a dry run of every step on the host executor, in tiny sizes.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=9.5,
    show_default=True,
    help="When to stop; what has not begun by then is left out.",
)
@click.option("--only", type=click.Choice(gpu_steps.NAMES), multiple=True, help="Only these steps.")
@click.option("--tests", multiple=True, default=("tests",), show_default=True, help="What pytest is given.")
def main(out: Path, executor: str, minutes: float, only: tuple[str, ...], tests: tuple[str, ...]) -> None:
    """Check a GPU: smoke test, instructions, tests, speed beside peers, latencies.

    The exit code is 0 if every step went well, 1 otherwise.

    \b
    Examples:
      python -m bench.gpu_check --out gpu
      python -m bench.gpu_check --out gpu --only environment --only smoke
      python -m bench.gpu_check --out dry --executor host --minutes 3
    """
    if executor == "cuda" and not machine.has_gpu():
        raise click.ClickException("no GPU answers (a driver and CuPy are needed); --executor host makes a dry run")
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 140)
    plan = Plan(out.resolve(), executor, tests, began + 60 * minutes)
    plan.steps.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    records: list[Record] = []
    steps = [step for step in gpu_steps.STEPS if not only or step.name in only]
    for step in steps:
        if step.name in ("environment", "smoke") and any(other.name == "hopper" for other in steps):
            plan.environment["CUATTN_HOPPER"] = "off"  # what is right without it is worth knowing first
        elif step.name == "hopper":
            plan.environment["CUATTN_HOPPER"] = "auto"
        console.print(f"{time.monotonic() - began:4.0f} s  {step.name}: {step.summary}")
        try:
            outcome, found = run_step(plan, step)
        except Exception:  # whatever it is: the other steps still have something to say
            outcome, found = Outcome(step.name, "crashed", traceback=scrub(traceback.format_exc())), []
        if step.name == "hopper" and outcome.status != "ok":
            plan.environment["CUATTN_HOPPER"] = "off"
        outcomes.append(outcome)
        records += found
        write(plan, outcomes, records, began)
    report = Report({}, tuple(records), machine.now(), 0.0)
    console.print(tables.summary(report))
    console.print(overview(outcomes))
    console.print(f"results: {out}/gpu_check.json, {out}/results.json")
    sys.exit(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu_check")
