"""Suites of measurements, and how they are run.

A suite plans steps, a step yields records. One that fails leaves a record that says why, and the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cuattn.benchmark import machine
from cuattn.benchmark.problem import Problem
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
        What is repeated in them counts once.
    problem : Problem
        Sizes and options of attention that are not to be the suite's.
    models : tuple of str
        Names of `cuattn.benchmark.models.MODELS`, whose calls take the place of the suite's problems.
    peers : bool or tuple of str
        On a GPU, time peers as well: all that are installed, or those named. Named ones are timed on a CPU too.
    budget_s : float
        Seconds for the repetitions of one problem.
    seed : int
        Of the random inputs.
    """

    executor: str = "auto"
    dtypes: tuple[str, ...] = ()
    seqlens: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    peers: bool | tuple[str, ...] = True
    budget_s: float = 0.5
    seed: int = 0
    problem: Problem = field(default_factory=Problem)
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dtypes", "seqlens", "head_dims", "models"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    @property
    def is_own(self) -> bool:
        """Whether sizes or options are asked for."""
        return bool(self.dtypes or self.seqlens or self.head_dims or self.problem.given)

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
    """A named plan of steps; `reads` are the fields of `Options` and `Problem` that change what it does."""

    name: str
    summary: str
    plan: Callable[[Options], list[Step]]
    reads: frozenset[str] = frozenset()


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
