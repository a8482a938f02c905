"""What `rope` accepts: every check that is made before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuattn.errors import ShapeError
from cuattn.ops.rotary import arguments
from cuattn.ops.rotary.arguments import Angles, Positions, Rotary
from cuattn.runtime.executor import Executor, executor_for
from cuattn.scalars import check_flag

__all__ = ["RopeProblem", "check"]


@dataclass(frozen=True, slots=True, eq=False)
class RopeProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    x: Any  # [batch, seqlen, heads, head_dim] or [tokens, heads, head_dim]
    positions: Positions
    angles: Angles
    inverse: bool
    out: Any  # None where it is to be allocated


def check(
    x: Any, positions: Any, rotary: Rotary, *, inverse: Any = False, out: Any = None, look: bool = True
) -> RopeProblem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.rope`.

    Without ``look``, positions that the host sees go unchecked, as a device's do.
    """
    inverse = check_flag("inverse", inverse)
    executor = executor_for(
        x=x,
        **rotary.arrays,
        **({} if out is None else {"out": out}),
        **({"positions": positions} if arguments.on_device("positions", positions) else {}),
    )
    x = executor.asarray("x", x)
    if x.ndim not in (3, 4):
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, rank {x.ndim}; [batch, seqlen, heads, head_dim] or [tokens, heads, "
            "head_dim] is needed"
        )
    arguments.check_heads("x", x, x.shape[-1])
    angles = arguments.resolve(executor, rotary, x.shape[-1], x.dtype)
    places = arguments.check_positions(executor, positions, tuple(x.shape[:-2]), angles, look=look)
    if out is not None:
        out = executor.asarray("out", out)
        inputs = {"positions": places.array, "cos": angles.cos, "sin": angles.sin}
        if x.shape != out.shape or not arguments.same_memory(x, out):
            inputs["x"] = x
        arguments.check_output("out", out, tuple(x.shape), x.dtype, **inputs)
    return RopeProblem(executor, x, places, angles, bool(inverse), out)
