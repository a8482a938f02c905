"""Several processes that fuzz, and one that watches them: a call that ends its process, or does not end, is found too."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuattn.testing.fuzzing.case import Case
from cuattn.testing.fuzzing.catalogue import choose
from cuattn.testing.fuzzing.coverage import Coverage
from cuattn.testing.fuzzing.engine import Failure, Fuzzer
from cuattn.testing.fuzzing.judge import How

__all__ = ["PATIENCE_S", "Plan", "Progress", "fuzz"]

#: Seconds after which a call is taken for one without an end: compiling its kernels is part of it.
PATIENCE_S = 300.0
_POLL_S = 0.2
_GRACE_S = 5.0  # for a worker that is in the middle of a call when the time is over


@dataclass(frozen=True)
class Plan:
    """What is to be fuzzed, and for how long."""

    operations: tuple[str, ...] = ()
    seconds: float = 600.0
    seed: int = 0
    workers: int = 1
    how: How = field(default_factory=How)
    examples: int = 40
    patience_s: float = PATIENCE_S


@dataclass
class Progress:
    """How far it is; `failure` is one that has just been found."""

    seconds: float
    coverage: Coverage
    failures: list[Failure]
    failure: Failure | None = None

    @property
    def cases(self) -> int:
        """Calls so far."""
        return sum(self.coverage.cases.values())


class _Worker:
    """One process, and the file in which it says what it is about to call."""

    def __init__(self, context: Any, plan: Plan, index: int, folder: Path, results: Any, known: set[str]) -> None:
        self.index, self.folder = index, folder
        self.current = folder / f"current-{index}.json"
        left = max(0.0, plan.seconds)
        arguments = (plan, index, left, self.current, results, known, os.getpid())
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()

    def case(self) -> Case | None:
        """What it is calling, or called last."""
        try:
            return Case.from_json(self.current.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def idle_s(self) -> float:
        """Seconds since it began with that."""
        try:
            return time.time() - self.current.stat().st_mtime
        except OSError:
            return 0.0

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def fuzz(plan: Plan) -> Iterator[Progress]:
    """Fuzz in `plan.workers` processes, and yield how far it is: several times a second, and at each failure.

    Whoever stops to iterate, by an exception too, stops the processes.
    """
    choose(plan.operations)  # a wrong name is an error here, not in every process
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    began = time.monotonic()
    coverage, failures, known = Coverage(), [], set[str]()
    with tempfile.TemporaryDirectory(prefix="cuattn-fuzz-") as name:
        folder, next_index = Path(name), plan.workers
        workers = [_Worker(context, plan, index, folder, results, known) for index in range(plan.workers)]
        try:
            while workers:
                passed = time.monotonic() - began
                for item in _drain(results):
                    found = None
                    if isinstance(item, Coverage):
                        coverage.merge(item)
                    elif item.signature not in known:
                        known.add(item.signature)
                        failures.append(found := item)
                    if found is not None:
                        yield Progress(passed, coverage, failures, found)
                for worker in list(workers):
                    failure = _dead(worker, plan)
                    if worker.process.is_alive():
                        continue
                    workers.remove(worker)
                    if failure is not None and failure.signature not in known:
                        known.add(failure.signature)
                        failures.append(failure)
                        yield Progress(passed, coverage, failures, failure)
                    if failure is not None and passed < plan.seconds:
                        rest = _with_seconds(plan, plan.seconds - passed)
                        workers.append(_Worker(context, rest, next_index, folder, results, known))
                        next_index += 1
                yield Progress(passed, coverage, failures)
        finally:
            for worker in workers:
                worker.stop()
    for item in _drain(results, wait_s=0.0):
        if isinstance(item, Coverage):
            coverage.merge(item)
    yield Progress(time.monotonic() - began, coverage, failures)


def _with_seconds(plan: Plan, seconds: float) -> Plan:
    return Plan(plan.operations, seconds, plan.seed, plan.workers, plan.how, plan.examples, plan.patience_s)


def _drain(results: Any, wait_s: float = _POLL_S) -> Iterator[Any]:
    """Yield what has come; wait a little for the first."""
    try:
        yield results.get(timeout=wait_s) if wait_s else results.get_nowait()
        while True:
            yield results.get_nowait()
    except queue.Empty:
        return


def _dead(worker: _Worker, plan: Plan) -> Failure | None:
    """Say what was wrong with a process that has ended with an error, or that had to be ended."""
    if worker.process.is_alive():
        if worker.idle_s() < plan.patience_s:
            return None
        case = worker.case()
        worker.stop()
        told = f"Hang: no end after {plan.patience_s:.0f} s"
    else:
        worker.process.join()
        code = worker.process.exitcode
        if code == 0:
            return None
        case = worker.case()
        told = f"Crash: the process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"
    return Failure(case or Case("none"), told, whole=False)


def _work(plan: Plan, index: int, seconds: float, current: Path, results: Any, known: set[str], parent: int) -> None:
    """Fuzz in this process until the time is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends this process
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("CUATTN_HOST_THREADS", str(max(1, cores // plan.workers)))

    def before(case: Case) -> None:
        part = current.with_suffix(".part")
        part.write_text(case.to_json(), encoding="utf-8")
        part.replace(current)

    fuzzer = Fuzzer(choose(plan.operations), f"{plan.seed}/{index}", plan.how, plan.examples, before=before)
    fuzzer.known |= known
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and os.getppid() == parent:
        before_round, fuzzer.coverage = fuzzer.coverage, Coverage()
        guide = Coverage()
        guide.merge(before_round)
        fuzzer.coverage = guide
        failure = fuzzer.round(deadline)
        results.put(_difference(guide, before_round))
        if failure is not None:
            results.put(failure)
    results.close()
    results.join_thread()


def _difference(now: Coverage, before: Coverage) -> Coverage:
    """Return what a round has added."""
    added = Coverage(lines_of_code=now.lines_of_code, margins=now.margins)
    for name in ("cases", "features", "dtypes", "kernels", "lines"):
        getattr(added, name).update(getattr(now, name) - getattr(before, name))
    return added
