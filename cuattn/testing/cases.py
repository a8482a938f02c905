"""One object per problem: its shapes, its inputs, its work in FLOPs and bytes, how to run it and when it is right.

Tests, benchmarks and the command line all take these, so that whatever is timed has been checked.

>>> SoftmaxCase(rows=64, columns=1024).name
'softmax_64x1024_float32_online'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import cuattn
from cuattn.errors import ArgumentError
from cuattn.testing.attention_cases import AttentionCase, VarlenCase, normal
from cuattn.testing.backward_cases import BackwardCase, VarlenBackwardCase
from cuattn.testing.tolerance import assert_softmax_close
from cuattn.typing import Algorithm

__all__ = ["AttentionCase", "BackwardCase", "Case", "SoftmaxCase", "VarlenBackwardCase", "VarlenCase"]


class Case(Protocol):
    """What a benchmark needs to know of a problem."""

    @property
    def name(self) -> str: ...  # unique among cases; letters, digits and underscores

    @property
    def flops(self) -> int: ...  # floating-point operations of the formula, whatever the kernel executes

    @property
    def num_bytes(self) -> int: ...  # each input read once, each output written once

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]: ...

    def run(self, inputs: Mapping[str, Any]) -> Any: ...

    def check(self, inputs: Mapping[str, Any], result: Any) -> None: ...


@dataclass(frozen=True)
class SoftmaxCase:
    """A call of :func:`cuattn.softmax`, :func:`cuattn.log_softmax` or :func:`cuattn.logsumexp` along the last axis."""

    rows: int
    columns: int
    dtype: str = "float32"
    kind: str = "softmax"
    algorithm: Algorithm = "online"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.rows}x{self.columns}_{self.dtype}_{self.algorithm}"

    @property
    def flops(self) -> int:
        """Operations, five an element: maximum, subtraction, exponential, sum, and division."""
        return 5 * self.rows * self.columns

    @property
    def num_bytes(self) -> int:
        outputs = self.rows if self.kind == "logsumexp" else self.rows * self.columns
        return (self.rows * self.columns + outputs) * np.dtype(self.dtype).itemsize

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"x"}: standard normal [rows, columns], an array of the module `xp` (numpy or cupy)."""
        return {"x": xp.asarray(normal(np.random.default_rng(seed), (self.rows, self.columns), self.dtype))}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Compute the operation on the inputs."""
        functions = {"softmax": cuattn.softmax, "log_softmax": cuattn.log_softmax, "logsumexp": cuattn.logsumexp}
        if self.kind not in functions:
            raise ArgumentError(f"kind is {self.kind!r}; allowed are {', '.join(map(repr, functions))}")
        return functions[self.kind](inputs["x"], algorithm=self.algorithm)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right."""
        assert_softmax_close(result, inputs["x"], -1, self.kind)
