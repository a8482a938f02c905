"""The way from a checked backward problem to its launches: rows, dq, dk, dv, then the gradients of bias and sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.head_dims import BUCKETS
from cuattn.ops.attention import tile_classes
from cuattn.ops.attention.backward.bias_launch import launch_dbias, launch_dsinks
from cuattn.ops.attention.backward.config import FlashBwdConfig, Launch
from cuattn.ops.attention.backward.dq_sums import DqSums
from cuattn.ops.attention.backward.plan import select_configs
from cuattn.ops.attention.backward.problem import AttentionGrads, BackwardProblem
from cuattn.ops.attention.backward.workspace import allocate, classes_name
from cuattn.ops.attention.option_checks import LogitArray
from cuattn.ops.attention.params import backward_layout, pack_params
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.operand import Operand, operand
from cuattn.runtime.arrays import zeros
from cuattn.runtime.executor import Executor, Kernel

__all__ = ["Prepared", "backward"]

_ROWS_WARPS = 4  # of the kernel that prepares the rows: one row a warp
_NO_STRIDES = 0, 0, 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The operands of every kernel of a call, and what the first of them found out about the queries."""

    problem: BackwardProblem
    q: Operand
    k: Operand
    v: Operand
    dout: Operand
    out: Operand
    lse: Any  # ready for the kernels: see attention_backward_rows.cu
    delta: Any
    workspace: dict[str, Any]

    @property
    def aligned(self) -> bool:
        """Whether every row that a tile is loaded from begins at a multiple of 16 bytes."""
        return self.q.aligned and self.k.aligned and self.v.aligned and self.dout.aligned

    def params(
        self,
        dq: Operand | DqSums | None = None,
        dk: Operand | None = None,
        dv: Operand | None = None,
        classes: LogitArray | None = None,
    ) -> np.void:
        """Pack the struct of kernels/backward/attention_backward_params.cuh."""
        problem = self.problem
        layout, operands = backward_layout(problem.forward.accumulator), (self.q, self.k, self.v, self.out)
        gradients = (
            ("dout", self.dout.strides),
            ("dq", _NO_STRIDES if dq is None else dq.strides),
            ("dk", _NO_STRIDES if dk is None else dk.strides),
            ("dv", _NO_STRIDES if dv is None else dv.strides),
        )
        return pack_params(layout, problem.forward, *operands, classes=classes, packed=problem.packed, more=gradients)


