"""Which calls the Hopper kernel takes, and in which shape.

The rule: an architecture of sm_90a; float16, bfloat16, or float8_e4m3fn with ``precision="fp8"``; head dims up to 256;
no bias, no mask, no dropout; q, k and v whose bases and strides tensor maps can hold (multiples of 16 bytes); something
to compute. Every other call takes the portable kernel, with the same results.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np

from cuattn import compile, environment
from cuattn.addresses import address
from cuattn.errors import LaunchError, NotSupportedError
from cuattn.ops.attention.arguments import Extents, Problem
from cuattn.ops.attention.forward.config import FEW_QUERIES
from cuattn.ops.attention.forward.hopper_config import ARCH, BUCKETS, HOPPER_FWD_CONFIGS, MAX_HEAD_DIM, HopperFwdConfig
from cuattn.ops.attention.options import Options
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.variants import ForwardOptions, bounded
from cuattn.ops.operand import Operand
from cuattn.runtime import tensor_map_driver
from cuattn.runtime.executor import Executor

__all__ = [
    "DTYPES",
    "MAP_ALIGNMENT",
    "hopper_row",
    "kernel_options",
    "longest_seqlen_q",
    "select",
    "select_row",
    "why_not",
]

#: What wgmma multiplies here, by name.
DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
MAP_ALIGNMENT = 16  # bytes: of the bases and strides that a tensor map holds
_MAX_MAP_STRIDE = 1 << 40  # bytes, exclusive
_MAX_TILES = 2**31 - 2**14  # a CTA counts on by as many tiles as there are CTAs, until it is behind the last
_AXES = ("batch", "sequence", "head")


class WgmmaProblem(Protocol):
    """What a call of any family says that wgmma and tensor maps may be against."""

    @property
    def executor(self) -> Executor: ...
    @property
    def q(self) -> Any: ...
    @property
    def k(self) -> Any: ...
    @property
    def v(self) -> Any: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def extents(self) -> Extents: ...
    @property
    def options(self) -> Options: ...


def why_not(problem: WgmmaProblem, arch: str) -> str | None:
    """Say why the Hopper kernel, where kernels are compiled for ``arch``, does not take a call; None if it does."""
    if arch != ARCH:
        return f"kernels are compiled for {arch}, which has no wgmma instructions; {ARCH} has"
    if environment.hopper() == "off":
        return "CUATTN_HOPPER=off"
    options, extents = problem.options, problem.extents
    if problem.dtype.name not in DTYPES:
        return f"the elements are {problem.dtype.name}; {', '.join(DTYPES)} are multiplied by wgmma"
    if problem.dtype.itemsize == 1 and not options.fp8:
        return 'probabilities keep more bits than the elements have; products of 8 bits are for precision="fp8"'
    if max(extents.head_dim, extents.head_dim_v) > MAX_HEAD_DIM:
        return f"head dims {extents.head_dim} and {extents.head_dim_v} are not both at most {MAX_HEAD_DIM}"
    for row in options.given:
        if row.no_hopper is not None:
            return f"the call has {row.no_hopper}"
    if not (extents.batch and extents.num_heads and extents.seqlen_q and extents.seqlen_k):
        return "there is nothing to compute"
    if extents.batch * extents.num_heads * extents.seqlen_q > _MAX_TILES:
        return f"there may be more than {_MAX_TILES} tiles"
    for name in ("q", "k", "v"):
        reason = _unfit(name, getattr(problem, name))
        if reason is not None:
            return reason
    if problem.executor.name != "host" and not _can_make_maps():
        return "the driver is older than CUDA 12 and makes no tensor maps"
    return None


def _unfit(name: str, x: Any) -> str | None:
    """Say why no tensor map can be made of an array as the kernels would see it; None if one can."""
    itemsize = x.dtype.itemsize
    if x.flags.c_contiguous and (address(x) | x.shape[-1] * itemsize) % MAP_ALIGNMENT == 0:
        return None  # what most calls have
    found = Operand(x)
    if not found.direct:  # it is copied, and the copy has no gaps
        row_bytes = x.shape[-1] * itemsize
        return None if row_bytes % MAP_ALIGNMENT == 0 else _misaligned(f"the rows of a copy of {name}", row_bytes)
    if address(x) % MAP_ALIGNMENT:
        return f"{name} begins at an address that is no multiple of {MAP_ALIGNMENT} bytes"
    extents = (1, *x.shape[:-1])[-3:]
    for axis, extent, stride in zip(_AXES, extents, found.strides, strict=True):
        stride_bytes = stride * itemsize
        if extent > 1 and not (0 < stride_bytes < _MAX_MAP_STRIDE):
            return f"the {axis} stride of {name} is {stride_bytes} bytes; tensor maps take 1 to 2^40 - 1"
        if extent > 1 and stride_bytes % MAP_ALIGNMENT:
            return _misaligned(f"the {axis} stride of {name}", stride_bytes)
    return None


def _misaligned(what: str, num_bytes: int) -> str:
    return f"{what} is {num_bytes} bytes, no multiple of {MAP_ALIGNMENT}"


@cache
def _can_make_maps() -> bool:
    return tensor_map_driver.encoder() is not None


def kernel_options(options: Options) -> ForwardOptions:
    """Choose the options of a call's kernel: bounds, chunks among them, or none; one of softcap and ALiBi, or both."""
    return _kernel_options(options.variant)


