"""Whole inputs of a backward call, beside what the forward call has yet to give: gradients of out and of lse.

Needs Hypothesis, as :mod:`cuattn.testing.strategies`, from which the forward problems come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.problems import AttentionProblem, VarlenProblem
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.strategies import attention_problems, fill, layouts, value_kinds, varlen_problems

__all__ = ["GradientProblem", "fill_dout", "gradient_problems", "varlen_gradient_problems"]

#: Of dout beside inputs that are far from normal: float16 gradients are then still below its largest number.
_SMALL = 2.0**-6


@dataclass(frozen=True)
class GradientProblem:
    """A forward problem, the gradient of its out, and perhaps that of its lse ([B, H, N], packed [H, T])."""

    forward: AttentionProblem | VarlenProblem
    dout: Guarded
    dlse: Guarded | None

    def __repr__(self) -> str:
        dlse = None if self.dlse is None else f"strides {self.dlse.array.strides}"
        return f"GradientProblem({self.forward}, dout strides {self.dout.array.strides}, dlse {dlse})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every element of a dataclass of arrays."""
        printer.text(repr(self))


def fill_dout(
    shape: tuple[int, ...], dtype: DTypeLike, kind: str, rng: np.random.Generator, *, of: str = "normal"
) -> NDArray[Any]:
    """Draw a gradient as :func:`~cuattn.testing.strategies.fill` makes it, for inputs of the kind `of`."""
    values = fill(shape, np.float64, kind, rng)
    return (values if of in ("normal", "denormal") else values * _SMALL).astype(dtype)


def _of(
    draw: st.DrawFn, problem: AttentionProblem | VarlenProblem, layout: st.SearchStrategy[Layout] | None
) -> GradientProblem:
    """Add to `problem` gradients of what it gives."""
    q, _, v = problem.arrays[:3]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (*q.shape[:-1], v.shape[-1])
    values = fill_dout(shape, q.dtype, draw(value_kinds()), rng, of=problem.kind)
    dout = place(values, draw(layouts(q.ndim) if layout is None else layout))
    if not draw(st.booleans()):
        return GradientProblem(problem, dout, None)
    lse_shape = shape[:-1][::-1] if q.ndim == 3 else (shape[0], shape[2], shape[1])
    dlse = fill(lse_shape, accumulation_dtype(q.dtype), "normal", rng)
    return GradientProblem(problem, dout, place(dlse, draw(layouts(q.ndim - 1))))


@st.composite
def gradient_problems(
    draw: st.DrawFn, *, layout: st.SearchStrategy[Layout] | None = None, **of_forward: Any
) -> GradientProblem:
    """Draw what :func:`~cuattn.testing.strategies.attention_problems` draws, with gradients; `of_forward` goes there.

    `layout` is that of q, k, v and dout; dlse is there half of the time.
    """
    return _of(draw, draw(attention_problems(layout=layout, **of_forward)), layout)


@st.composite
def varlen_gradient_problems(
    draw: st.DrawFn, *, layout: st.SearchStrategy[Layout] | None = None, **of_forward: Any
) -> GradientProblem:
    """Draw what :func:`~cuattn.testing.strategies.varlen_problems` draws, with gradients, likewise."""
    return _of(draw, draw(varlen_problems(layout=layout, **of_forward)), layout)
