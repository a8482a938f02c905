"""Rounds of drawn calls of one operation for one set of kernels, guided by coverage, and shrinking what fails.

A round fixes what kernels are compiled for, the skeleton, and leaves the rest to chance: so most of the time is spent
on calls, not on the compiler. Hypothesis draws, aims (`hypothesis.target`) at lines that few calls have executed and at
large errors, and shrinks.
"""

from __future__ import annotations

import random
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity

from cuattn.errors import CuattnError
from cuattn.testing.fuzzing import judge
from cuattn.testing.fuzzing.case import Case
from cuattn.testing.fuzzing.coverage import Coverage
from cuattn.testing.fuzzing.judge import How
from cuattn.testing.fuzzing.operation import Operation, Skeleton

__all__ = ["Failure", "Fuzzer"]

CANDIDATES = 12  # skeletons of which the one with most that is new is taken
SHRINKING_S = 60.0


@dataclass(frozen=True)
class Failure:
    """A call that was wrong, shrunk; `whole`: shrinking was not cut off."""

    case: Case
    error: str
    details: str = ""
    whole: bool = True

    @property
    def signature(self) -> str:
        """The operation and the error without its numbers: failures that agree in it count as one."""
        return signature(self.case.operation, self.error)


def signature(operation: str, error: str) -> str:
    """Return what two failures have in common if they count as one."""
    kind, _, text = error.partition(":")
    return f"{operation}: {kind}: {re.sub(r'[-+0-9.e()]+', '#', text)[:60]}"


class _Stop(KeyboardInterrupt):
    """Leaves a round of Hypothesis at once, which catches every other exception."""


@dataclass
class Fuzzer:
    """Draws calls of some operations, one round after the other.

    Attributes
    ----------
    operations
        What is drawn.
    seed
        The same operations, seed and time give the same calls, as far as time allows.
    how
        How calls are made.
    examples
        Calls of a round.
    coverage
        What has been covered so far.
    before
        Called with each case before its call: what is under way when a process dies.
    """

    operations: Sequence[Operation]
    seed: int | str = 0
    how: How = field(default_factory=How)
    examples: int = 40
    coverage: Coverage = field(default_factory=Coverage)
    before: Callable[[Case], None] = field(default=lambda case: None)
    known: set[str] = field(default_factory=set)  # signatures of failures that have been reported

    def __post_init__(self) -> None:
        self._random = random.Random(str(self.seed))

    def round(self, deadline: float = float("inf")) -> Failure | None:
        """Draw a skeleton of the operation with fewest calls, and calls for it; `deadline`: of `time.monotonic`."""
        fewest = min(self.coverage.cases[one.name] for one in self.operations)
        operation = self._random.choice([one for one in self.operations if self.coverage.cases[one.name] == fewest])
        drawn = [operation.skeleton(self._random) for _ in range(CANDIDATES)]
        skeleton = max(drawn, key=lambda one: self.coverage.novelty(operation.name, one))
        return self.attempts(operation, skeleton, deadline)

    def attempts(
        self,
        operation: Operation,
        skeleton: Skeleton,
        deadline: float = float("inf"),
        *,
        shrinking_s: float = SHRINKING_S,
    ) -> Failure | None:
        """Draw calls for a skeleton until one is wrong."""
        watched = _Watched(self, operation.name, skeleton, deadline, shrinking_s)
        settings = hypothesis.settings(
            max_examples=self.examples,
            database=None,
            deadline=None,
            derandomize=False,
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.target, Phase.shrink),
        )

        @hypothesis.seed(self._random.randrange(2**32))
        @settings
        @hypothesis.given(operation.cases(skeleton))
        def attempt(case: Case) -> None:
            watched(case)

        try:
            attempt()
        except _Stop:
            pass
        except Exception:
            if watched.smallest is None:  # not one of a call, but of the strategies
                raise
        if watched.smallest is not None:
            self.known.add(watched.smallest.signature)
        return watched.smallest


class _Watched:
    """One example: its call, its coverage, and the smallest failure so far."""

    def __init__(self, fuzzer: Fuzzer, operation: str, skeleton: Skeleton, deadline: float, shrinking_s: float) -> None:
        self.fuzzer, self.operation, self.skeleton = fuzzer, operation, skeleton
        self.deadline, self.shrinking_s = deadline, shrinking_s
        self.smallest: Failure | None = None

    def __call__(self, case: Case) -> None:
        if time.monotonic() > self.deadline:
            if self.smallest is not None:
                self.smallest = Failure(self.smallest.case, self.smallest.error, self.smallest.details, whole=False)
            raise _Stop
        fuzzer = self.fuzzer
        fuzzer.before(case)
        try:
            outcome = judge.run(case, fuzzer.how)
        except Exception as error:
            if not self._is_new(case, error):
                return
            raise
        coverage = fuzzer.coverage
        if self.smallest is None:
            hypothesis.target(coverage.rarity(outcome), label="rare lines")
            hypothesis.target(min(outcome.margin, 2.0), label="error")
            coverage.add(self.operation, self.skeleton, outcome)

    def _is_new(self, case: Case, error: Exception) -> bool:
        """Keep the smallest failure of the first kind; that of a kind that was reported before counts for nothing."""
        told = describe(error)
        own = signature(self.operation, told)
        if self.smallest is None:
            if own in self.fuzzer.known:
                self.fuzzer.coverage.cases[self.operation] += 1
                return False
            self.deadline = time.monotonic() + self.shrinking_s
        elif own != self.smallest.signature:
            return False
        if self.smallest is None or case.size <= self.smallest.case.size:
            self.smallest = Failure(case, told, "".join(traceback.format_exception(error)))
        return True


def describe(error: BaseException) -> str:
    """Return the kind of an error and its first line; of a fault of a kernel, all that the checkers say."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text if isinstance(error, CuattnError) else text.partition(chr(10))[0]}"
