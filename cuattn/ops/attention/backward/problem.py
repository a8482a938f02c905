"""A call of the backward pass whose arguments have passed every check, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward.config import FlashBwdConfig
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.operand import Operand, deliver, target
from cuattn.runtime.executor import Executor
from cuattn.typing import ArrayT

__all__ = ["AttentionGrads", "BackwardProblem", "ListedGradients"]


class AttentionGrads(NamedTuple, Generic[ArrayT]):
    """Gradients of attention.

    Attributes
    ----------
    dq, dk, dv : array, of the shape and dtype of q, k and v
    dbias : array, of the shape and dtype of the bias, or None where it was not asked for
        Summed over the axes that the bias was broadcast over.
    dsinks : array [heads], float32 (float64 for float64), or None without sinks
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT
    dbias: ArrayT | None = None
    dsinks: ArrayT | None = None


@dataclass(frozen=True, slots=True)
class ListedGradients:
    """The tiles that the kernels visit where a mask of blocks says which: as `ListedTiles`, for either side.

    ``tiles`` has, for each row of ``configs``, the list and the order of the blocks of rows.
    """

    configs: tuple[FlashBwdConfig, ...]
    options: ForwardOptions
    tiles: tuple[tuple[Any, Any], ...]


@dataclass(slots=True)
class BackwardProblem:
    """A call whose arguments have passed every check."""

    forward: Problem  # its out is None
    dout: Any
    out: Any
    lse: Any  # contiguous in the order of Extents.lse_shape, of the accumulator's type
    dlse: Any  # likewise, or None
    dq: Any  # as the caller gave it, or None
    dk: Any
    dv: Any
    return_dbias: bool
    bias_shape: tuple[int, ...] | None  # of the bias as given
    deterministic: bool
    workspace: Any  # as the caller gave it, or None
    packed: PackedSequences | None
    listed: ListedGradients | None = None

    @property
    def kernel_options(self) -> ForwardOptions:
        """The options that the kernels are compiled with."""
        return self.forward.options.kernel_options if self.listed is None else self.listed.options

    @property
    def executor(self) -> Executor:
        return self.forward.executor

    def target(self, name: str) -> Operand:
        """Return what a kernel is to write for "dq", "dk" or "dv": the caller's array where it can, else a new one."""
        like = getattr(self.forward, name[1:])
        given = getattr(self, name)
        dtype = self.forward.dtype if given is None else given.dtype
        return target(self.executor, given, tuple(like.shape), dtype)

    def deliver(self, name: str, written: Operand) -> Any:
        """Return the array for the caller of what `target` returned, once the kernel has been launched."""
        return deliver(self.executor, getattr(self, name), written)
