"""The one command for a GPU: right or wrong, and how fast, in as many minutes as there are.

    python -m bench.gpu_check --minutes 6 --out DIR

From a plain checkout: nothing is installed, CuPy must be there, torch and pytest may be. The steps that say most come
first, each in a process of its own with a time limit, so that a crash or a hang costs that step and no other. After
each step DIR holds what is known so far: ``gpu_check.json`` with every step, ``results.json`` in the form of
``bench/results/``, a log and the artefacts of each step in ``DIR/steps``. With the same DIR another run goes on where
this one ended, wherever that was.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cuattn.benchmark import machine, tables
from cuattn.benchmark.results import Record, Report, scrub, write_text

from . import gpu_run, gpu_steps

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 2
HOST_PATIENCE = 5  # on the host executor, times the budget of a step: its C library may have to be compiled first
GRACE_S = 5.0  # between the moment a step is asked to end and the moment it is ended


@dataclass
class Outcome:
    """What is known of a step: status is "ok", "failed", "unfinished", "crashed", "timeout" or "left out"."""

    name: str
    status: str
    seconds: float = 0.0
    summary: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left that another run would try."""
        return self.status == "ok" or (self.status == "failed" and not self.traceback)


Results = dict[str, tuple[Outcome, list[Record]]]  # by the name of the step


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


