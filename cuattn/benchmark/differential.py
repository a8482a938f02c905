"""Differential attention beside two calls of attention: bytes and instructions on the host executor, time on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import cuattn
from cuattn import host, reference
from cuattn.benchmark.option_costs import HOST_METHOD
from cuattn.benchmark.results import Record, Value, spelt
from cuattn.benchmark.suite import Options, Step
from cuattn.benchmark.verify import WrongResultError
from cuattn.runtime.timer import CUDA_METHOD, CudaTimer, significant
from cuattn.testing.attention_cases import normal
from cuattn.testing.rounding import to_numpy

__all__ = ["DifferentialCase", "cases", "differential_steps"]

_LAMBDA = 0.5
_CHECKED_ROWS = 128
_MOST = 2.0**-5  # of the largest number, that a result may be wrong: several times what 16 bits lose


@dataclass(frozen=True, slots=True)
class DifferentialCase:
    """A causal call with N = M and E = 2D.

    ``kind``: "two calls" of attention, "v1", "v2" (shared keys), or "gradients of v1" and "gradients of v2".
    """

    kind: str
    seqlen: int
    num_heads: int
    head_dim: int
    dtype: str = "float16"

    @property
    def name(self) -> str:
        return f"differential_{spelt(self.kind)}_n{self.seqlen}_h{self.num_heads}_d{self.head_dim}"

    @property
    def key_heads(self) -> int:
        return self.num_heads if "v2" in self.kind else 2 * self.num_heads

    @property
    def flops(self) -> int:
        """Count the products of both streams, half of them under the causal mask; of gradients 2.5 times as many."""
        forward = 2 * self.num_heads * self.seqlen**2 * 3 * self.head_dim
        return forward * 5 // 2 if self.kind.startswith("gradients") else forward

    @property
    def num_bytes(self) -> int:
        """Each input and the output once; of gradients also what forward kept, and the gradients."""
        columns = 2 * self.num_heads + self.key_heads + 2 * self.num_heads, 2 * self.num_heads
        inputs, out = (x * self.seqlen * self.head_dim * np.dtype(self.dtype).itemsize for x in columns)
        return 2 * inputs + 3 * out if self.kind.startswith("gradients") else inputs + out

    def make(self, seed: int) -> list[Any]:
        """Draw q, k and v as NumPy arrays."""
        rng, heads = np.random.default_rng(seed), self.num_heads
        shapes = (2 * heads, self.head_dim), (self.key_heads, self.head_dim), (heads, 2 * self.head_dim)
        return [normal(rng, (1, self.seqlen, *shape), self.dtype) for shape in shapes]

    def prepared(self, arrays: list[Any]) -> tuple[Callable[[], Any], Any]:
        """Return the call, whose result is that of differential attention or gradients, and the state for these."""
        q, k, v = arrays
        if self.kind == "two calls":
            streams = [(q[:, :, s::2], k[:, :, s::2]) for s in range(2)]
            return lambda: [cuattn.attention(*stream, v, causal=True) for stream in streams], None
        if not self.kind.startswith("gradients"):
            return lambda: cuattn.differential_attention(q, k, v, _LAMBDA, causal=True), None
        out, state = cuattn.differential_attention(q, k, v, _LAMBDA, causal=True, return_state=True)
        call = partial(cuattn.differential_attention_backward, out, q, k, v, _LAMBDA, state, causal=True)
        return call, (out, state)

    def require(self, arrays: list[Any], result: Any, saved: Any) -> None:
        """Raise `WrongResultError` unless the first rows of the result are right: they see the first keys alone."""
        rows = slice(0, _CHECKED_ROWS)
        q, k, v = (to_numpy(x[:, rows]) for x in arrays)
        if self.kind == "two calls":
            outs = [to_numpy(x[:, rows]) for x in result]
            streams = reference.differential_streams(q, k, v)
            wanted = [reference.attention(x.q, x.k, x.v, causal=True)[0] for x in streams]
        elif saved is None:
            outs = [to_numpy(result[:, rows])]
            wanted = [reference.differential_attention(q, k, v, _LAMBDA, causal=True).out]
        else:
            out, (lse, out1, out2) = saved
            state = (to_numpy(lse[..., rows]), to_numpy(out1[:, rows]), to_numpy(out2[:, rows]))
            given = to_numpy(out[:, rows]), q, k, v
            outs = [to_numpy(result.dq[:, rows])]
            wanted = [reference.differential_attention_backward(*given, _LAMBDA, state, causal=True).dq]
        for got, want in zip(outs, wanted, strict=True):
            error = float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
            if not error <= _MOST:
                raise WrongResultError(f"{self.name}: wrong by {error:.2g} of the largest number")


def cases(executor: str) -> list[DifferentialCase]:
    """The cases; the first is what the others are compared with."""
    shape, dtype = ((1024, 1, 64), "float16") if executor == "host" else ((8192, 16, 64), "bfloat16")
    kinds = "two calls", "v1", "v2", "gradients of v1", "gradients of v2"
    return [DifferentialCase(kind, *shape, dtype) for kind in kinds]


def differential_steps(options: Options) -> list[Step]:
    """One step for each case."""
    executor = options.resolved()
    first: dict[str, float] = {}
    run = partial(host_records if executor == "host" else cuda_records, first, options)
    return [Step("differential", case.name, 5.0, partial(run, case)) for case in cases(executor)]


def host_records(first: dict[str, float], options: Options, case: DifferentialCase) -> Iterator[Record]:
    """Count the instructions and bytes of one call, after a check of its result."""
    arrays = case.make(options.seed)
    call, saved = case.prepared(arrays)
    with host.profile() as profile:
        result = call()
    case.require(arrays, result, saved)
    moved, count = profile.bytes["global"], profile.warp_instructions
    metrics: dict[str, Value] = {"flops": case.flops, "bytes": case.num_bytes, "warp_instructions": count}
    metrics |= {"mma": profile.instructions["mma"]}
    metrics |= {"global_read_bytes": moved["read"], "global_write_bytes": moved["write"]}
    metrics["ratio"] = significant(count / first.setdefault("count", count), 4)
    metrics["read_ratio"] = significant(moved["read"] / first.setdefault("read", moved["read"]), 4)
    yield Record("differential", case.name, metrics, executor="host", method=HOST_METHOD)


def cuda_records(first: dict[str, float], options: Options, case: DifferentialCase) -> Iterator[Record]:
    """Measure the time of one call, after a check of its result."""
    import cupy

    arrays = [cupy.asarray(x) for x in case.make(options.seed)]
    call, saved = case.prepared(arrays)
    case.require(arrays, call(), saved)
    timing = CudaTimer().time(call, budget_s=options.budget_s)
    seconds = timing.median_us * 1e-6
    metrics: dict[str, Value] = {"flops": case.flops, "bytes": case.num_bytes, **timing.metrics()}
    metrics |= {"tflops": significant(case.flops / seconds * 1e-12, 4)}
    metrics |= {"gb_per_s": significant(case.num_bytes / seconds * 1e-9, 4)}
    metrics["ratio"] = significant(timing.median_us / first.setdefault("us", timing.median_us), 4)
    of_time: dict[str, Any] = {"method": CUDA_METHOD, "samples": timing.samples()}
    yield Record("differential", case.name, metrics, executor="cuda", **of_time)
