"""One object per problem: its shapes, its inputs, its work in FLOPs and bytes, how to run it and when it is right.

Tests, benchmarks and the command line all take these, so that whatever is timed has been checked.

>>> case = AttentionCase(batch=1, seqlen_q=128, num_heads=8, head_dim=64, causal=True)
>>> case.name
'attention_b1_n128_m128_h8_g8_d64_e64_float16_causal'
>>> case.flops
16777216
>>> {name: x.shape for name, x in case.make_inputs(seed=0).items()}["q"]
(1, 128, 8, 64)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - gives NumPy the name "bfloat16"
import numpy as np
from numpy.typing import NDArray

import cuattn
from cuattn.errors import ArgumentError
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.tolerance import assert_attention_close, assert_softmax_close

__all__ = ["AttentionCase", "Case", "SoftmaxCase"]

#: Beyond this many logits, check() takes samples: the float64 reference would take longer than the kernel's user has.
_MAX_LOGITS = 1 << 22


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


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    real = np.dtype(dtype)
    return rng.standard_normal(shape, np.float64 if real == np.float64 else np.float32).astype(real)


@dataclass(frozen=True)
class AttentionCase:
    """A call of :func:`cuattn.attention`; `seqlen_k`, `num_kv_heads` and `head_dim_v` are as those of q when None."""

    batch: int
    seqlen_q: int
    num_heads: int
    head_dim: int
    seqlen_k: int | None = None
    num_kv_heads: int | None = None
    head_dim_v: int | None = None
    dtype: str = "float16"
    causal: bool | str = False
    scale: float | None = None

    @property
    def num_keys(self) -> int:
        return self.seqlen_q if self.seqlen_k is None else self.seqlen_k

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Of q [B, N, H, D], k [B, M, G, D] and v [B, M, G, E]."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        return {
            "q": (self.batch, self.seqlen_q, self.num_heads, self.head_dim),
            "k": (self.batch, self.num_keys, kv_heads, self.head_dim),
            "v": (self.batch, self.num_keys, kv_heads, head_dim_v),
        }

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the call and of its reference."""
        return {"causal": self.causal, "scale": self.scale}

    @property
    def name(self) -> str:
        kv_heads, head_dim_v = self.shapes["v"][2:]
        causal = "_causal" * bool(self.causal) + (f"_{self.causal}" if isinstance(self.causal, str) else "")
        scale = "" if self.scale is None else f"_scale_{self.scale:g}".replace(".", "p").replace("-", "m")
        return (
            f"attention_b{self.batch}_n{self.seqlen_q}_m{self.num_keys}_h{self.num_heads}_g{kv_heads}"
            f"_d{self.head_dim}_e{head_dim_v}_{self.dtype}{causal}{scale}"
        )

    @property
    def flops(self) -> int:
        """Two matmuls, ``2 B H N M (D + E)``; half of that when causal, by convention and whatever N and M are."""
        total = 2 * self.batch * self.num_heads * self.seqlen_q * self.num_keys
        total *= self.head_dim + self.shapes["v"][3]
        return total // 2 if self.causal else total

    @property
    def num_bytes(self) -> int:
        out = self.batch * self.seqlen_q * self.num_heads * self.shapes["v"][3]
        elements = out + sum(int(np.prod(shape)) for shape in self.shapes.values())
        lse = self.batch * self.num_heads * self.seqlen_q * accumulation_dtype(self.dtype).itemsize
        return elements * np.dtype(self.dtype).itemsize + lse

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """{"q", "k", "v"}: standard normal, arrays of the module `xp` (numpy or cupy)."""
        rng = np.random.default_rng(seed)
        return {name: xp.asarray(_normal(rng, shape, self.dtype)) for name, shape in self.shapes.items()}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """(out, lse) of :func:`cuattn.attention` on the inputs."""
        return cuattn.attention(inputs["q"], inputs["k"], inputs["v"], return_lse=True, **self.options)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result`, an (out, lse) pair, is right; of a big one, the first, middle and last rows."""
        (out, lse), (q, k, v) = result, (inputs[name] for name in "qkv")
        if self.batch * self.num_heads * self.seqlen_q * self.num_keys <= _MAX_LOGITS:
            assert_attention_close(out, q, k, v, lse=lse, **self.options)
            return
        offset = 0 if self.causal == "top_left" else self.num_keys - self.seqlen_q
        group = self.num_heads // k.shape[2]
        for b, h, rows in self._samples():
            heads, kv_heads = slice(h, h + 1), slice(h // group, h // group + 1)
            assert_attention_close(
                out[b : b + 1, rows, heads],
                q[b : b + 1, rows, heads],
                k[b : b + 1, :, kv_heads],
                v[b : b + 1, :, kv_heads],
                lse=lse[b : b + 1, heads, rows],
                diagonal_offset=offset + rows.start,
                **self.options,
            )

    def _samples(self) -> Iterator[tuple[int, int, slice]]:
        size = max(1, min(self.seqlen_q, 64, _MAX_LOGITS // self.num_keys))
        starts = {0, (self.seqlen_q - size) // 2, self.seqlen_q - size}
        for b in sorted({0, self.batch - 1}):
            for h in sorted({0, self.num_heads - 1}):
                for start in sorted(starts):
                    yield b, h, slice(start, start + size)


@dataclass(frozen=True)
class SoftmaxCase:
    """A call of :func:`cuattn.softmax`, :func:`cuattn.log_softmax` or :func:`cuattn.logsumexp` along the last axis."""

    rows: int
    columns: int
    dtype: str = "float32"
    kind: str = "softmax"
    algorithm: str = "online"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.rows}x{self.columns}_{self.dtype}_{self.algorithm}"

    @property
    def flops(self) -> int:
        """Five an element: maximum, subtraction, exponential, sum, and division."""
        return 5 * self.rows * self.columns

    @property
    def num_bytes(self) -> int:
        outputs = self.rows if self.kind == "logsumexp" else self.rows * self.columns
        return (self.rows * self.columns + outputs) * np.dtype(self.dtype).itemsize

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """{"x"}: standard normal [rows, columns], an array of the module `xp` (numpy or cupy)."""
        return {"x": xp.asarray(_normal(np.random.default_rng(seed), (self.rows, self.columns), self.dtype))}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The operation on the inputs."""
        functions = {"softmax": cuattn.softmax, "log_softmax": cuattn.log_softmax, "logsumexp": cuattn.logsumexp}
        if self.kind not in functions:
            raise ArgumentError(f"kind is {self.kind!r}; allowed are {', '.join(map(repr, functions))}")
        return functions[self.kind](inputs["x"], algorithm=self.algorithm)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right."""
        assert_softmax_close(result, inputs["x"], -1, self.kind)