def run_step(plan: Plan, step: gpu_steps.Step, startup_s: float = 0.0) -> tuple[Outcome, list[Record]]:
    """Run one step in a process of its own, which may take ``startup_s`` to begin, and read what it left behind."""
    budget_s = step.budget_s * (HOST_PATIENCE if plan.executor == "host" else 1)
    seconds = min(budget_s, plan.deadline - time.monotonic() - GRACE_S)
    if seconds < step.least_s + startup_s:
        outcome, records = read_step(plan, step.name) or (Outcome(step.name, "left out"), [])
        return replace(outcome, status="left out", summary=f"the time is up; {outcome.summary}".rstrip("; ")), records
    command = [sys.executable, "-m", "bench.gpu_steps", step.name, "--out", str(plan.steps)]
    command += ["--executor", plan.executor, "--seconds", f"{seconds:.1f}", "--spawned", str(time.time())]
    command += [word for test in plan.tests for word in ("--tests", test)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    earlier = read_step(plan, step.name)
    begun = _begun(plan, step.name)
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
    log_tail = (plan.steps / f"{step.name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
    found = read_step(plan, step.name)
    seconds_before = earlier[0].seconds if earlier else 0.0
    if found is None or _begun(plan, step.name) == begun:  # it has not even begun to write
        outcome, records = earlier or (Outcome(step.name, "crashed", summary="nothing was written"), [])
        outcome = replace(outcome, status="crashed", traceback=scrub(f"exit code {code}\n{log_tail}"))
    else:
        outcome, records = found
    result = replace(outcome, seconds=round(seconds_before + time.monotonic() - began, 1))
    if code is None:
        result.status, result.traceback = "timeout", result.traceback or scrub(log_tail)
    elif code and not result.is_done:
        result.status, result.traceback = "crashed", scrub(f"exit code {code}\n{log_tail}")
    return result, records


def read_step(plan: Plan, name: str) -> tuple[Outcome, list[Record]] | None:
    """What a step has left in DIR, in whichever run; None if nothing."""
    if not (plan.steps / f"{name}.json").exists():
        return None
    fields, records = gpu_run.read_result(plan.steps, name)
    return Outcome(**fields), records


def _begun(plan: Plan, name: str) -> int:
    """A mark that tells one version of a step's file from the next: each is a file of its own."""
    with contextlib.suppress(FileNotFoundError):
        return (plan.steps / f"{name}.json").stat().st_mtime_ns
    return 0


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the step and what it started; it has a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def begin(plan: Plan, identity: dict[str, Any], *, anew: bool) -> Results:
    """Make DIR ready, and read what an earlier run of the same sources on the same GPU has left there.

    What belongs to other sources or another GPU, or is not wanted any more, stays in a folder of its own beside.
    """
    known = plan.steps / "identity.json"
    plan.steps.mkdir(parents=True, exist_ok=True)
    if any(plan.steps.iterdir()) and (anew or not known.exists() or json.loads(known.read_text()) != identity):
        number = 1
        while (aside := plan.out / f"steps-before-{number}").exists():
            number += 1
        plan.steps.rename(aside)
        plan.steps.mkdir()
    write_text(known, json.dumps(identity) + "\n")
    seconds = _earlier_seconds(plan)
    found = {name: read_step(plan, name) for name in gpu_steps.NAMES}
    return {
        name: (replace(result[0], seconds=seconds.get(name, 0.0)), result[1])
        for name, result in found.items()
        if result is not None
    }


def _earlier_seconds(plan: Plan) -> dict[str, float]:
    try:
        data = json.loads((plan.out / "gpu_check.json").read_text(encoding="utf-8"))
        return {step["name"]: float(step["seconds"]) for step in data["steps"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(plan: Plan, results: Results, began: float) -> None:
    """Put everything known so far into the two files."""
    outcomes = [results[name][0] for name in gpu_steps.NAMES if name in results]
    records = [record for name in gpu_steps.NAMES if name in results for record in results[name][1]]
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
    """Return an overview of the results, one line a step."""
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
    default=6.0,
    show_default=True,
    help="When to stop; what has not begun by then is left to the next run.",
)
@click.option("--only", type=click.Choice(gpu_steps.NAMES), multiple=True, help="Only these steps.")
@click.option("--anew", is_flag=True, help="Repeat what an earlier run has done; its results stay beside.")
@click.option("--tests", multiple=True, default=("tests",), show_default=True, help="What pytest is given.")
def main(out: Path, executor: str, minutes: float, only: tuple[str, ...], tests: tuple[str, ...], anew: bool) -> None:
    """Check a GPU: every kernel right, instructions, speed beside peers, gradients, decoding, tests, latencies.

    With the DIR of an earlier run, what that run has done is not repeated. The exit code is 0 if every step went well,
    1 otherwise.

    \b
    Examples:
      python -m bench.gpu_check --out gpu
      python -m bench.gpu_check --out gpu --only environment --only smoke
      python -m bench.gpu_check --out dry --executor host --minutes 3
    """
    if executor == "cuda" and not machine.has_gpu():
        raise click.ClickException("no GPU answers (a driver and CuPy are needed); --executor host makes a dry run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is known is written first
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 140)
    plan = Plan(out.resolve(), executor, tests, began + 60 * minutes)
    identity = {
        "executor": executor,
        "source_sha256": machine.source()["source_sha256"],
        "gpu": machine.gpu().get("gpu"),
    }
    results = begin(plan, identity, anew=anew)
    steps = [step for step in gpu_steps.STEPS if not only or step.name in only]
    try:
        run_steps(plan, steps, results, console, began)
    finally:
        write(plan, results, began)
    outcomes = [results[name][0] for name in gpu_steps.NAMES if name in results]
    records = [record for _, found in results.values() for record in found]
    tables.show(Report({}, tuple(records), machine.now(), 0.0), console)
    console.print(overview(outcomes))
    console.print(f"results: {out}/gpu_check.json, {out}/results.json")
    sys.exit(any(results[step.name][0].status != "ok" for step in steps))


def run_steps(plan: Plan, steps: list[gpu_steps.Step], results: Results, console: Console, began: float) -> None:
    """Run what is not done, and put it into ``results`` and DIR."""
    startup_s = 0.0
    for step in steps:
        if step.name in ("environment", "smoke") and any(other.name == "hopper" for other in steps):
            plan.environment["CUATTN_HOPPER"] = "off"  # what is right without it is worth knowing first
        elif step.name == "hopper":
            plan.environment["CUATTN_HOPPER"] = "auto"
        is_done = step.name in results and results[step.name][0].is_done
        console.print(f"{time.monotonic() - began:4.0f} s  {step.name}: {'done before' if is_done else step.summary}")
        if not is_done:
            try:
                results[step.name] = run_step(plan, step, startup_s)
            except Exception:  # whatever it is: the other steps still have something to say
                crashed = Outcome(step.name, "crashed", traceback=scrub(traceback.format_exc()))
                results[step.name] = crashed, (read_step(plan, step.name) or (None, []))[1]
            except BaseException:  # the run is ended from outside
                if (found := read_step(plan, step.name)) is not None:
                    results[step.name] = found
                raise
            startup_s = max(startup_s, results[step.name][0].detail.get("startup_s", 0.0))
            write(plan, results, began)
        if step.name == "hopper" and results[step.name][0].status != "ok":
            plan.environment["CUATTN_HOPPER"] = "off"


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu_check")
