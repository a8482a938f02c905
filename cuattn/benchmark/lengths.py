"""Attention, a window, a few blocks and linear attention over lengths: which takes least from where on.

All are causal or see as few keys as that; a window of 256 keys, four blocks of 64 keys a row of blocks, and linear
attention with a decay a token do work that grows with N, attention with N².
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from cuattn import host
from cuattn.benchmark import inputs, sparse, verify
from cuattn.benchmark.option_costs import HOST_METHOD
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.sparse import SparseCase
from cuattn.benchmark.suite import Options, Step
from cuattn.runtime.timer import CUDA_METHOD, CudaTimer
from cuattn.testing.cases import AttentionCase
from cuattn.testing.linear_cases import LinearCase

__all__ = ["KINDS", "cases", "length_steps"]

HOST_SEQLENS = (256, 512, 1024, 2048)
CUDA_SEQLENS = (1024, 2048, 4096, 8192, 16384, 32768)
WINDOW, BLOCK, KEPT = 256, 64, 4
KINDS = ("attention", "window", "blocks", "linear")
AnyCase = AttentionCase | SparseCase | LinearCase


def cases(seqlen: int, executor: str, dtype: str | None = None) -> dict[str, AnyCase]:
    """The cases of a length by kind."""
    heads, head_dim, usual = (1, 64, "float16") if executor == "host" else (16, 128, "bfloat16")
    dtype = dtype or usual
    plain = AttentionCase(1, seqlen, heads, head_dim, dtype=dtype, causal=True)
    kept = min(KEPT, -(-seqlen // BLOCK))
    return {
        "attention": plain,
        "window": AttentionCase(1, seqlen, heads, head_dim, dtype=dtype, causal=True, window=(WINDOW - 1, 0)),
        "blocks": SparseCase(seqlen, heads, head_dim, BLOCK, kept, dtype=dtype),
        "linear": LinearCase(1, seqlen, heads, head_dim, dtype=dtype, decay="token"),
    }


def length_steps(options: Options) -> list[Step]:
    """A step for each kind at each length."""
    executor = options.resolved()
    lengths = options.seqlens or (HOST_SEQLENS if executor == "host" else CUDA_SEQLENS)
    return [
        Step("lengths", _name(kind, case), 2.0, partial(records, kind, case, executor, options))
        for dtype in options.dtypes or (None,)
        for seqlen in lengths
        for kind, case in cases(seqlen, executor, dtype).items()
    ]


def _name(kind: str, case: AnyCase) -> str:
    seqlen = case.seqlen_q if isinstance(case, AttentionCase) else case.seqlen
    return f"lengths_{kind}_n{seqlen}_h{case.num_heads}_d{case.head_dim}_{case.dtype}"


def records(kind: str, case: AnyCase, executor: str, options: Options) -> Iterator[Record]:
    """One call, checked: what it executes on the host executor, its time on a GPU."""
    if isinstance(case, SparseCase):
        mask, arrays = case.make_mask(), case.make_arrays(options.seed)
        if executor == "cuda":
            import cupy

            arrays = [cupy.asarray(x) for x in arrays]
        call: Any = partial(case.run, arrays, mask)
        check: Any = partial(sparse.require, case, arrays, mask)
    else:
        given = inputs.make(case, executor, options.seed)
        call = partial(case.run, given)
        check = partial(_check, case, given)
    metrics: dict[str, Value] = {"flops": case.flops, "bytes": case.num_bytes}
    if executor == "host":
        with host.profile() as profile:
            out = call()
        check(out)
        moved = profile.bytes["global"]
        metrics |= {"warp_instructions": profile.warp_instructions, "mma": profile.instructions["mma"]}
        metrics |= {"global_read_bytes": moved["read"], "global_write_bytes": moved["write"]}
        yield Record("lengths", _name(kind, case), metrics, executor="host", method=HOST_METHOD)
        return
    check(call())
    timing = CudaTimer().time(call, budget_s=options.budget_s)
    of_time: dict[str, Any] = {"method": CUDA_METHOD, "samples": timing.samples()}
    yield Record("lengths", _name(kind, case), {**metrics, **timing.metrics()}, executor="cuda", **of_time)


def _check(case: AttentionCase | LinearCase, arrays: dict[str, Any], result: Any) -> None:
    if isinstance(case, LinearCase):
        case.check(arrays, result)
    else:
        verify.require(verify.attention_error(case, arrays, result[0]), case.dtype)
