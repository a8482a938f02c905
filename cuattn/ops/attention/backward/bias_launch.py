"""The gradients of a bias and of sinks: how their kernels are launched, and the workspace they need.

The gradient of a bias is cut into tiles: those of the logits where the bias is not broadcast. Where these are too few
to fill a GPU, the sum of each is cut into parts, and the parts are added by a second kernel. How many parts there are
depends on the shapes alone, so the same problem is always summed in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.dtypes import ELEMENT_TYPES, ELEMENTS, WARP_SIZE
from cuattn.head_dims import BUCKETS
from cuattn.ops.attention.backward.bias_config import BiasBwdConfig, select
from cuattn.ops.attention.params import REALS
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout

if TYPE_CHECKING:
    from cuattn.ops.attention.backward.launch import Prepared
    from cuattn.ops.attention.backward.problem import BackwardProblem

__all__ = ["launch_dbias", "launch_dsinks", "partial_nbytes"]

ENOUGH_CTAS = 256  # with fewer tiles than this their sums are cut into parts
_SUM_THREADS = 256
_SINK_WARPS = 32


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the gradient of a bias is cut into parts."""

    logits_shape: tuple[int, ...]  # [batch, heads, seqlen_q, seqlen_k]
    shape: tuple[int, ...]  # of the gradient, with all four axes
    num_tiles: int
    num_parts: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def pack(self) -> np.void:
        num_batch, num_heads, seqlen_q, seqlen_k = self.logits_shape
        return struct_layout("attention_backward_bias", "BiasSums").pack(
            strides=[0 if self.shape[axis] == 1 else math.prod(self.shape[axis + 1 :]) for axis in range(4)],
            num_elements=self.num_elements,
            num_batch=num_batch,
            num_heads=num_heads,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_parts=self.num_parts,
        )


@cache
def _cut(logits_shape: tuple[int, ...], bias_shape: tuple[int, ...], config: BiasBwdConfig) -> _Cut:
    shape = (1,) * (4 - len(bias_shape)) + bias_shape
    tile = 1, 1, config.block_m, config.block_n
    along_axes = [-(-extent // size) for extent, size in zip(logits_shape, tile, strict=True)]
    num_tiles = math.prod(tiles for tiles, extent in zip(along_axes, shape, strict=True) if extent != 1)
    num_terms = math.prod(tiles for tiles, extent in zip(along_axes, shape, strict=True) if extent == 1)
    num_parts = min(max(ENOUGH_CTAS // max(num_tiles, 1), 1), max(num_terms, 1))
    return _Cut(logits_shape, shape, num_tiles, num_parts)


def _config(problem: BackwardProblem) -> tuple[BiasBwdConfig, int, int]:
    """Return the shape of the kernel, and the buckets of the head dims."""
    forward = problem.forward
    buckets = BUCKETS[forward.extents.head_dim], BUCKETS[forward.extents.head_dim_v]
    smem_limit_bytes = forward.executor.smem_limit_bytes
    config = select(forward.dtype, *buckets, smem_limit_bytes=smem_limit_bytes, tf32=forward.options.tf32)
    return config, *buckets


def _cut_of(problem: BackwardProblem, config: BiasBwdConfig) -> _Cut:
    bias = problem.forward.options.bias
    assert bias is not None and problem.bias_shape is not None
    return _cut(tuple(bias.array.shape), problem.bias_shape, config)


def partial_nbytes(problem: BackwardProblem) -> int:
    """Return the bytes of workspace for the gradient of the bias: at most 4 MiB, however long the sequences are."""
    if not problem.return_dbias:
        return 0
    cut = _cut_of(problem, _config(problem)[0])
    if cut.num_parts == 1:
        return 0
    return cut.num_parts * cut.num_elements * np.dtype(problem.forward.accumulator).itemsize


def launch_dbias(problem: BackwardProblem, prepared: Prepared) -> Any:
    """Launch the gradient of the bias, of its shape and dtype."""
    forward, executor, packed = problem.forward, problem.executor, problem.packed
    options = forward.options
    config, head_dim, head_dim_v = _config(problem)
    cut = _cut_of(problem, config)
    bias: Any = options.bias
    dbias = executor.empty(cut.shape, bias.array.dtype)
    if dbias.size:
        partial = prepared.workspace["dbias"] if cut.num_parts > 1 else None
        constants = config.constants(
            forward.dtype.name, head_dim, head_dim_v, options.kernel_options, aligned=prepared.aligned
        )
        kernel = executor.kernel(config.source, constants, config.entry)
        args = {
            **options.pointers(config.source, config.entry),
            "g_dout": prepared.dout.array,
            "g_q": prepared.q.array,
            "g_k": prepared.k.array,
            "g_v": prepared.v.array,
            "g_lse": prepared.lse,
            "g_delta": prepared.delta,
            "g_dbias": dbias,
            "g_partial": partial,
            "g_cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
            "g_cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
            "sums": cut.pack(),
            "params": prepared.params(),
        }
        executor.launch(
            kernel,
            (cut.num_tiles * cut.num_parts,),
            (config.num_threads,),
            args,
            config.smem_bytes(head_dim, head_dim_v),
        )
        if partial is not None:
            kernel = _sum_kernel(executor, REALS[forward.accumulator], bias.array.dtype.name)
            args = {
                "g_partial": partial,
                "g_dbias": dbias,
                "num_elements": np.int64(cut.num_elements),
                "num_parts": np.int32(cut.num_parts),
            }
            executor.launch(kernel, (-(-cut.num_elements // _SUM_THREADS),), (_SUM_THREADS,), args)
    executor.finish(dbias)
    return dbias.reshape(problem.bias_shape)


@cache
def _sum_kernel(executor: Executor, real: str, bias_dtype: str) -> Kernel:
    constants: dict[str, Any] = {
        "Real": real,
        "BiasElement": ELEMENT_TYPES[bias_dtype],
        "NUM_THREADS": _SUM_THREADS,
    }
    return executor.kernel("attention_backward_bias_sum", constants, "cuattn_attention_backward_bias_sum")


def launch_dsinks(problem: BackwardProblem, prepared: Prepared) -> Any:
    """Launch the gradient of the sinks [heads], of the accumulator's type."""
    forward, executor = problem.forward, problem.executor
    extents, accumulator = forward.extents, forward.accumulator
    dsinks = executor.empty(extents.num_heads, accumulator)
    if dsinks.size:
        element = ELEMENTS[forward.dtype.name][0]
        constants: dict[str, Any] = {"Real": REALS[accumulator], "Element": element, "NUM_WARPS": _SINK_WARPS}
        kernel = executor.kernel("attention_backward_sinks", constants, "cuattn_attention_backward_sinks")
        batch_stride, head_stride = extents.lse_strides
        args = {
            "g_sinks": forward.options.sinks,
            "g_lse": problem.lse,
            "g_delta": prepared.delta,
            "g_dsinks": dsinks,
            "batch_stride": np.int64(batch_stride),
            "head_stride": np.int64(head_stride),
            "num_batch": np.uint32(1 if extents.packed else extents.batch),
            "seqlen": np.uint32(extents.seqlen_q),
        }
        executor.launch(kernel, (extents.num_heads,), (_SINK_WARPS * WARP_SIZE,), args)
    executor.finish(dsinks)
    return dsinks
