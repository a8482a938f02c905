"""A step of `bench.gpu_check` under way: what it has found, written as it goes, and what an earlier attempt had found.

A step consists of parts: cases to check, problems to time. Each is noted in ``NAME.json`` before it begins and when it
is done, so that a process that is killed at whatever moment loses the part that ran and no other. The next attempt does
not repeat what is done; a part that did not come to its end twice is not tried a third time.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cuattn.benchmark.results import Record, write_text
from cuattn.benchmark.suite import Step as SuiteStep
from cuattn.benchmark.suite import failure, run_steps

BEGUN, BEGUN_AGAIN, DONE = "begun", "begun again", "done"
GIVEN_UP = "did not come to its end, twice"


@dataclass
class Run:
    """Where a step writes, where it runs, how long it may take, what it has found."""

    name: str
    out: Path
    executor: str
    seconds: float
    tests: tuple[str, ...] = ()
    summary: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    #: Name of a part to [state, seconds].
    parts: dict[str, list[Any]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    failed: bool = False
    complete: bool = True  # nothing was left out for want of time

    @classmethod
    def resumed(cls, name: str, out: Path, executor: str, seconds: float, tests: tuple[str, ...] = ()) -> Run:
        """A step that goes on where an attempt before this one ended, if there was one."""
        run = cls(name, out, executor, seconds, tests)
        data = _read(out, name)
        if data:
            run.detail, run.parts = data["outcome"]["detail"], data.get("parts", {})
            run.records = [Record(**fields) for fields in data["records"]]
        return run

    @property
    def is_tiny(self) -> bool:
        """Whether steps run in sizes for a dry run, as all do on the host executor."""
        return self.executor == "host"

    @property
    def until(self) -> float:
        """The moment of `time.monotonic` by which to be done."""
        return self.began + self.seconds

    @property
    def expected_s(self) -> float:
        """How long a part takes: the longest of the latest three that were measured, 0 before the first."""
        measured = [seconds for state, seconds in self.parts.values() if state == DONE]
        return max(measured[-3:], default=0.0)

    def save(self, status: str = "unfinished", trace: str = "") -> None:
        """Write everything known so far."""
        outcome = {"name": self.name, "status": status, "summary": self.summary, "detail": self.detail}
        data = {
            "outcome": {**outcome, "traceback": trace},
            "parts": self.parts,
            "records": [asdict(record) for record in self.records],
        }
        write_text(self.out / f"{self.name}.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def add(self, record: Record) -> None:
        """Keep a record, in the place of one of the same problem and provider that an earlier attempt left."""
        key = record.suite, record.case, record.provider
        self.records = [other for other in self.records if (other.suite, other.case, other.provider) != key]
        self.records.append(record)
        self.save()

    def attempt(self, part: str, work: Callable[[], None]) -> str | None:
        """Do a part, unless it is done; None if so, else why not: the time is up, or it has been given up."""
        state, _ = self.parts.get(part, ["", 0.0])
        if state == DONE:
            return None
        if state == BEGUN_AGAIN:
            return GIVEN_UP
        if time.monotonic() + self.expected_s > self.until:
            self.complete = False
            return "the time is up"
        began = time.monotonic()
        self.parts[part] = [BEGUN_AGAIN if state == BEGUN else BEGUN, 0.0]
        self.save()
        work()
        self.parts.pop(part)  # behind those that were done before it
        self.parts[part] = [DONE, round(time.monotonic() - began, 2)]
        self.save()
        return None

    def try_all(self, checks: dict[str, Callable[[], None]]) -> None:
        """Run every check, whatever becomes of the others: which ones fail says what is wrong."""
        verdicts = self.detail.setdefault("cases", {})

        def tried(name: str) -> None:
            try:
                checks[name]()
                verdicts[name] = "ok"
            except Exception as error:
                verdicts[name] = failure(error)

        for name in checks:
            if self.attempt(name, lambda name=name: tried(name)) == GIVEN_UP:  # type: ignore[misc]
                verdicts[name] = GIVEN_UP
        wrong = [name for name, verdict in verdicts.items() if verdict != "ok"]
        self.failed = bool(wrong)
        self.summary = f"{len(verdicts) - len(wrong)} of {len(checks)} right" + (
            f"; wrong: {wrong[0]}" if wrong else ""
        )

    def measure(self, steps: Sequence[SuiteStep]) -> None:
        """Run the steps of a suite that are not done, as many as the time allows. Ceilings belong to every process."""
        left_out = 0
        for step in steps:
            if step.suite == "ceilings":
                run_steps([step], on_record=self.add)
                continue
            reason = self.attempt(step.label, lambda step=step: run_steps([step], on_record=self.add) and None)  # type: ignore[misc]
            left_out += reason == "the time is up"
            if reason == GIVEN_UP:
                self.add(Record(step.suite, step.label, error=reason))
        wrong = [record for record in self.records if record.error and record.provider == "cuattn"]
        self.failed = bool(wrong)
        self.summary = f"{len(self.records)} records, {len(wrong)} failed, {left_out} problems left out"


def _read(out: Path, name: str) -> dict[str, Any] | None:
    try:
        data: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data


def read_result(out: Path, name: str) -> tuple[dict[str, Any], list[Record]]:
    """What a step wrote, whatever became of it."""
    data = _read(out, name)
    if data is None:
        return {"name": name, "status": "crashed", "summary": "nothing was written"}, []
    return data["outcome"], [Record(**fields) for fields in data["records"]]


def end_with_parent() -> None:
    """Let whatever ends the parent end this process too (on Linux), or it would go on using the GPU."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
