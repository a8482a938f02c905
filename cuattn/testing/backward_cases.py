"""Problems for the gradients of attention, each built on a problem of the forward.

>>> from cuattn.testing.attention_cases import AttentionCase
>>> case = BackwardCase(AttentionCase(batch=1, seqlen_q=128, num_heads=8, head_dim=64, causal=True))
>>> case.name
'backward_attention_b1_n128_m128_h8_g8_d64_e64_float16_causal'
>>> case.flops == 5 * case.forward.flops // 2
True
>>> sorted(case.make_inputs(seed=0))
['dout', 'k', 'lse', 'out', 'q', 'v']
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cuattn
from cuattn.errors import ArgumentError
from cuattn.testing.attention_cases import AttentionCase, VarlenCase, normal
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.rounding import accumulation_dtype

__all__ = ["BackwardCase", "VarlenBackwardCase"]

SAMPLE = 128  # rows, or keys, of a part that stands for the whole
_SAVED = ("dout", "out", "lse", "dlse")  # inputs of the backward that the forward has not


@dataclass(frozen=True)
class _Gradients(ABC):
    """Fields and figures that both cases share.

    `dlse` adds a gradient of lse; `deterministic` is the argument of the call; `with_forward` runs, and counts, the
    forward as well, whose results then take the place of the saved ones.
    """

    forward: Any
    deterministic: bool = True
    dlse: bool = False
    with_forward: bool = False

    def __post_init__(self) -> None:
        if np.dtype(self.forward.dtype).itemsize == 1:
            raise ArgumentError(f"dtype is {self.forward.dtype!r}; the backward takes no 8-bit floats")

    @property
    def dtype(self) -> str:
        return str(self.forward.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """Return keywords of the backward's reference; those that are arrays are among the inputs."""
        return dict(self.forward.options)

    @property
    def name(self) -> str:
        kind = "forward_backward" if self.with_forward else "backward"
        marks = "_dlse" * self.dlse + self._more_name + "_orderfree" * (not self.deterministic)
        return f"{kind}_{self.forward.name}{marks}"

    @property
    def _more_name(self) -> str:
        return ""

    @property
    def flops(self) -> int:
        """Operations: 2.5 times the forward's, five products where it has two, whatever the kernels compute again."""
        backward = 5 * int(self.forward.flops) // 2
        return backward + int(self.forward.flops) * self.with_forward

    @property
    def num_bytes(self) -> int:
        """Bytes of each input read once, each output written once, by each of the functions that run."""
        forward = int(self.forward.num_bytes)
        itemsize = np.dtype(self.dtype).itemsize
        gradients = sum(int(np.prod(shape)) for shape in self.forward.shapes.values()) * itemsize
        dout = int(np.prod(self._out_shape)) * itemsize
        lse = self._num_rows * accumulation_dtype(self.dtype).itemsize  # once more as dlse
        total = forward + gradients + dout + lse * self.dlse + self._dbias_bytes
        return total + forward * self.with_forward

    @property
    def _out_shape(self) -> tuple[int, ...]:
        return (*self.forward.shapes["q"][:-1], self.forward.shapes["v"][-1])

    @property
    def _num_rows(self) -> int:
        return int(np.prod(self._out_shape[:-1]))

    @property
    def _dbias_bytes(self) -> int:
        return 0

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make inputs of the forward, its results `out` and `lse`, and `dout`, standard normal; `dlse` if wanted."""
        return self.with_results(self.forward.make_inputs(seed, xp), seed, xp)

    def with_results(self, inputs: Mapping[str, Any], seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Add to inputs of the forward what the backward needs beside them."""
        rng = np.random.default_rng((seed, 1))
        out, lse = self.forward.run(inputs)
        arrays: dict[str, Any] = {**inputs, "out": out, "lse": lse}
        arrays["dout"] = xp.asarray(normal(rng, self._out_shape, self.dtype))
        if self.dlse:
            arrays["dlse"] = xp.asarray(rng.standard_normal(lse.shape).astype(accumulation_dtype(self.dtype)))
        return arrays

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Compute the `AttentionGrads` of the inputs."""
        if not self.with_forward:
            return self._backward(inputs)
        out, lse = self.forward.run({name: x for name, x in inputs.items() if name not in _SAVED})
        return self._backward({**inputs, "out": out, "lse": lse})

    @abstractmethod
    def _backward(self, inputs: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class BackwardCase(_Gradients):
    """A call of :func:`cuattn.attention_backward`; with `dbias`, for the gradient of the bias too."""

    forward: AttentionCase
    dbias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dbias and self.forward.bias is None:
            raise ArgumentError("dbias is True; it needs a bias")

    @property
    def _more_name(self) -> str:
        return "_dbias" * self.dbias

    @property
    def _dbias_bytes(self) -> int:
        return self.forward.bias_bytes if self.dbias else 0

    @property
    def logits_bytes(self) -> int:
        """Bytes of one number a pair of query and key, in the precision of the sums."""
        pairs = self.forward.batch * self.forward.num_heads * self.forward.seqlen_q * self.forward.num_keys
        return pairs * accumulation_dtype(self.dtype).itemsize

    def _backward(self, inputs: Mapping[str, Any]) -> Any:
        return cuattn.attention_backward(
            **inputs, **self.options, deterministic=self.deterministic, return_dbias=self.dbias
        )

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right in all its elements."""
        assert_gradients_close(result, **inputs, **self.options)

    def samples(self) -> Iterator[tuple[int, int, slice, slice]]:
        """Batch entry, key head, queries and keys of parts that stand for the whole.

        Each has all queries or all keys: dq needs all keys of its rows, dk and dv all queries of their keys. A dropout
        mask depends on where a part lies, so with dropout it lies at the beginning.
        """
        batch, seqlen_q, _, _ = self.forward.shapes["q"]
        _, seqlen_k, kv_heads, _ = self.forward.shapes["k"]
        places = {(0, 0)} if self.forward.dropout_p else {(0, 0), (batch - 1, kv_heads - 1)}
        for b, kv_head in sorted(places):
            for first in sorted({0} if self.forward.dropout_p else {0, max(0, seqlen_q - SAMPLE)}):
                yield b, kv_head, slice(first, min(first + SAMPLE, seqlen_q)), slice(0, seqlen_k)
            for first in sorted({0} if self.forward.dropout_p else {0, max(0, seqlen_k - SAMPLE)}):
                yield b, kv_head, slice(0, seqlen_q), slice(first, min(first + SAMPLE, seqlen_k))

    def sample(
        self, inputs: Mapping[str, Any], b: int, kv_head: int, queries: slice, keys: slice
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and options of a problem of its own, whose dq is right if it has all keys, dk and dv if all queries:
        the saved lse and out are those of the whole.
        """
        group = inputs["q"].shape[2] // inputs["k"].shape[2]
        batch, kv_heads = slice(b, b + 1), slice(kv_head, kv_head + 1)
        heads = slice(kv_head * group, (kv_head + 1) * group)
        arrays = {name: inputs[name][batch, queries, heads] for name in ("q", "dout", "out")}
        arrays |= {name: inputs[name][batch, keys, kv_heads] for name in ("k", "v")}
        arrays |= {name: inputs[name][batch, heads, queries] for name in ("lse", "dlse") if name in inputs}
        arrays |= {name: inputs[name][heads] for name in ("alibi_slopes", "sinks") if name in inputs}
        for name in ("bias", "mask"):
            if name in inputs:
                axes = zip((batch, heads, queries, keys), inputs[name].shape, strict=True)
                arrays[name] = inputs[name][tuple(slice(None) if extent == 1 else part for part, extent in axes)]
        offset = self.forward.diagonal + queries.start - keys.start
        return arrays, {**self.options, "diagonal_offset": offset}


@dataclass(frozen=True)
class VarlenBackwardCase(_Gradients):
    """A call of :func:`cuattn.attention_varlen_backward`."""

    forward: VarlenCase

    @property
    def logits_bytes(self) -> int:
        """Bytes of one number a pair of query and key of the same sequence."""
        return self.forward.num_pairs * accumulation_dtype(self.dtype).itemsize

    def _backward(self, inputs: Mapping[str, Any]) -> Any:
        return cuattn.attention_varlen_backward(
            **inputs, **self.forward.max_seqlens, **self.options, deterministic=self.deterministic
        )

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right."""
        assert_varlen_gradients_close(result, **inputs, **self.options)


def gradients(result: Any) -> dict[str, NDArray[Any]]:
    """Return the arrays of an `AttentionGrads` by name, without those that were not asked for."""
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    return {name: getattr(result, name) for name in names if getattr(result, name, None) is not None}
