"""What the fuzzer has to know of an operation, and what a call finds its arguments in."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from cuattn.testing.arrays import Guarded
from cuattn.testing.executors import ExecutorUnderTest
from cuattn.testing.fuzzing.arrays import Array
from cuattn.testing.fuzzing.case import Case
from cuattn.testing.strategies import aligned_layouts, layouts, seqlens, unaligned_layouts

__all__ = ["Drawing", "Operation", "Problem", "Results", "Skeleton"]

#: What decides which kernel is compiled, as plain values: "options" names those that are given.
Skeleton = dict[str, Any]

#: The arrays that a call gave, by name, as NumPy arrays.
Results = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Operation:
    """One or several public functions that are drawn, called and checked together.

    Attributes
    ----------
    name : str
        What ``cuattn-bench fuzz`` calls it.
    functions : tuple of str
        The public names that a call goes through.
    options : tuple of str
        Those that a skeleton may have.
    skeleton : callable
        Draws what is compiled, from a generator of the standard library.
    draw : callable
        Draws the arguments of a call for a skeleton.
    call : callable
        Makes the call.
    check : callable
        Raises if the results are not right.
    """

    name: str
    functions: tuple[str, ...]
    options: tuple[str, ...]
    skeleton: Callable[[random.Random], Skeleton]
    draw: Callable[[st.DrawFn, Skeleton], dict[str, Any]]
    call: Callable[[Problem], Results]
    check: Callable[[Problem, Results], None]

    def cases(self, skeleton: Skeleton) -> st.SearchStrategy[Case]:
        """Draw calls for which the same kernels are compiled."""

        @st.composite
        def drawn(draw: st.DrawFn) -> Case:
            return Case(self.name, self.draw(draw, skeleton))

        return drawn()


@dataclass
class Problem:
    """The arguments of a call: as NumPy arrays by name, and as arrays of the executor.

    >>> problem = Problem({"x": Array((2,), "float32"), "axis": -1}, ExecutorUnderTest("host"))
    >>> problem["x"].shape, problem.there("axis"), sorted(problem.given("x", "y"))
    ((2,), -1, ['x'])
    """

    arguments: Mapping[str, Any]
    executor: ExecutorUnderTest
    guarded: dict[str, Guarded] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)  # what a call hands to its check beside the results

    def __post_init__(self) -> None:
        self.guarded = {name: x.make() for name, x in self.arguments.items() if isinstance(x, Array)}

    def __contains__(self, name: str) -> bool:
        return name in self.arguments

    def __getitem__(self, name: str) -> Any:
        """Return an argument: an array as NumPy has it."""
        return self.guarded[name].array if name in self.guarded else self.arguments[name]

    def there(self, name: str) -> Any:
        """Return an argument: an array as the executor has it, in the layout that was drawn."""
        return self.executor.array(self.guarded[name]) if name in self.guarded else self.arguments[name]

    def get(self, name: str) -> Any:
        """Return an argument as NumPy has it, None if there is none."""
        return self.given(name).get(name)

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of these arguments that there are, as NumPy has them."""
        return {name: self[name] for name in names if name in self}

    def given_there(self, *names: str) -> dict[str, Any]:
        """Return those of these arguments that there are, as the executor has them."""
        return {name: self.there(name) for name in names if name in self}

    def check_inputs(self) -> None:
        """Raise if an input of a host call was written, or what lies around it."""
        for name, spec in self.arguments.items():
            if isinstance(spec, Array):
                self.guarded[name].check()
                expected = spec.make().array
                if np.ascontiguousarray(self[name]).tobytes() != np.ascontiguousarray(expected).tobytes():
                    raise AssertionError(f"the call has changed its input {name}")

    def numpy(self, **results: Any) -> Results:
        """Return results as NumPy arrays, without those that are None."""
        return {name: self.executor.numpy(x) for name, x in results.items() if x is not None}


class Drawing:
    """Draws parts of calls; what is drawn last shrinks first, sizes before values before layouts."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def one(self, *values: Any) -> Any:
        """Draw one of the values; shrinks towards the first."""
        return self.draw(st.sampled_from(values))

    def seed(self) -> int:
        """Draw a seed."""
        return int(self.draw(st.integers(0, 2**16 - 1)))

    def length(self, most: int = 130, *, empty: bool = True) -> int:
        """Draw the length of a sequence, awkward ones first."""
        return int(self.draw(seqlens(most, allow_empty=empty)))

    def array(
        self, shape: tuple[int, ...], dtype: str, *kinds: str, aligned: bool | None = None, lies: bool = True
    ) -> Array:
        """Draw an array of one of the kinds; `aligned`: rows at multiples of 16 bytes, not so, or as it comes."""
        made = Array(shape, dtype, self.one(*kinds), self.seed())
        if not lies:
            return made
        strategy = {None: layouts, True: aligned_layouts, False: unaligned_layouts}[aligned]
        return made.lying(self.draw(strategy(len(shape))))
