"""Which kernel a call of attention takes, in which shape, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from cuattn import compile
from cuattn.errors import ArgumentError
from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.messages import shown
from cuattn.ops.attention import arguments, varlen
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward import hopper_listed
from cuattn.ops.attention.forward import hopper_select as hopper
from cuattn.ops.attention.forward.config import FlashFwdConfig, select
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.ops.attention.forward.tuned_rows import Row, tuned_row
from cuattn.ops.attention.listed import KeptBlocks, check_listed_dtypes, check_mask, listed_options, listed_row
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["ForwardPath", "attention_path", "check_call"]


class Shape(Protocol):
    """A row of a table of shapes, of any family."""

    @property
    def source(self) -> str: ...
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ForwardPath:
    """How a call of attention is computed.

    Attributes
    ----------
    kernel : str
        Name of the kernel file: "attention_forward_hopper", "attention_forward" (tensor cores of every architecture) or
        "attention_forward_fma" (IEEE arithmetic in float32 and float64); of differential attention
        "differential_attention_hopper", "differential_attention" or "differential_attention_fma".
    row : FlashFwdConfig or HopperFwdConfig, or those of differential attention
        Its shape: tiles, threads, stages.
    options : ForwardOptions
        What the kernel is compiled with.
    arch : str
        What it is compiled for.
    reason : str
        Why this kernel.
    tuned : bool
        Whether `cuattn.tune` has measured the shape; else it comes from the table.
    """

    kernel: str
    row: Shape
    options: ForwardOptions
    arch: str
    reason: str
    tuned: bool

    def __str__(self) -> str:
        tiles = f"tiles of {self.row.block_m} queries and {self.row.block_n} keys"
        how = "measured" if self.tuned else "by the table"
        return f"{self.kernel} ({self.options.label}) for {self.arch}, {tiles} ({how}): {self.reason}"


def attention_path(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    *,
    arch: str | None = None,
    block_mask: Any = None,
    **options: Any,
) -> ForwardPath:
    """Say it of a call of attention, dense, packed or with a mask of blocks: see `cuattn.forward_path`."""
    problem, packed = check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    if block_mask is not None:
        return _listed_path(problem, packed, block_mask, arch)
    if arch is None:
        tuned = tuned_row(problem, packed)
        return _path(problem, packed, problem.executor.arch, problem.executor.smem_limit_bytes, tuned)
    return _path(problem, packed, str(arch), compile.smem_limit_bytes(arch), None)


def _path(
    problem: Problem, packed: PackedSequences | None, arch: str, smem_limit_bytes: int, tuned: Row | None
) -> ForwardPath:
    why_not = hopper.why_not(problem, arch)
    row: Row
    if tuned is not None:
        row = tuned
    elif why_not is None:
        row = hopper.select(problem, packed, smem_limit_bytes)
    else:
        row = _portable_row(problem, packed, smem_limit_bytes)
    if isinstance(row, HopperFwdConfig):
        options = hopper.kernel_options(problem.options)
        reason = f"{arch} has wgmma, and nothing in the call is against it"
    else:
        options = problem.options.kernel_options
        reason = "it was the fastest" if why_not is None else f"not the Hopper kernel: {why_not}"
    return ForwardPath(row.source, row, options, arch, reason, tuned is not None)


def _listed_path(problem: Problem, packed: PackedSequences | None, block_mask: Any, arch: str | None) -> ForwardPath:
    """Say the same of a call with a mask of blocks."""
    block_size = getattr(block_mask, "block_size", None)
    if packed is not None or not isinstance(block_size, tuple):
        wrong = "beside cu_seqlens_q" if packed is not None else shown(block_mask)
        raise ArgumentError(f"block_mask is {wrong}; a cuattn.BlockMask for sequences of one length is allowed")
    check_listed_dtypes(q=problem.q, k=problem.k, v=problem.v)
    check_mask(block_mask, problem.extents)
    arch = problem.executor.arch if arch is None else str(arch)
    blocks = KeptBlocks.of(block_mask)
    why_not = hopper_listed.why_not(problem, packed, blocks, arch)
    if why_not is None:
        found = hopper_listed.placement(problem, packed, blocks)
        reason = f"{arch} has wgmma, and CTAs of {found.queries} queries lie in blocks of {blocks.queries}"
        return ForwardPath(found.row.source, found.row, found.options, arch, reason, tuned=False)
    row = listed_row(problem, blocks, compile.smem_limit_bytes(arch))
    options = listed_options(problem.options.variant)
    return ForwardPath(row.source, row, options, arch, f"not the Hopper kernel: {why_not}", tuned=False)


def _portable_row(problem: Problem, packed: PackedSequences | None, smem_limit_bytes: int) -> FlashFwdConfig:
    """Select the shape in which the portable kernels take a call. Raises `LaunchError` where none fits."""
    extents, options = problem.extents, problem.options
    return select(
        problem.dtype,
        BUCKETS[extents.head_dim],
        COLUMNS[extents.head_dim_v][0],
        seqlen_q=hopper.longest_seqlen_q(problem, packed),
        smem_limit_bytes=smem_limit_bytes,
        options=options.kernel_options,
        tf32=options.tf32,
    )


def check_call(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any
) -> tuple[Problem, PackedSequences | None]:
    """Make every check of a call of `attention`, or of `attention_varlen` where there are lengths."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ArgumentError(f"{missing} is None; cu_seqlens_q and cu_seqlens_k are given together or not at all")
    if cu_seqlens_q is not None:
        return varlen.check(q, k, v, cu_seqlens_q, cu_seqlens_k, may_be_unrounded=True, **options)
    return arguments.check(q, k, v, may_be_unrounded=True, **options), None
