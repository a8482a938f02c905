"""Linear attention and its gradients: speed beside peers and beside attention of the same sizes."""

from __future__ import annotations

from dataclasses import replace

from cuattn.benchmark import operations
from cuattn.benchmark.suite import Options, Step
from cuattn.testing.cases import AttentionCase
from cuattn.testing.linear_cases import LinearCase

__all__ = ["cases", "linear_steps"]

HOST_SEQLENS = (256,)
CUDA_SEQLENS = (8192, 2048, 32768)


def cases(options: Options, executor: str) -> list[LinearCase | AttentionCase]:
    """The problems of the suite, those that say most first, each with its gradients.

    Beside each length on a GPU, causal attention of the same sizes: which of both is faster from where on.
    """
    on_gpu = executor == "cuda"
    heads, usual = (16, (128, 64)) if on_gpu else (2, (64,))
    found: list[LinearCase | AttentionCase] = []
    for dtype in options.dtypes or (("bfloat16",) if on_gpu else ("float16", "float32")):
        for seqlen in options.seqlens or (CUDA_SEQLENS if on_gpu else HOST_SEQLENS):
            for head_dim in options.head_dims or usual:
                batch = max(1, 4 * 8192 // seqlen) if on_gpu else 1
                plain = LinearCase(batch, seqlen, heads, head_dim, dtype=dtype)
                forms = [
                    replace(plain, decay="token"),
                    plain,
                    replace(plain, decay="channel"),
                    replace(plain, feature_map="elu1", normalize=True),
                ]
                found += [replace(form, backward=backward) for form in forms for backward in (False, True)]
                if on_gpu:
                    found.append(AttentionCase(batch, seqlen, heads, head_dim, dtype=dtype, causal=True))
    if not (options.dtypes or options.seqlens or options.head_dims):
        first = found[0]
        assert isinstance(first, LinearCase)
        grouped = replace(first, num_k_heads=first.num_heads // 2, num_v_heads=first.num_heads // 2)
        found += [replace(grouped, backward=backward) for backward in (False, True)]
    return found


def linear_steps(options: Options) -> list[Step]:
    """Steps that measure linear attention and its gradients."""
    return operations.case_steps("linear", cases(options, options.resolved()), options)
