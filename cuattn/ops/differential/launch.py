"""The way from a checked problem to the launch of the forward kernel: config, classes of tiles, arguments."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any, Generic, NamedTuple

import numpy as np

from cuattn.head_dims import BUCKETS
from cuattn.ops.attention import tile_classes
from cuattn.ops.attention.option_checks import LogitArray
from cuattn.ops.attention.params import REALS, pack_params
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.differential import hopper_launch
from cuattn.ops.differential.arguments import DifferentialProblem
from cuattn.ops.differential.config import DifferentialConfig
from cuattn.ops.differential.hopper_config import HopperDifferentialConfig, require
from cuattn.ops.differential.path import row_of
from cuattn.ops.operand import Operand, operand
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout
from cuattn.typing import ArrayT

__all__ = ["DifferentialState", "forward", "in_pairs", "tile_classes_of_streams"]


class DifferentialState(NamedTuple, Generic[ArrayT]):
    """What the gradients of differential attention need of the forward.

    Attributes
    ----------
    lse : array [batch, heads, 2, seqlen_q], float32 (float64 for float64)
        Of the logits of the first and of the second softmax.
    out1, out2 : array [batch, seqlen_q, heads, head_dim_v], of the dtype of q
        The two attentions that the result is the difference of.
    """

    lse: Any
    out1: ArrayT
    out2: ArrayT


def forward(
    problem: DifferentialProblem,
    *,
    return_state: bool,
    config: DifferentialConfig | HopperDifferentialConfig | None = None,
) -> Any:
    """Launch the kernel of a problem; returns out, or (out, state). ``config``: another row than the selected one."""
    executor, extents = problem.executor, problem.extents
    output = problem.output()
    state = None
    if return_state:
        outs = (executor.empty(extents.out_shape, problem.dtype) for _ in range(2))
        state = DifferentialState(executor.empty(extents.lse_shape, problem.accumulator), *outs)
    if output.array.size:
        _launch(problem, output, state, config)
    out = problem.deliver(output)
    if state is None:
        return out
    executor.finish(*state)
    return out, state


def in_pairs(x: Operand) -> Operand:
    """Return the operand whose heads are pairs: its stride leads from one pair to the next."""
    paired = copy.copy(x)
    batch, seq, head = x.strides
    paired.strides = batch, seq, 2 * head
    return paired


def _launch(
    problem: DifferentialProblem,
    output: Operand,
    state: DifferentialState[Any] | None,
    config: DifferentialConfig | HopperDifferentialConfig | None,
) -> None:
    executor, extents, options = problem.executor, problem.extents, problem.options
    q, k, v = (operand(executor, x) for x in (problem.q, problem.k, problem.v))
    if isinstance(config, HopperDifferentialConfig):
        require(problem, config)
    config = config or row_of(problem, executor.arch, executor.smem_limit_bytes)
    classes, class_stream = tile_classes_of_streams(problem, config.block_m, config.block_n)
    of_state = Operand.of_new(state.out1).strides if state else (0, 0, 0)
    more = (
        ("state", of_state),
        ("lambda", problem.lambda_.strides),
        ("q_stream", q.strides[2]),
        ("k_stream", 0 if extents.shared_keys else k.strides[2]),
        *streams_of_options(problem, class_stream),
        ("lambda_value", problem.lambda_.number),
        ("eps", problem.norm.eps),
        ("output_scale", problem.norm.output_scale),
        ("norm", problem.norm.on),
    )
    layout = struct_layout("differential_attention", "DifferentialParams", REALS[problem.accumulator])
    paired_k = k if extents.shared_keys else in_pairs(k)
    args = {
        "g_out": output.array,
        "g_lambda": problem.lambda_.array,
        "g_norm_weight": problem.norm.weight,
        "g_lse": None if state is None else state.lse,
        "g_out1": None if state is None else state.out1,
        "g_out2": None if state is None else state.out2,
        "params": pack_params(layout, problem, in_pairs(q), paired_k, v, output, classes=classes, more=more),
    }
    if isinstance(config, HopperDifferentialConfig):
        hopper_launch.launch(problem, config, (q, k, v), args)
        return
    head_dims = BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v]
    aligned = q.aligned and k.aligned and v.aligned
    of_call = options.kernel_options, extents.shared_keys, aligned
    kernel = _kernel(executor, config, problem.dtype.name, *head_dims, *of_call)
    args |= {
        "g_q": q.array,
        "g_k": k.array,
        "g_v": v.array,
        "g_tile_class": None if classes is None else classes.array,
        **options.pointers(config.source, config.entry),
    }
    num_blocks = -(-extents.seqlen_q // config.block_m)
    grid = extents.batch * extents.num_heads * num_blocks
    smem_bytes = config.smem_bytes(*head_dims, shared_keys=extents.shared_keys)
    executor.launch(kernel, (grid,), (config.num_threads,), args, smem_bytes)


def streams_of_options(problem: DifferentialProblem, class_stream: int) -> tuple[tuple[str, int], ...]:
    """Return the strides from stream to stream of the arrays of options, and those of slopes, by their fields."""
    options, slopes = problem.options, problem.options.alibi_slopes
    both = slopes is None or slopes.shape[1] != 2 * problem.extents.num_heads
    return (
        ("bias_stream", 0 if options.bias is None else options.bias.stream),
        ("mask_stream", 0 if options.mask is None else options.mask.stream),
        ("class_stream", class_stream),
        ("alibi_head", 1 if both else 2),
        ("alibi_stream", 0 if both else 1),
    )


def tile_classes_of_streams(problem: DifferentialProblem, block_m: int, block_n: int) -> tuple[LogitArray | None, int]:
    """Find what bias and mask do to each tile, for the streams apart where they differ; and the stride between them."""
    executor, options = problem.executor, problem.options
    given = [x for x in (options.bias, options.mask) if x is not None]
    if not given:
        return None, 0
    of_streams = [problem.options_of_stream(stream) for stream in range(2 if any(x.stream for x in given) else 1)]
    shape = tile_classes.shape(of_streams[0], block_m, block_n)
    assert shape is not None
    array = executor.empty((len(of_streams), *shape), np.uint8)
    found = [
        tile_classes.find(executor, of_stream, block_m, block_n, array[stream])
        for stream, of_stream in enumerate(of_streams)
    ]
    return replace(found[0], array=array), array[0].size if len(found) > 1 else 0


@cache
def _kernel(
    executor: Executor,
    config: DifferentialConfig,
    dtype_name: str,
    head_dim: int,
    head_dim_v: int,
    options: ForwardOptions,
    shared_keys: bool,
    aligned: bool,
) -> Kernel:
    constants = config.constants(dtype_name, head_dim, head_dim_v, options, shared_keys=shared_keys, aligned=aligned)
    return executor.kernel(config.source, constants, config.entry)
