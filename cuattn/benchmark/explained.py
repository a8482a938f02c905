"""What a call of attention would do on a GPU: its kernel and row, its launch, its work, and what bounds it.

Nothing runs. The row is chosen as the call chooses it, registers come from compiling for the GPU's architecture, times
at best from its data sheet (`cuattn.estimate`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

import cuattn
from cuattn import compile, estimate
from cuattn.compile import occupancy
from cuattn.errors import NVRTCNotFoundError
from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.forward import hopper_config as hopper
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.ops.attention.forward.hopper_launch import L2_BYTES
from cuattn.ops.attention.forward.hopper_schedule import dense_schedule, pack_heads
from cuattn.ops.attention.forward.path import ForwardPath, check_call
from cuattn.ops.attention.forward.tuned_rows import Row
from cuattn.testing.attention_cases import AttentionCase

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """How a call of the forward is computed on a GPU.

    Attributes
    ----------
    case, gpu
        What was asked.
    path
        Kernel and row, and why.
    constants
        What the kernel is compiled with.
    num_ctas, num_threads, smem_bytes
        The launch.
    registers, spill_bytes, ctas_per_sm, occupancy
        None where there is no NVRTC to compile with.
    flops, least_bytes, asked_bytes
        The work: each array once, and what the tiles ask memory for (which caches answer in part).
    """

    case: AttentionCase
    gpu: str
    path: ForwardPath
    constants: dict[str, Any]
    num_ctas: int
    num_threads: int
    smem_bytes: int
    registers: int | None
    spill_bytes: int | None
    ctas_per_sm: int | None
    occupancy: float | None
    flops: int
    least_bytes: int
    asked_bytes: int

    @property
    def sms(self) -> int:
        """Multiprocessors of the GPU."""
        return estimate.GPUS[self.gpu].sms

    @property
    def waves(self) -> float | None:
        """CTAs over those that run at the same time."""
        return None if not self.ctas_per_sm else self.num_ctas / (self.ctas_per_sm * self.sms)

    @property
    def ceiling(self) -> tuple[float, str]:
        """FLOP/s of the GPU in the arithmetic of the kernel, and what that is."""
        card, item = estimate.GPUS[self.gpu], np.dtype(self.case.dtype).itemsize
        if self.path.kernel.endswith("_fma"):
            return (card.fp64_flops_per_s, "float64") if item == 8 else (card.fp32_flops_per_s, "float32")
        if item == 4:
            return card.flops_per_s / 2, "tf32 tensor cores"
        if self.case.precision == "fp8" and self.path.kernel.endswith("_hopper"):
            return card.flops_per_s * 2, "8-bit tensor cores"
        return card.flops_per_s, "16-bit tensor cores"

    @property
    def roofline(self) -> estimate.Roofline:
        """What the work takes at least."""
        card = replace(estimate.GPUS[self.gpu], flops_per_s=self.ceiling[0])
        return estimate.roofline(card, self.flops, self.least_bytes)


def explain(case: AttentionCase, gpu: str) -> Explanation:
    """Explain a call on a GPU of `cuattn.estimate.GPUS`.

    Raises what the call itself would raise.

    >>> explain(AttentionCase(1, 4096, 16, 64), "A100").path.kernel
    'attention_forward'
    """
    of_gpu = estimate.GPUS[gpu]
    arrays = {name: np.empty(shape, case.dtype) for name, shape in case.shapes.items()}
    options: dict[str, Any] = {**case.options, **case.option_inputs(np.random.default_rng(0))}
    path = cuattn.forward_path(**arrays, arch=of_gpu.arch, **options)
    problem, _ = check_call(**arrays, cu_seqlens_q=None, cu_seqlens_k=None, **options)
    extents, row = problem.extents, cast(Row, path.row)  # that of a call of attention
    if isinstance(row, HopperFwdConfig):
        dims = hopper.BUCKETS[extents.head_dim], hopper.BUCKETS[extents.head_dim_v]
        constants = row.constants(case.dtype, *dims, path.options, packed=False)
        smem_bytes = row.smem_bytes(*dims, path.options)
        pack = pack_heads(extents.seqlen_q, extents.heads_per_kv_head, row.block_m)
        more = {"block_m": row.block_m, "itemsize": problem.dtype.itemsize, "l2_bytes": L2_BYTES}
        num_ctas = min(dense_schedule(extents, pack=pack, **more).num_tiles, of_gpu.sms)
        columns = 1
    else:
        pack, (wide, columns) = 1, COLUMNS[extents.head_dim_v]
        head_dim = BUCKETS[extents.head_dim]
        constants = row.constants(case.dtype, head_dim, wide, path.options, aligned=True, column_blocks=columns)
        smem_bytes = row.smem_bytes(head_dim, wide)
        num_ctas = columns * extents.num_heads * extents.batch * -(-extents.seqlen_q // row.block_m)
    registers, spilled, ctas, fraction = _resources(path.kernel, constants, of_gpu.arch, row.num_threads, smem_bytes)
    return Explanation(
        case,
        gpu,
        path,
        constants,
        num_ctas,
        row.num_threads,
        smem_bytes,
        registers,
        spilled,
        ctas,
        fraction,
        case.flops,
        case.num_bytes,
        _asked(case, row.block_m // pack, row.block_n, pack, columns, isinstance(row, HopperFwdConfig)),
    )


def _resources(kernel: str, constants: dict[str, Any], arch: str, num_threads: int, smem_bytes: int) -> Any:
    """Return registers, spilled bytes, CTAs a multiprocessor and occupancy of a kernel, or as many None."""
    try:
        binary = compile.build(kernel, constants, arch=arch, kind="cubin")
    except NVRTCNotFoundError:
        return None, None, None, None
    (figures,) = binary.resources.values()
    shared = smem_bytes + figures.static_smem_bytes
    ctas = occupancy.ctas_per_sm(arch, num_threads=num_threads, registers=figures.registers, smem_bytes=shared)
    fraction = occupancy.fraction(arch, ctas, num_threads)
    return figures.registers, figures.spill_stores + figures.spill_loads, ctas, fraction


def _asked(case: AttentionCase, queries: int, keys: int, pack: int, columns: int, whole: bool) -> int:
    """Count the bytes that tiles of so many queries and keys ask for: keys and values again for each of them.

    They begin with a tile of keys, and end with the last key that is visible; with tensor maps, which bring whole
    tiles, with its tile. `pack` heads share a tile, and each of `columns` blocks of value columns goes over the keys.
    """
    begin, end = case.visible_keys()
    rows = 0
    for first in range(0, case.seqlen_q, queries):
        own = slice(first, first + queries)
        low, high = int(begin[own].min()), int(end[own].max())
        if high > low:
            last = min(case.num_keys, -(-high // keys) * keys) if whole else high
            rows += last - low // keys * keys
    item, (batch, _, heads, head_dim) = np.dtype(case.dtype).itemsize, case.shapes["q"]
    head_dim_v = case.shapes["v"][3]
    once = case.num_bytes - batch * case.num_keys * case.shapes["k"][2] * (head_dim + head_dim_v) * item
    of_queries = batch * case.seqlen_q * heads * head_dim * item
    again = batch * heads // pack * rows * (columns * head_dim + head_dim_v) * item
    return once + (columns - 1) * of_queries + again
