"""The way of a decode call: checks, one split decode for each stream or for both, and the kernel of the difference.

Where both streams read one key head, they are the heads of one decode, which reads every key and value once. Otherwise
each stream is a decode of its own, over views of q and of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.errors import DTypeError
from cuattn.head_dims import BUCKETS, HEAD_DIM_BUCKETS
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.params import REALS
from cuattn.ops.decode import arguments as decode_arguments
from cuattn.ops.decode.launch import decode
from cuattn.ops.decode.problem import DecodeProblem
from cuattn.ops.differential.arguments import MAX_HEAD_DIM, Norm, check_heads, check_norm
from cuattn.ops.differential.weights import Lambda, check_lambda
from cuattn.ops.operand import Operand, deliver, operand, target
from cuattn.runtime.arrays import contiguous
from cuattn.runtime.checks import check_apart, check_out
from cuattn.runtime.executor import Executor, Kernel, executor_for
from cuattn.runtime.structs import struct_layout

__all__ = ["DECODE_CALL", "CachedProblem", "check", "combine_constants", "combine_variants", "decode_pairs"]

DECODE_CALL = Operation("differential_decode", "differential_decode")

_NUM_WARPS = 4
_ENTRY = "cuattn_differential_combine"


@dataclass(slots=True)
class CachedProblem:
    """A call whose arguments have passed every check.

    ``streams``: a decode for each stream, or one in which every stream is a head.
    """

    executor: Executor
    streams: tuple[DecodeProblem, ...]
    out: Any
    out_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    lambda_: Lambda
    norm: Norm


def check(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    lambda_: Any,
    seqlens_k: Any,
    *,
    block_tables: Any,
    num_splits: Any,
    norm: Any,
    norm_weight: Any,
    eps: Any,
    output_scale: Any,
    out: Any,
    **options: Any,
) -> CachedProblem:
    """Make every check of a call. Raises as documented at `cuattn.differential_decode`."""
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache} | ({} if out is None else {"out": out})
    executor = executor_for(**given)
    arrays = {name: executor.asarray(name, x) for name, x in given.items()}
    q, k, v = (arrays[name] for name in ("q", "k_cache", "v_cache"))
    for name in ("k_cache", "v_cache"):
        if arrays[name].dtype != q.dtype:
            raise DTypeError(f"{name} has dtype {arrays[name].dtype} and q has dtype {q.dtype}; they must be the same")
    shared = check_heads(*(tuple(x.shape) for x in (q, k, v)), names=("q", "k_cache", "v_cache"))
    batch, seqlen_q, query_heads, head_dim = q.shape
    accumulator = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    resolved = DECODE_CALL.check(
        options,
        executor,
        logits_shape=(batch, query_heads, None, None),
        num_kv_heads=v.shape[2],
        dtype=q.dtype,
        streams=2,
    )
    streams = []
    for stream in range(1 if shared else 2):
        queries, keys = (q, k) if shared else (q[:, :, stream::2], k[:, :, stream::2])
        if block_tables is None:
            problem = decode_arguments.check(queries, keys, v, seqlens_k, num_splits=num_splits)
        else:
            problem = decode_arguments.check_paged(queries, keys, v, block_tables, seqlens_k, num_splits=num_splits)
        slopes = resolved.alibi_slopes
        if slopes is not None and slopes.shape[1] != problem.extents.num_heads:
            slopes = slopes.repeat(2, axis=1) if shared else contiguous(executor, slopes[:, stream::2])
        problem.options = resolved if slopes is None else replace(resolved, alibi_slopes=slopes, shared=False)
        problem.scale = resolved.scale_for(head_dim)
        streams.append(problem)
    out_shape = batch, seqlen_q, query_heads // 2, v.shape[3]
    factor = check_lambda(executor, lambda_, out_shape[:3], accumulator)
    normed = check_norm(executor, norm, norm_weight, eps, output_scale, v.shape[3], accumulator)
    if out is not None:
        check_out("out", arrays["out"], out_shape, q.dtype)
        inputs = {"q": q, "k_cache": k, "v_cache": v, "lambda_": factor.array, "norm_weight": normed.weight}
        inputs |= {"seqlens_k": streams[0].seqlens_k, "block_tables": streams[0].block_tables} | resolved.arrays
        ranges = {name: byte_bounds(x) for name, x in inputs.items() if x is not None}
        check_apart("out", byte_bounds(arrays["out"]), ranges)
    return CachedProblem(executor, tuple(streams), arrays.get("out"), out_shape, q.dtype, factor, normed)


def decode_pairs(problem: CachedProblem) -> Any:
    """Launch the kernels of a problem."""
    executor = problem.executor
    results = [decode(stream, return_lse=False) for stream in problem.streams]
    outs = (results[0][:, :, ::2], results[0][:, :, 1::2]) if len(results) == 1 else tuple(results)
    output = target(executor, problem.out, problem.out_shape, problem.dtype)
    if output.array.size:
        _combine(problem, operand(executor, outs[0]), operand(executor, outs[1]), output)
    return deliver(executor, problem.out, output)


def _combine(problem: CachedProblem, out1: Operand, out2: Operand, output: Operand) -> None:
    batch, seqlen_q, num_heads, columns = problem.out_shape
    accumulator = np.float64 if problem.dtype == np.float64 else np.float32
    layout = struct_layout("differential_combine", "DifferentialCombineParams", REALS[accumulator])
    num_rows = batch * seqlen_q * num_heads
    fields = {
        "out1": out1.strides,
        "out2": out2.strides,
        "out": output.strides,
        "lambda": problem.lambda_.strides,
        "num_rows": num_rows,
        "seqlen_q": seqlen_q,
        "num_heads": num_heads,
        "head_dim_v": columns,
        "norm": problem.norm.on,
        "lambda_value": problem.lambda_.number,
        "eps": problem.norm.eps,
        "output_scale": problem.norm.output_scale,
    }
    args = {
        "g_out1": out1.array,
        "g_out2": out2.array,
        "g_lambda": problem.lambda_.array,
        "g_norm_weight": problem.norm.weight,
        "g_out": output.array,
        "params": layout.pack(**fields),
    }
    kernel = _kernel(problem.executor, problem.dtype.name, BUCKETS[columns])
    problem.executor.launch(kernel, (-(-num_rows // _NUM_WARPS),), (_NUM_WARPS * WARP_SIZE,), args)


def combine_constants(dtype_name: str, columns: int) -> dict[str, Any]:
    """Return the constants of the kernel of the difference; ``columns`` is a bucket of E."""
    element, accumulator = ELEMENTS[dtype_name]
    return {"Element": element, "Accumulator": accumulator, "HEAD_DIM_V": columns, "NUM_WARPS": _NUM_WARPS}


def combine_variants() -> list[dict[str, Any]]:
    """Return the constants of every kernel of the difference that a call can ask for."""
    sizes = [size for size in HEAD_DIM_BUCKETS if size <= MAX_HEAD_DIM]
    return [combine_constants(name, size) for name in ELEMENTS for size in sizes]


@cache
def _kernel(executor: Executor, dtype_name: str, columns: int) -> Kernel:
    return executor.kernel("differential_combine", combine_constants(dtype_name, columns), _ENTRY)
