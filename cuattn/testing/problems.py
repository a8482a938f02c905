"""Whole inputs of attention calls: what the strategies draw and the tests pass on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.testing.arrays import Guarded

__all__ = ["AttentionProblem", "VarlenProblem"]


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of an attention call: q [B, N, H, D], k [B, M, G, D], v [B, M, G, E], each in a layout of its own."""

    q: Guarded
    k: Guarded
    v: Guarded
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "normal"

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The arrays (q, k, v) as NumPy views."""
        return self.q.array, self.k.array, self.v.array

    def __repr__(self) -> str:
        q, k, v = self.arrays
        layouts_told = ", ".join(f"{name} strides {x.strides}" for name, x in zip("qkv", self.arrays, strict=True))
        return (
            f"AttentionProblem({q.dtype} q {q.shape}, k {k.shape}, v {v.shape}, {self.kind} values, {layouts_told}, "
            f"{self.options})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every element of a dataclass of arrays."""
        printer.text(repr(self))


@dataclass(frozen=True)
class VarlenProblem:
    """Inputs of a packed call: q [T, H, D], k [Tk, G, D], v [Tk, G, E], and where sequences start, int32 [B + 1]."""

    q: Guarded
    k: Guarded
    v: Guarded
    cu_seqlens_q: NDArray[np.int32]
    cu_seqlens_k: NDArray[np.int32]
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "normal"

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The arrays (q, k, v, cu_seqlens_q, cu_seqlens_k) as NumPy views."""
        return self.q.array, self.k.array, self.v.array, self.cu_seqlens_q, self.cu_seqlens_k

    def __repr__(self) -> str:
        q, k, v, starts_q, starts_k = self.arrays
        lengths = list(zip(np.diff(starts_q).tolist(), np.diff(starts_k).tolist(), strict=True))
        return (
            f"VarlenProblem({q.dtype} q {q.shape}, k {k.shape}, v {v.shape}, lengths {lengths}, {self.kind} values, "
            f"{self.options})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every element of a dataclass of arrays."""
        printer.text(repr(self))
