"""Problems for the padding functions and for merge_states.

>>> case = PaddingCase(batch=32, seqlen=512, width=768, fill=0.6)
>>> case.name
'remove_padding_b32_n512_w768_fill60_float16'
>>> case.make_inputs()["plan"].num_tokens == case.num_tokens
True
>>> MergeCase(num_parts=2, batch=1, seqlen=128, num_heads=8, head_dim=64).name
'merge_states_s2_b1_n128_h8_e64_float16'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError
from cuattn.testing.attention_cases import normal
from cuattn.testing.merging import assert_merge_close
from cuattn.testing.rounding import accumulation_dtype, to_numpy

__all__ = ["MergeCase", "PaddingCase", "PaddingPlanCase"]

_SLOT_BYTES = 4  # of the number of a slot, and of an entry of cu_seqlens


def _lengths(batch: int, seqlen: int, fill: float) -> NDArray[np.int64]:
    """Spread lengths [batch] evenly, of mean `fill` times `seqlen`; the longest is `seqlen` if it can be."""
    spread = min(fill, 1 - fill) * np.linspace(1, -1, batch) if batch > 1 else np.zeros(batch)
    return np.rint((fill + spread) * seqlen).astype(np.int64)


def _mask(batch: int, seqlen: int, fill: float, seed: int) -> NDArray[np.bool_]:
    """Make a mask of left-aligned sequences in random order, [batch, seqlen]."""
    lengths = np.random.default_rng(seed).permutation(_lengths(batch, seqlen, fill))
    return np.asarray(np.arange(seqlen) < lengths[:, None])


@dataclass(frozen=True)
class PaddingPlanCase:
    """A call of :func:`cuattn.padding_plan`. `known`: the number of tokens is given, so that nothing is waited for."""

    batch: int
    seqlen: int
    fill: float = 0.6
    known: bool = False

    @property
    def num_tokens(self) -> int:
        return int(_lengths(self.batch, self.seqlen, self.fill).sum())

    @property
    def name(self) -> str:
        return f"padding_plan_b{self.batch}_n{self.seqlen}_fill{round(100 * self.fill)}" + "_known" * self.known

    @property
    def flops(self) -> int:
        """Operations: one addition a slot."""
        return self.batch * self.seqlen

    @property
    def num_bytes(self) -> int:
        """Bytes: one of mask a slot; the number of each slot and cu_seqlens."""
        return self.batch * self.seqlen * (1 + _SLOT_BYTES) + (self.batch + 1) * _SLOT_BYTES

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"mask"}: booleans [batch, seqlen], an array of the module `xp` (numpy or cupy)."""
        return {"mask": xp.asarray(_mask(self.batch, self.seqlen, self.fill, seed))}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Make the plan of the mask."""
        return cuattn.padding_plan(inputs["mask"], num_tokens=self.num_tokens if self.known else None)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right."""
        mask = to_numpy(inputs["mask"])
        indices, cu_seqlens, max_seqlen = reference.padding_plan(mask)
        np.testing.assert_array_equal(to_numpy(result.indices), indices)
        np.testing.assert_array_equal(to_numpy(result.padding), np.flatnonzero(~mask))
        np.testing.assert_array_equal(to_numpy(result.cu_seqlens), cu_seqlens)
        assert result.max_seqlen in ((max_seqlen, self.seqlen) if self.known else (max_seqlen,))


@dataclass(frozen=True)
class PaddingCase:
    """A call of :func:`cuattn.remove_padding` or, by `kind`, of :func:`cuattn.restore_padding`; rows of `width`."""

    batch: int
    seqlen: int
    width: int
    fill: float = 0.6
    dtype: str = "float16"
    kind: str = "remove_padding"

    @property
    def num_tokens(self) -> int:
        return int(_lengths(self.batch, self.seqlen, self.fill).sum())

    @property
    def name(self) -> str:
        return f"{self.kind}_b{self.batch}_n{self.seqlen}_w{self.width}_fill{round(100 * self.fill)}_{self.dtype}"

    @property
    def flops(self) -> int:
        """Operations: none, as bytes are moved."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens read, the tokens or all slots written, and the number of each slot that is looked at."""
        slots = self.batch * self.seqlen
        written = slots if self.kind == "restore_padding" else self.num_tokens
        rows = (self.num_tokens + written) * self.width * np.dtype(self.dtype).itemsize
        return rows + written * _SLOT_BYTES

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"x", "plan", "mask"}: standard normal rows, padded or packed, arrays of `xp` (numpy or cupy)."""
        mask = _mask(self.batch, self.seqlen, self.fill, seed)
        shape = (self.num_tokens,) if self.kind == "restore_padding" else mask.shape
        x = normal(np.random.default_rng(seed), (*shape, self.width), self.dtype)
        return {"x": xp.asarray(x), "plan": cuattn.padding_plan(xp.asarray(mask)), "mask": mask}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Compute the operation on the inputs."""
        functions = {"remove_padding": cuattn.remove_padding, "restore_padding": cuattn.restore_padding}
        if self.kind not in functions:
            raise ArgumentError(f"kind is {self.kind!r}; allowed are {', '.join(map(repr, functions))}")
        return functions[self.kind](inputs["x"], inputs["plan"])

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right, to the bit."""
        expected = getattr(reference, self.kind)(to_numpy(inputs["x"]), inputs["mask"])
        np.testing.assert_array_equal(to_numpy(result).view(np.uint8), expected.view(np.uint8))


@dataclass(frozen=True)
class MergeCase:
    """A call of :func:`cuattn.merge_states` on parts along a leading axis."""

    num_parts: int
    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    dtype: str = "float16"
    sinks: bool = False

    @property
    def name(self) -> str:
        return (
            f"merge_states_s{self.num_parts}_b{self.batch}_n{self.seqlen}_h{self.num_heads}_e{self.head_dim}"
            f"_{self.dtype}" + "_sinks" * self.sinks
        )

    @property
    def num_rows(self) -> int:
        return self.batch * self.seqlen * self.num_heads

    @property
    def flops(self) -> int:
        """Operations: a product and a sum an element of each part, and a division an element of the result."""
        return self.num_rows * self.head_dim * (2 * self.num_parts + 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of every part read once, the result written once: an out row and an lse each."""
        row = self.head_dim * np.dtype(self.dtype).itemsize + accumulation_dtype(self.dtype).itemsize
        return self.num_rows * row * (self.num_parts + 1)

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"outs", "lses"} and, with `sinks`, {"sinks"}: standard normal arrays of `xp` (numpy or cupy)."""
        rng = np.random.default_rng(seed)
        outs = normal(rng, (self.num_parts, self.batch, self.seqlen, self.num_heads, self.head_dim), self.dtype)
        lse_dtype = accumulation_dtype(self.dtype).name
        lses = normal(rng, (self.num_parts, self.batch, self.num_heads, self.seqlen), lse_dtype)
        inputs = {"outs": xp.asarray(outs), "lses": xp.asarray(lses)}
        if self.sinks:
            inputs["sinks"] = xp.asarray(normal(rng, (self.num_heads,), lse_dtype))
        return inputs

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Merge the parts; returns (out, lse)."""
        return cuattn.merge_states(inputs["outs"], inputs["lses"], sinks=inputs.get("sinks"))

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right."""
        assert_merge_close(result, inputs["outs"], inputs["lses"], sinks=inputs.get("sinks"))
