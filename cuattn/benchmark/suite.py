"""Suites of measurements, and how they are run.

A suite plans steps, a step yields records. One that fails leaves a record that says why, and the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cuattn.benchmark import machine
from cuattn.benchmark.results import BenchmarkError, Record, Report, scrub
from cuattn.errors import ArgumentError


class Progress(Protocol):
    """A function called before each step and at the end: seconds done and in all, as estimated, and what comes next."""

    def __call__(self, done_s: float, total_s: float, label: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may choose; an empty tuple leaves the choice to the suite.

    Attributes
    ----------
    executor : {"auto", "host", "cuda"}
        "auto" is the GPU where one answers.
    dtypes, seqlens, head_dims : tuple
    peers : bool
        On a GPU, time peers as well.
    budget_s : float
        Seconds for the repetitions of one problem.
    seed : int
        Of the random inputs.
    """

    executor: str = "auto"
    dtypes: tuple[str, ...] = ()
    seqlens: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    peers: bool = True
    budget_s: float = 0.5
    seed: int = 0

    def resolved(self) -> str:
        """The executor that will run.

        Raises
        ------
        ArgumentError
            An unknown executor.
        BenchmarkError
            "cuda", and no GPU answers.
        """
        if self.executor not in ("auto", "host", "cuda"):
            raise ArgumentError(f"executor is {self.executor!r}; allowed are auto, host and cuda")
        if self.executor == "cuda" and not machine.has_gpu():
            raise BenchmarkError("no GPU answers here (CuPy and a driver are needed); run with executor host")
        if self.executor == "auto":
            return "cuda" if machine.has_gpu() else "host"
        return self.executor


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of progress."""

    suite: str
    label: str
    estimate_s: float
    run: Callable[[], Iterable[Record]]


@dataclass(frozen=True, slots=True)
class Suite:
    """A named plan of steps."""

    name: str
    summary: str
    plan: Callable[[Options], list[Step]]


def run_steps(
    steps: Sequence[Step],
    *,
    progress: Progress | None = None,
    on_record: Callable[[Record], None] | None = None,
    until: float | None = None,
) -> Report:
    """Run steps one after the other.

    Parameters
    ----------
    progress : callable, optional
    on_record : callable, optional
        Called with each record as soon as it is there.
    until : float, optional
        A moment of `time.monotonic`: steps that have not begun by then are left out, each with a record that says so.
    """
    began = time.monotonic()
    total = sum(step.estimate_s for step in steps)
    done = 0.0
    records: list[Record] = []
    for step in steps:
        if progress:
            progress(done, total, step.label)
        for record in _run_step(step, until):
            records.append(record)
            if on_record:
                on_record(record)
        done += step.estimate_s
    if progress:
        progress(total, total, "done")
    return Report(machine.describe(), tuple(records), machine.now(), round(time.monotonic() - began, 2))


def _run_step(step: Step, until: float | None) -> Iterable[Record]:
    if until is not None and time.monotonic() >= until:
        yield Record(step.suite, step.label, error="left out: the time is up")
        return
    try:
        yield from step.run()
    except Exception as error:  # whatever it was, the steps after it still have something to say
        yield Record(step.suite, step.label, error=failure(error))


def failure(error: BaseException) -> str:
    """One line about an exception, without paths of this machine."""
    first = str(error).strip().splitlines()
    return scrub(f"{type(error).__name__}: {first[0] if first else ''}".rstrip(": "))[:500]