def backward(
    problem: BackwardProblem,
    *,
    configs: Sequence[FlashBwdConfig] | None = None,
    terms: tuple[Any, Any] | None = None,
) -> AttentionGrads:
    """Launch the kernels of a problem. ``configs``: other rows for queries and keys than those of `select_configs`.

    ``terms``: lse and delta as attention_backward_rows.cu makes them, where they are known; out and lse of the problem
    are not looked at then.
    """
    if configs is None:
        configs = select_configs(problem)
    executor, extents, options = problem.executor, problem.forward.extents, problem.forward.options
    targets = {name: problem.target(name) for name in ("dq", "dk", "dv")}
    workspace = allocate(problem, configs)
    if terms is not None:
        workspace["lse"], workspace["delta"] = terms
    prepared = _prepare(problem, workspace, known=terms is not None)
    classes = {}
    if problem.listed is None and (options.bias is not None or options.mask is not None):
        classes = {
            tile: tile_classes.find(executor, options, *tile, workspace[name])
            for tile in {config.tile for config in configs}
            if (name := classes_name(tile)) in workspace
        }
    sums = DqSums(workspace["dq"], extents) if "dq" in workspace else None
    if sums is not None and sums.array.size:
        sums.clear(executor)
    for config in configs:
        _launch_side(prepared, config, classes.get(config.tile), targets, sums)
    if sums is not None and sums.array.size:
        sums.round_to(targets["dq"], prepared.params(dq=targets["dq"]), problem)
    dbias = launch_dbias(problem, prepared) if problem.return_dbias else None
    dsinks = None
    if options.sinks is not None:
        dsinks = launch_dsinks(problem, prepared)
    dq, dk, dv = (problem.deliver(name, written) for name, written in targets.items())
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def _prepare(problem: BackwardProblem, workspace: dict[str, Any], *, known: bool) -> Prepared:
    """Launch the kernel that looks at every query of every head, unless what it finds out is ``known``."""
    executor, forward = problem.executor, problem.forward
    q, k, v, dout, out = (operand(executor, x) for x in (forward.q, forward.k, forward.v, problem.dout, problem.out))
    prepared = Prepared(problem, q, k, v, dout, out, workspace["lse"], workspace["delta"], workspace)
    num_rows = problem.lse.size
    if num_rows and not known:
        on_tensor_cores = forward.dtype.itemsize == 2 or forward.options.tf32
        base_2 = on_tensor_cores and not problem.kernel_options.natural_logits
        args = {
            "g_dout": dout.array,
            "g_out": out.array,
            "g_lse": problem.lse,
            "g_dlse": problem.dlse,
            "g_ready_lse": prepared.lse,
            "g_delta": prepared.delta,
            "base_2": np.int32(base_2),
            "num_rows": np.int64(num_rows),
            "params": prepared.params(),
        }
        kernel = _rows_kernel(executor, forward.dtype)
        executor.launch(kernel, (-(-num_rows // _ROWS_WARPS),), (_ROWS_WARPS * WARP_SIZE,), args)
    return prepared


@cache
def _rows_kernel(executor: Executor, dtype: np.dtype[Any]) -> Kernel:
    element, accumulator = ELEMENTS[dtype.name]
    constants: dict[str, Any] = {"Element": element, "Accumulator": accumulator, "NUM_WARPS": _ROWS_WARPS}
    return executor.kernel("attention_backward_rows", constants, "cuattn_attention_backward_rows")


def _launch_side(
    prepared: Prepared,
    config: FlashBwdConfig,
    classes: LogitArray | None,
    targets: dict[str, Operand],
    sums: DqSums | None,
) -> None:
    """Launch dq, or dk and dv; with ``sums``, dq on the way."""
    problem = prepared.problem
    executor, extents, options = problem.executor, problem.forward.extents, problem.forward.options
    of_keys = config.own == "keys"
    names = ("dk", "dv") if of_keys else ("dq",)
    if not any(targets[name].array.size for name in names):
        return
    if not extents.num_heads:  # keys that no query head reads
        for name in names:
            targets[name] = Operand(zeros(executor, targets[name].array.shape, targets[name].array.dtype))
        return
    seqlen, num_heads = extents.seqlen_q, extents.num_heads
    if of_keys:
        seqlen, num_heads = extents.seqlen_k, extents.num_kv_heads
    packed = problem.packed
    tile_list = None
    if problem.listed is not None:
        tile_list, work = problem.listed.tiles[problem.listed.configs.index(config)]
    else:
        work = None if packed is None else packed.work(executor, seqlen, config.block_own, options, of_keys=of_keys)
    num_blocks = extents.batch * -(-seqlen // config.block_own) if work is None else work.shape[0]
    buckets = BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v]
    add_dq = sums is not None
    qk, v = (targets[name].array.dtype != problem.forward.dtype for name in (names[0], names[-1]))
    of_call = problem.kernel_options, prepared.aligned, add_dq, problem.listed is not None, (qk, of_keys and v)
    kernels = _kernels(executor, config, problem.forward.dtype, *buckets, *of_call)
    for launch, kernel, smem_bytes in kernels:
        dq: Operand | DqSums | None = sums if launch.add_dq else None if of_keys else targets["dq"]
        dk = targets["dk"] if of_keys and launch.grad_qk else None
        dv = targets["dv"] if launch.grad_v else None
        args = {
            **options.pointers(config.source, config.entry),
            "g_dout": prepared.dout.array,
            "g_q": prepared.q.array,
            "g_k": prepared.k.array,
            "g_v": prepared.v.array,
            "g_lse": prepared.lse,
            "g_delta": prepared.delta,
            "g_dq": None if dq is None else dq.array,
            "g_dk": None if dk is None else dk.array,
            "g_dv": None if dv is None else dv.array,
            "g_tile_class": None if classes is None else classes.array,
            "g_cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
            "g_cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
            "g_work": work,
            "params": prepared.params(dq, dk, dv, classes),
            "g_tile_list": tile_list,
        }
        executor.launch(kernel, (num_heads * num_blocks,), (config.num_threads,), args, smem_bytes)


@cache
def _kernels(
    executor: Executor,
    config: FlashBwdConfig,
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    options: ForwardOptions,
    aligned: bool,
    add_dq: bool,
    listed: bool,
    unrounded: tuple[bool, bool],
) -> list[tuple[Launch, Kernel, int]]:
    """Return the launches of a side in their order, the kernel of each, and its shared memory in bytes."""
    found = []
    for launch in config.launches(add_dq=add_dq):
        written = unrounded[0] and launch.grad_qk, unrounded[1] and launch.grad_v
        of_call: dict[str, Any] = {"launch": launch, "aligned": aligned, "listed": listed, "unrounded": written}
        constants = config.constants(dtype.name, head_dim, head_dim_v, options, **of_call)
        kernel = executor.kernel(config.source, constants, config.entry)
        found.append((launch, kernel, config.smem_bytes(head_dim, head_dim_v, add_dq=launch.add_dq)))
    return found
