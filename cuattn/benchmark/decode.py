"""Decoding: one call over cached keys, and whole generations with a contiguous and with a paged cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import cuattn
from cuattn import host
from cuattn.benchmark import models
from cuattn.benchmark.operations import CudaBench, model_steps
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step
from cuattn.runtime.timer import CUDA_METHOD, HOST_METHOD, significant, time_host
from cuattn.testing.attention_cases import normal
from cuattn.testing.decode_cases import DecodeCase

CUDA_CONTEXTS = (1024, 8192, 65536)
HOST_CONTEXT = 512
GENERATION_METHOD = (
    "wall clock of all steps, each an append and an attend of one layer for every sequence; a cached token is counted "
    "once; the host executor interprets the kernels: not a GPU time"
)


def decode_cases(executor: str, options: Options) -> list[DecodeCase]:
    """Cases of batch, context, group, page size and format, those that say most first; or the problem asked for."""
    if options.problem.given:
        batch, heads, kv_heads, head_dim = (16, 32, 8, 128) if executor == "cuda" else (2, 8, 2, 64)
        usual = (CUDA_CONTEXTS[1],) if executor == "cuda" else (HOST_CONTEXT,)
        return options.problem.decode(
            DecodeCase(batch, context, heads, kv_heads, size, dtype)
            for dtype in options.dtypes or ("bfloat16" if executor == "cuda" else "float16",)
            for size in options.head_dims or (head_dim,)
            for context in options.seqlens or usual
        )
    if executor == "cuda":
        dtypes = options.dtypes or ("bfloat16",)
        cases = [
            DecodeCase(batch, context, 32, kv_heads, head_dim, dtype, page_size=page_size)
            for dtype in dtypes
            for head_dim in options.head_dims or (128,)
            for context in options.seqlens or CUDA_CONTEXTS
            for batch in (1, 16, 64)
            for kv_heads in (8, 32)
            for page_size in (16, 1, 0)
            if batch * context * kv_heads <= 2**24
        ]
        cases += [
            DecodeCase(16, 8192, 32, 8, 128, dtype, kv_format=name)
            for dtype in dtypes
            for name in ("e4m3fn", "int8", "nvfp4", "mxfp4")
            if dtype != "float64"  # whose queries no narrow format serves
        ]
        return [*cases, *(DecodeCase(16, 8192, 8, 1, 512, dtype) for dtype in dtypes)]
    shapes = [(context, size) for context in options.seqlens or (HOST_CONTEXT,) for size in options.head_dims or (64,)]
    cases = [
        case for dtype in options.dtypes or ("float16",) for shape in shapes for case in _host_cases(dtype, *shape)
    ]
    exact = [] if options.dtypes else [DecodeCase(2, context, 8, 2, size, "float32") for context, size in shapes]
    return list(dict.fromkeys([*cases, *exact]))


def _host_cases(dtype: str, context: int, head_dim: int) -> list[DecodeCase]:
    formats = ("e4m3fn", "int8", "nvfp4") if dtype != "float64" else ()
    return [
        *(DecodeCase(2, context, 8, g, head_dim, dtype, page_size=s) for g in (8, 2, 1) for s in (16, 1, 0)),
        DecodeCase(1, 4 * context, 8, 1, head_dim, dtype, num_splits=4),
        DecodeCase(2, context, 8, 2, head_dim, dtype, seqlen_q=4),
        *(DecodeCase(2, context, 8, 2, head_dim, dtype, kv_format=name) for name in formats),
        DecodeCase(2, context, 8, 1, 512, dtype),
    ]


def decode_steps(options: Options) -> list[Step]:
    """Steps that measure calls, plans and generations."""
    executor = options.resolved()
    if options.models:
        on_host = partial(call_records, options=options)
        return model_steps("decode", "decode", options, partial(_of_model, options), on_host)
    cases = decode_cases(executor, options)
    steps: list[Step] = []
    if executor == "cuda":
        bench = CudaBench("decode", options)
        steps.append(Step("ceilings", "copy and matrix product", 4.0, bench.ceilings))
        steps += [Step("decode", case.name, 4.0, partial(bench.records, case)) for case in cases]
    else:
        steps += [Step("decode", case.name, 2.0, partial(call_records, case, options)) for case in cases]
    if options.problem.given:
        return steps + [
            Step("decode", f"plan_{case.name}", 0.5, partial(plan_records, case, options)) for case in cases
        ]
    steps += [Step("decode", f"plan_{case.name}", 0.5, partial(plan_records, case, options)) for case in cases[:3]]
    return steps + generation_steps(options)


def _of_model(options: Options, model: models.Model, context: int, dtype: str | None) -> list[DecodeCase]:
    """The calls of a model that write a token with the problem put on them."""
    return options.problem.decode(models.decode(model, 1, context, dtype))


def call_records(case: DecodeCase, options: Options) -> Iterator[Record]:
    """One call on the host executor: its time, and the bytes and instructions that it takes, counted."""
    arrays = case.make_inputs(options.seed)
    with host.profile() as profile:
        result = case.run(arrays)
    case.check(arrays, result)
    timing = time_host(lambda: case.run(arrays), budget_s=options.budget_s)
    moved = profile.bytes["global"]
    metrics: dict[str, Value] = {
        **timing.metrics(),
        "least_bytes": case.num_bytes,
        "global_read_bytes": moved["read"],
        "global_write_bytes": moved["write"],
        "bytes_over_least": significant((moved["read"] + moved["write"]) / case.num_bytes),
        "warp_instructions": profile.warp_instructions,
        "instructions_per_key": significant(
            profile.warp_instructions / (case.batch * case.context * case.num_kv_heads), 3
        ),
        "launches": profile.launches,
    }
    yield Record("decode", case.name, metrics, executor="host", method=HOST_METHOD, samples=timing.samples())


def plan_records(case: DecodeCase, options: Options) -> Iterator[Record]:
    """The time of a plan: host work that no call repeats."""
    plan = case.plan()
    timing = time_host(case.plan, budget_s=options.budget_s)
    metrics: dict[str, Value] = {
        **timing.metrics(),
        "num_ctas": plan.num_ctas,
        "workspace_bytes": plan.workspace_size(),
        "predicted_efficiency": significant(plan.estimate.efficiency, 3),
    }
    of_time: dict[str, Any] = {"method": HOST_METHOD, "samples": timing.samples()}
    yield Record("decode", f"plan_{case.name}", metrics, executor="host", **of_time)


# --- generations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """A generation: `batch` sequences of up to `context` tokens that grow by `steps`, in one layer, heads ungrouped."""

    batch: int
    context: int
    num_heads: int
    head_dim: int
    page_size: int
    steps: int
    dtype: str = "float16"

    @property
    def name(self) -> str:
        return (
            f"generate_b{self.batch}_m{self.context}_h{self.num_heads}_d{self.head_dim}_{self.dtype}"
            f"_page{self.page_size}_steps{self.steps}"
        )

    def lengths(self, seed: int = 0) -> list[int]:
        """Prompt lengths from an eighth of the context up to all of it; one has all of it."""
        rng = np.random.default_rng(seed)
        return [self.context, *(int(n) for n in rng.integers(self.context // 8, self.context + 1, self.batch - 1))]


#: Configurations with published figures for other libraries.
GENERATIONS = (Generation(32, 512, 16, 64, 32, 64), Generation(16, 1024, 12, 64, 16, 64))


def generation_steps(options: Options, generations: Sequence[Generation] = GENERATIONS) -> list[Step]:
    """Steps of each configuration with a contiguous cache, and with a paged one."""
    if options.seqlens:
        length = options.seqlens[0]
        generations = [Generation(2, length, 2, (options.head_dims or (64,))[0], 16, 2)]
    return [Step("decode", g.name, 20.0, partial(generation_records, g, options)) for g in generations]


def generation_records(generation: Generation, options: Options) -> Iterator[Record]:
    """Tokens a second and bytes of cache of both; their results must be the same numbers within rounding."""
    executor = options.resolved()
    xp: Any = np if executor == "host" else __import__("cupy")
    results = {}
    for kind in ("contiguous", "paged"):
        cache, seqs, capacity = _filled(generation, kind, xp, options.seed)
        began = time.perf_counter()
        out: Any = None
        for step_idx in range(generation.steps):
            out = _step(cache, seqs, generation, xp, (options.seed, step_idx))
        if executor == "cuda":
            xp.cuda.Device().synchronize()
        seconds = time.perf_counter() - began
        results[kind] = np.asarray(out if executor == "host" else out.get(), np.float64)
        metrics: dict[str, Value] = {
            "tokens_per_s": significant(generation.batch * generation.steps / seconds),
            "cache_bytes": cache.nbytes,
            "slots": capacity,
            "used_tokens": sum(seq.length for seq in seqs),
            "steps": generation.steps,
        }
        method = GENERATION_METHOD if executor == "host" else CUDA_METHOD
        yield Record("decode", f"{generation.name}_{kind}", metrics, executor=executor, method=method)
    np.testing.assert_allclose(results["paged"], results["contiguous"], rtol=0, atol=4e-3)


def _filled(generation: Generation, kind: str, xp: Any, seed: int) -> tuple[Any, list[Any], int]:
    """A cache with the prompts in it, its sequences, and how many tokens it has room for.

    A contiguous cache is as long as the longest sequence may get, which is twice the context: nobody knows before. A
    paged one has the pages that these sequences fill in the end.
    """
    lengths = generation.lengths(seed)
    model = {
        "num_layers": 1,
        "num_kv_heads": generation.num_heads,
        "head_dim": generation.head_dim,
        "dtype": np.dtype(generation.dtype),
        "array_module": xp,
    }
    if kind == "contiguous":
        capacity = 2 * generation.context
        cache: Any = cuattn.KVCache(generation.batch, capacity, **model)
        slots = generation.batch * capacity
    else:
        size = generation.page_size
        num_pages = sum(-(-(n + generation.steps) // size) for n in lengths)
        cache, slots = cuattn.PagedKVCache(num_pages, size, **model), num_pages * size
    seqs = [cache.add() for _ in lengths]
    rng = np.random.default_rng(seed)
    with cache.reserve(seqs, lengths) as step:
        shape = sum(lengths), generation.num_heads, generation.head_dim
        step.append(0, *(xp.asarray(normal(rng, shape, generation.dtype)) for _ in "kv"))
        step.commit()
    return cache, seqs, slots


def _step(cache: Any, seqs: list[Any], generation: Generation, xp: Any, seed: tuple[int, int]) -> Any:
    rng = np.random.default_rng(seed)
    shape = generation.batch, generation.num_heads, generation.head_dim
    q, k, v = (xp.asarray(normal(rng, shape, generation.dtype)) for _ in "qkv")
    with cache.reserve(seqs, 1) as step:
        step.append(0, k, v)
        out = step.attend(0, q)
        step.commit()
    return out
