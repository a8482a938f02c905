"""What has been covered: kernels, their source lines, dtypes, pairs of options. It guides what is drawn next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from cuattn.testing.fuzzing.judge import Outcome
from cuattn.testing.fuzzing.operation import Operation, Skeleton

__all__ = ["Coverage"]

_COUNTS = ("cases", "features", "dtypes", "kernels", "lines")
Pair = tuple[str, str, str]


@dataclass
class Coverage:
    """Counts of what calls did; those of several processes can be added up.

    Attributes
    ----------
    cases : Counter
        Operation → calls.
    features : Counter
        (operation, one, other) → calls in which both stood: options that were given, dtypes, buckets of head dims.
    dtypes : Counter
        (operation, dtype) → calls.
    kernels : Counter
        Kernel → launches.
    lines : Counter
        Source line of a kernel → calls that executed it.
    lines_of_code : set
        Source lines that those kernels have.
    margins : dict
        Operation → largest error as a fraction of what is allowed.
    """

    cases: Counter[str] = field(default_factory=Counter)
    features: Counter[Pair] = field(default_factory=Counter)
    dtypes: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    lines_of_code: set[str] = field(default_factory=set)
    margins: dict[str, float] = field(default_factory=dict)

    def add(self, operation: str, skeleton: Skeleton, outcome: Outcome) -> None:
        """Count a call."""
        self.cases[operation] += 1
        self.count(operation, skeleton)
        self.kernels.update(outcome.kernels)
        self.lines.update(outcome.lines.keys())
        self.lines_of_code |= outcome.lines_of_code
        self.margins[operation] = max(self.margins.get(operation, 0.0), outcome.margin)

    def count(self, operation: str, skeleton: Skeleton) -> None:
        """Count what stands together in a skeleton."""
        self.dtypes[operation, skeleton["dtype"]] += 1
        self.features.update(_pairs(operation, skeleton))

    def merge(self, other: Coverage) -> None:
        """Add the counts of another process."""
        for name in _COUNTS:
            getattr(self, name).update(getattr(other, name))
        self.lines_of_code |= other.lines_of_code
        for operation, margin in other.margins.items():
            self.margins[operation] = max(self.margins.get(operation, 0.0), margin)

    def since(self, before: Coverage) -> Coverage:
        """Return what has been added since a copy was taken."""
        added = Coverage(lines_of_code=self.lines_of_code, margins=self.margins)
        for name in _COUNTS:
            getattr(added, name).update(getattr(self, name) - getattr(before, name))
        return added

    def rarity(self, outcome: Outcome) -> float:
        """Say how rare the lines are that a call executed: each counts 1 over the calls before it, and 1 if new."""
        return sum(1 / (1 + self.lines[line]) for line in outcome.lines)

    def novelty(self, operation: str, skeleton: Skeleton) -> float:
        """Say how new a skeleton is: the mean of the same over the pairs of what stands in it, 1 if all are new."""
        pairs = list(_pairs(operation, skeleton))
        return sum(1 / (1 + self.features[pair]) for pair in pairs) / max(1, len(pairs))

    def option_pairs(self, operations: Sequence[Operation]) -> tuple[int, int]:
        """Return how many pairs of options stood together in a call, and how many pairs there are."""
        wanted = {
            (one.name, f"+{a}", f"+{b}") for one in operations for a, b in combinations(sorted(set(one.options)), 2)
        }
        return sum(pair in wanted for pair in self.features), len(wanted)


def _pairs(operation: str, skeleton: Skeleton) -> Iterator[Pair]:
    """Name every two things that stand in a skeleton, in the order of their names."""
    for one, other in combinations(sorted(_features(skeleton)), 2):
        yield operation, one, other


def _features(skeleton: dict[str, Any]) -> set[str]:
    found = {f"+{name}" for name in skeleton["options"]}
    for name, value in skeleton.items():
        if name.startswith("head_dim"):
            found.add(f"{name}={-(-value // 32) * 32}")
        elif name != "options":
            found.add(f"{name}={value}")
    return found
