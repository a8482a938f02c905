"""What the gradients of differential attention accept, beside what forward does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.operation import Operation
from cuattn.ops.differential import arguments
from cuattn.ops.differential.arguments import DifferentialProblem
from cuattn.runtime.arrays import contiguous

__all__ = ["BACKWARD_CALL", "Saved", "check"]

BACKWARD_CALL = Operation("differential_attention_backward", "differential")

_NAMES = "lse", "out1", "out2"


class Saved(NamedTuple):
    """The gradient of the result, and what forward kept: lse contiguous, the others as they lie."""

    dout: Any
    lse: Any
    out1: Any
    out2: Any


def check(
    dout: Any, q: Any, k: Any, v: Any, lambda_: Any, state: Any, **options: Any
) -> tuple[DifferentialProblem, Saved]:
    """Make every check of a call. Raises as documented at `cuattn.differential_attention_backward`."""
    if not isinstance(state, tuple | list) or len(state) != len(_NAMES):
        raise ArgumentError(f"state is {shown(state)}; a DifferentialState(lse, out1, out2) is needed")
    given = {"dout": dout, **{f"state.{name}": x for name, x in zip(_NAMES, state, strict=True)}}
    problem = arguments.check(q, k, v, lambda_, operation=BACKWARD_CALL, more=given, **options)
    arrays = {name: problem.executor.asarray(name, x) for name, x in given.items()}
    for name, x in arrays.items():
        of_lse = name == "state.lse"
        shape = problem.extents.lse_shape if of_lse else problem.extents.out_shape
        dtype = np.dtype(problem.accumulator) if of_lse else problem.dtype
        if tuple(x.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; {shape} is needed for these q, k and v")
        if x.dtype != dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} ({x.dtype.str}); {dtype} (native) is needed")
    saved = Saved(*arrays.values())
    return problem, saved._replace(lse=contiguous(problem.executor, saved.lse))
