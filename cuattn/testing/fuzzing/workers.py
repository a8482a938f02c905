"""Several processes that fuzz, and one that watches them.

So a call that ends its process, or that does not end, is found as well.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started here not feel Ctrl-C: the parent is asked, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Worker:
    """One process, and the file in which it says what it is about to call."""

    def __init__(self, context: Any, plan: Plan, index: int, folder: Path, results: Any, known: set[str]) -> None:
        self.current = folder / f"current-{index}.json"
        arguments = (plan, index, self.current, results, known, os.getpid())
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        with _without_interrupts():
            self.process.start()

    def case(self) -> Case | None:
        """What it is calling, or called last."""
        try:
            return Case.from_json(self.current.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def idle_s(self) -> float:
        """Seconds since it began with that; 0 before the first."""
        try:
            return time.time() - self.current.stat().st_mtime
        except OSError:
            return 0.0

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def fuzz(plan: Plan) -> Generator[Progress]:
    """Fuzz in `plan.workers` processes, and yield how far it is: several times a second, and at each failure.

    Whoever stops to iterate, by an exception too, stops the processes.
    """
    choose(plan.operations)  # a wrong name is an error here, not in every process
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    began = time.monotonic()
    told = Progress(0.0, Coverage(), [])
    known: set[str] = set()

    def heard(items: Iterable[Any]) -> Iterator[Progress]:
        """Count what processes have sent, and yield at each new failure."""
        for item in items:
            if isinstance(item, Coverage):
                told.coverage.merge(item)
            elif item.signature not in known:
                known.add(item.signature)
                told.failures.append(item)
                yield replace(told, failure=item)

    with tempfile.TemporaryDirectory(prefix="cuattn-fuzz-") as name:
        folder, started = Path(name), plan.workers
        workers = [_Worker(context, plan, index, folder, results, known) for index in range(plan.workers)]
        try:
            while workers:
                yield from heard(_drain(results))
                told.seconds = time.monotonic() - began
                for worker in list(workers):
                    failure = _dead(worker, plan)
                    if worker.process.is_alive():
                        continue
                    workers.remove(worker)
                    yield from heard([failure] if failure else [])
                    if failure is not None and told.seconds < plan.seconds:
                        rest = replace(plan, seconds=plan.seconds - told.seconds)
                        workers.append(_Worker(context, rest, started, folder, results, known))
                        started += 1
                yield told
            yield from heard(_drain(results, wait_s=0.0))
        finally:
            for worker in workers:
                worker.stop()
    told.seconds = time.monotonic() - began
    yield told


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
        if worker.idle_s() <= plan.patience_s:
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


def _work(plan: Plan, index: int, current: Path, results: Any, known: set[str], parent: int) -> None:
    """Fuzz in this process until the time is over."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("CUATTN_HOST_THREADS", str(max(1, cores // plan.workers)))

    def before(case: Case) -> None:
        part = current.with_suffix(".part")
        part.write_text(case.to_json(), encoding="utf-8")
        part.replace(current)

    fuzzer = Fuzzer(choose(plan.operations), f"{plan.seed}/{index}", plan.how, plan.examples, before=before)
    fuzzer.known |= known
    deadline = time.monotonic() + plan.seconds
    while time.monotonic() < deadline and os.getppid() == parent:
        so_far = copy.deepcopy(fuzzer.coverage)
        failure = fuzzer.round(deadline)
        results.put(fuzzer.coverage.since(so_far))
        if failure is not None:
            results.put(failure)
    results.close()
    results.join_thread()
