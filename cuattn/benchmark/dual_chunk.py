"""Dual-chunk attention beside causal attention of the same shape: on a GPU times, on the host what is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cuattn
from cuattn import host
from cuattn.benchmark.operations import CudaBench
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step
from cuattn.runtime.timer import HOST_METHOD, significant, time_host
from cuattn.testing.attention_cases import AttentionCase
from cuattn.testing.dual_chunk_cases import DualChunkCase, DualChunkDecodeCase

CUDA_SEQLENS = (8192, 32768, 131072)
HOST_SEQLENS = (1024,)
#: Of a context: what C and W are of it.
CHUNKS_OF_CONTEXT, CHUNKS_OF_LOCAL = 4, 8


def dual_chunk_cases(executor: str, options: Options) -> list[DualChunkCase | DualChunkDecodeCase]:
    """Prompts with turned keys and with keys to turn, a chunk of a prompt, chunks that fit no tile, and decoding."""
    on_gpu = executor == "cuda"
    heads, head_dim = (16, 128) if on_gpu else (2, 64)
    cases: list[DualChunkCase | DualChunkDecodeCase] = []
    for dtype in options.dtypes or ("bfloat16" if on_gpu else "float16",):
        for head_size in options.head_dims or (head_dim,):
            for seqlen in options.seqlens or (CUDA_SEQLENS if on_gpu else HOST_SEQLENS):
                length = max(1, seqlen // CHUNKS_OF_CONTEXT)
                local = max(1, length // CHUNKS_OF_LOCAL)
                shape: dict[str, Any] = {"num_heads": heads, "head_dim": head_size, "dtype": dtype}
                chunks: dict[str, Any] = {"chunk_size": length + local, "local_size": local}
                cases += [
                    DualChunkCase(1, seqlen, **shape, **chunks),
                    DualChunkCase(1, seqlen, **shape, **chunks, keys_rotated=False),
                    DualChunkCase(1, max(1, seqlen // 8), **shape, **chunks, seqlen_k=seqlen),
                    DualChunkCase(1, seqlen, **shape, chunk_size=length + local + 13, local_size=local),
                    DualChunkDecodeCase(4, seqlen, num_kv_heads=max(1, heads // 4), **shape, **chunks),
                ]
    return cases


def dual_chunk_steps(options: Options) -> list[Step]:
    """Steps that measure prompts and decoding."""
    executor = options.resolved()
    cases = dual_chunk_cases(executor, options)
    if executor == "host":
        return [Step("dual_chunk", case.name, 3.0, partial(host_records, case, options)) for case in cases]
    bench = CudaBench("dual_chunk", options)
    steps = [Step("ceilings", "copy and matrix product", 4.0, bench.ceilings)]
    for case in cases:
        steps.append(Step("dual_chunk", case.name, 4.0, partial(bench.records, case)))
        if isinstance(case, DualChunkCase):
            causal = _causal(case)
            steps.append(Step("dual_chunk", causal.name, 4.0, partial(bench.records, causal)))
    return list({step.label: step for step in steps}.values())


def _causal(case: DualChunkCase) -> AttentionCase:
    """Return the causal attention of that shape."""
    return AttentionCase(
        case.batch,
        case.seqlen_q,
        case.num_heads,
        case.head_dim,
        seqlen_k=case.keys,
        num_kv_heads=case.kv_heads,
        dtype=case.dtype,
        causal=True,
    )


def host_records(case: DualChunkCase | DualChunkDecodeCase, options: Options) -> Iterator[Record]:
    """One call on the host executor: its time, and what it executes, beside causal attention or plain decoding."""
    arrays = case.make_inputs(options.seed)
    profile = _counted(lambda: case.check(arrays, case.run(arrays)))
    if isinstance(case, DualChunkCase):
        plain = _counted(lambda: cuattn.attention(arrays["q"], arrays["k"], arrays["v"], causal=True))
    else:
        plain = _counted(lambda: cuattn.paged_attention(**arrays))
    timing = time_host(lambda: case.run(arrays), budget_s=options.budget_s)
    moved = profile.bytes["global"]
    metrics: dict[str, Value] = {
        **timing.metrics(),
        "least_flops": case.flops,
        "least_bytes": case.num_bytes,
        "global_read_bytes": moved["read"],
        "global_write_bytes": moved["write"],
        "warp_instructions": profile.warp_instructions,
        "instructions_over_plain": significant(profile.warp_instructions / plain.warp_instructions),
        "launches": profile.launches,
    }
    yield Record("dual_chunk", case.name, metrics, executor="host", method=HOST_METHOD, samples=timing.samples())


def _counted(call: Callable[[], Any]) -> host.Profile:
    with host.profile() as profile:
        call()
    return profile
