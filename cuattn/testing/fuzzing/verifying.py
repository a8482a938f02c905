"""Every option of every operation against float64, one by one, with how much of the tolerance each uses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity

from cuattn.testing.fuzzing import judge
from cuattn.testing.fuzzing.case import Case
from cuattn.testing.fuzzing.engine import describe
from cuattn.testing.fuzzing.judge import How
from cuattn.testing.fuzzing.operation import Operation, Skeleton

__all__ = ["EVERYTHING", "NOTHING", "Verdict", "check", "skeletons"]

NOTHING, EVERYTHING = "no option", "all options"
HEAD_DIM = 64
_SAMPLES = 600  # skeletons that are drawn to see which values there are, and which stand together
_NOT_AXES = ("dtype", "options", "head_dim", "head_dim_v")


@dataclass
class Verdict:
    """What was looked at, the largest error as a fraction of what is allowed, and what was wrong, if anything."""

    operation: str
    name: str
    dtype: str
    cases: int = 0
    margin: float = 0.0
    error: str = ""
    skeleton: Skeleton = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether nothing was wrong."""
        return not self.error


def skeletons(operation: Operation) -> Iterator[tuple[str, Skeleton]]:
    """Yield what kernels are compiled for with no option, with each alone, with all, and with each other value.

    Which options a dtype has is seen from what the fuzzer draws.
    """
    rng = random.Random(0)
    drawn = [operation.skeleton(rng) for _ in range(_SAMPLES)]
    together = {(one["dtype"], name) for one in drawn for name in one["options"]}
    for dtype in _values(drawn, "dtype"):
        own = [one for one in drawn if one["dtype"] == dtype]
        base = {**own[0], "options": []}
        base |= {name: HEAD_DIM for name in ("head_dim", "head_dim_v") if name in base}
        axes = {name: _values(own, name) for name in base if name not in _NOT_AXES}
        base |= {name: _first(values) for name, values in axes.items()}
        options = [name for name in operation.options if (dtype, name) in together]
        yield NOTHING, base
        for name in options:
            yield name, {**base, "options": [name]}
        if len(options) > 1:
            yield EVERYTHING, {**base, "options": options}
        for name, values in axes.items():
            for value in values:
                if value != base[name]:
                    yield f"{name} {value}", {**base, name: value}


def _values(drawn: Sequence[Skeleton], name: str) -> list[Any]:
    """Return the values that occur, in an order that is always the same."""
    return sorted({one[name] for one in drawn}, key=str)


def _first(values: Sequence[Any]) -> Any:
    """Return the plain value of an axis: aligned, no format, the usual feature map and algorithm."""
    return next((value for value in (True, None, "elu1", "online") if value in values), values[0])


def check(operation: Operation, name: str, skeleton: Skeleton, how: How, examples: int = 3) -> Verdict:
    """Make `examples` calls that are the same each time, and say how far from float64 the worst was."""
    verdict = Verdict(operation.name, name, skeleton["dtype"], skeleton=skeleton)

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @hypothesis.given(operation.cases(skeleton))
    def attempt(case: Case) -> None:
        verdict.cases += 1
        try:
            verdict.margin = max(verdict.margin, judge.run(case, how).margin)
        except Exception as error:
            verdict.error = verdict.error or describe(error)

    attempt()
    return verdict