@cache
def _kernel_options(variant: ForwardOptions) -> ForwardOptions:
    # With chunks and ALiBi alone the row of 192 x 112 spills 12 bytes; with all of it, where softcap is a branch, none.
    softcap = variant.softcap or (variant.chunk and variant.alibi)
    return bounded(replace(variant, bound_left=variant.bound_left or variant.num_on_scores > 1, softcap=softcap))


def longest_seqlen_q(problem: Problem, packed: PackedSequences | None) -> int:
    """Return the queries of the longest sequence; where only the device knows, of all sequences together."""
    if packed is None or packed.max_seqlen_q is None:
        return problem.extents.seqlen_q
    return packed.max_seqlen_q


def select(problem: Problem, packed: PackedSequences | None, smem_limit_bytes: int) -> HopperFwdConfig:
    """Select the row for a call that the kernel takes."""
    extents, group = problem.extents, problem.extents.heads_per_kv_head
    num_rows = longest_seqlen_q(problem, packed)
    if FEW_QUERIES % group == 0:  # heads share a tile
        num_rows *= group
    options = kernel_options(problem.options)
    of_call = min(num_rows, FEW_QUERIES + 1), options, smem_limit_bytes, problem.dtype.itemsize
    return select_row(extents.head_dim, extents.head_dim_v, *of_call)


@cache
def select_row(
    head_dim: int, head_dim_v: int, num_rows: int, options: ForwardOptions, smem_limit_bytes: int, itemsize: int = 2
) -> HopperFwdConfig:
    """Select the row for head dims, query rows of a sequence (more than `FEW_QUERIES` are all the same) and options."""
    buckets = BUCKETS[head_dim], BUCKETS[head_dim_v]
    for row in HOPPER_FWD_CONFIGS:
        if row.serves(*buckets, options, num_rows, itemsize) and row.is_legal(*buckets, smem_limit_bytes, options):
            return row
    raise LaunchError(f"no shape of the Hopper kernel fits into the {smem_limit_bytes} bytes of shared memory of a CTA")


def hopper_row(problem: Problem, packed: PackedSequences | None, config: object = None) -> HopperFwdConfig | None:
    """Select the shape in which the Hopper kernel takes a call; None where a portable kernel takes it.

    A ``config`` is obeyed, or refused: whatever architecture the host executor is set to, it can run this kernel as
    compiled for its own. Raises `NotSupportedError` or `LaunchError`.
    """
    executor = problem.executor
    if config is None:
        if executor.arch != ARCH or why_not(problem, ARCH) is not None:
            return None
        return select(problem, packed, executor.smem_limit_bytes)
    if not isinstance(config, HopperFwdConfig):
        return None
    arch = ARCH if executor.name == "host" else executor.arch
    reason = why_not(problem, arch)
    if reason is not None:
        raise NotSupportedError(f"the Hopper kernel does not take this call: {reason}")
    head_dim, head_dim_v = problem.extents.head_dim, problem.extents.head_dim_v
    if problem.dtype.itemsize != config.itemsize:
        raise LaunchError(f"config is for elements of {config.itemsize} bytes; the call has {problem.dtype}")
    if BUCKETS[head_dim] > config.max_head_dim or BUCKETS[head_dim_v] > config.max_head_dim_v:
        raise LaunchError(
            f"config is for head dims up to {config.max_head_dim} and {config.max_head_dim_v}; the call has {head_dim} "
            f"and {head_dim_v}"
        )
    buckets, options = (BUCKETS[head_dim], BUCKETS[head_dim_v]), kernel_options(problem.options)
    if not config.is_legal(*buckets, compile.smem_limit_bytes(arch), options):
        raise LaunchError(f"{config} is not legal for head dims {head_dim} and {head_dim_v}")
    return config
