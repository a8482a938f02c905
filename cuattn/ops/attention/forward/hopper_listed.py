"""Which calls with a list of tiles the Hopper kernel takes, and in which shape: rows as those of `HOPPER_FWD_CONFIGS`.

Every row of a CTA sees the same blocks: its queries lie in one block of the mask. So a warpgroup of 64 rows wants
blocks of 64 queries, or smaller ones of which several heads share the keys (grouped-query attention), as they may share
a CTA where the mask is the same for all. Keys come in pieces, as large as a box of a tensor map may be so that blocks
are made of whole ones.

Examples
--------
>>> row = HOPPER_LISTED_CONFIGS[0]
>>> row.block_m, row.block_n, row.is_legal(64, 64, 227 * 1024)
(128, 192, True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cuattn.errors import NotSupportedError
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward import hopper_select
from cuattn.ops.attention.forward.hopper_config import ARCH, BUCKETS, SMEM_ALIGNMENT, SPAN_BYTES, HopperFwdConfig
from cuattn.ops.attention.listed import KeptBlocks
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.variants import PLAIN, ForwardOptions

__all__ = ["HOPPER_LISTED_CONFIGS", "Placement", "compiled_options", "kernel_options", "placement", "select", "why_not"]

#: Keys after which the swizzle of shared memory begins anew: pieces are multiples of it.
GRANULE = SMEM_ALIGNMENT // SPAN_BYTES
#: Keys of a piece at most.
_MOST_AT_ONCE = 64
#: What a tile costs beside its keys, in keys (docs/kernels/block_sparse_attention.md).
_TILE_COST = 80

#: Without options; with bounds, chunks among them; with everything. Fewer than without a list: see `listed_options`.
_BOUNDED = ForwardOptions(bound_left=True, bound_right=True, chunk=True)
_EVERYTHING = replace(_BOUNDED, softcap=True, alibi=True)


def _row(head_dim: int, num_consumers: int, block_n: int, ctas_per_sm: int = 1, **others: Any) -> HopperFwdConfig:
    """Make a row of which the producer has registers enough to find its pieces, and the consumers the rest."""
    producer, consumer = {(1, 1): (56, 256), (1, 2): (40, 216), (2, 1): (40, 232)}[num_consumers, ctas_per_sm]
    return HopperFwdConfig(
        head_dim,
        head_dim,
        num_consumers,
        block_n,
        num_stages=2,
        producer_registers=producer,
        consumer_registers=consumer,
        ping_pong=num_consumers > 1 and head_dim <= 128,
        ctas_per_sm=ctas_per_sm,
        **others,
    )


#: Of each head dim two consumers and one, and where registers allow it tiles of many keys beside those of few. What has
#: no registers for an option serves no call with it.
HOPPER_LISTED_CONFIGS = (
    _row(64, 2, 192),
    _row(64, 2, 128),
    _row(64, 1, 192, ctas_per_sm=2, score_options=False, chunks=False),
    _row(64, 1, 128, ctas_per_sm=2),
    _row(128, 2, 160, score_options=False),
    _row(128, 2, 128),
    _row(128, 1, 96, ctas_per_sm=2),
    _row(192, 2, 96),
    _row(192, 1, 96),
    _row(256, 2, 64),
    _row(256, 1, 64),
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of a CTA are, and how it copies keys.

    Attributes
    ----------
    row : HopperFwdConfig
    options : ForwardOptions
        What the kernel is compiled with.
    pack : int
        Query heads of a key/value head that share a CTA.
    piece : int
        Keys that are copied at once.
    """

    row: HopperFwdConfig
    options: ForwardOptions
    pack: int
    piece: int

    @property
    def queries(self) -> int:
        """Queries of a CTA, of each of its heads."""
        return self.row.block_m // self.pack


def kernel_options(variant: ForwardOptions) -> ForwardOptions:
    """Return the options of the kernel that serves a call with these."""
    if variant.on_scores:
        return _EVERYTHING
    return _BOUNDED if variant.bound_left or variant.bound_right else PLAIN


def compiled_options() -> tuple[ForwardOptions, ...]:
    """List what `kernel_options` returns."""
    return PLAIN, _BOUNDED, _EVERYTHING


def why_not(problem: Problem, packed: PackedSequences | None, blocks: KeptBlocks, arch: str) -> str | None:
    """Say why the Hopper kernel, where kernels are compiled for ``arch``, does not take a call; None if it does."""
    reason = hopper_select.why_not(problem, arch)
    if reason is not None:
        return reason
    extents = problem.extents
    widest = max(row.max_head_dim for row in HOPPER_LISTED_CONFIGS)
    if max(extents.head_dim, extents.head_dim_v) > widest:
        return f"the call has a mask of blocks, and head dims above {widest}"
    if blocks.keys % GRANULE:
        return f"blocks of {blocks.keys} keys are not copied in pieces of {GRANULE}"
    if not _placements(problem, packed, blocks):
        sharing = (
            "whose heads see different keys" if blocks.per_head else f"and {extents.heads_per_kv_head} heads a key"
        )
        return f"64 rows do not lie in one block of {blocks.queries} queries, {sharing}"
    return None


def placement(problem: Problem, packed: PackedSequences | None, blocks: KeptBlocks) -> Placement:
    """Choose where the rows of a call that the kernel takes lie.

    First the fewest rows that are computed for nothing, then CTAs of many rows, which share what they copy, then the
    fewest heads in each; among rows of the table that differ in their keys, the one whose tiles cost the least.
    """
    longest, group = hopper_select.longest_seqlen_q(problem, packed), problem.extents.heads_per_kv_head

    def rank(found: Placement) -> tuple[int, int, int]:
        rows = group // found.pack * -(-longest // found.queries) * found.row.block_m
        return rows, -found.row.block_m, found.pack

    def cost(found: Placement) -> int:
        block_n = found.row.block_n
        return blocks.num_tiles(found.queries, block_n) * (block_n + _TILE_COST)

    found = _placements(problem, packed, blocks)
    best = min(map(rank, found))
    return min((one for one in found if rank(one) == best), key=cost)


def select(
    problem: Problem, packed: PackedSequences | None, blocks: KeptBlocks, config: HopperFwdConfig | None = None
) -> Placement | None:
    """Choose where the rows of a call lie; None where a portable kernel takes it.

    A ``config`` is obeyed: whatever architecture the host executor is set to, it can run this kernel as compiled for
    its own. Raises `NotSupportedError` where the kernel does not take the call in this shape.
    """
    executor = problem.executor
    arch = ARCH if config is not None and executor.name == "host" else executor.arch
    reason = why_not(problem, packed, blocks, arch)
    if config is None:
        return None if reason is not None else placement(problem, packed, blocks)
    found = [] if reason is not None else _placements(problem, packed, blocks, (config,))
    if not found:
        raise NotSupportedError(f"{config} does not take this call: {reason or 'its rows lie in several blocks'}")
    return found[0]


def _placements(
    problem: Problem,
    packed: PackedSequences | None,
    blocks: KeptBlocks,
    rows: tuple[HopperFwdConfig, ...] = HOPPER_LISTED_CONFIGS,
) -> list[Placement]:
    """List where the rows of a call may lie, so that those of a CTA see the same blocks; the fewest heads first."""
    extents, options = problem.extents, kernel_options(problem.options.variant)
    group = 1 if blocks.per_head else extents.heads_per_kv_head
    one_block = hopper_select.longest_seqlen_q(problem, packed) <= blocks.queries
    serving = _serving(rows, BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v], options)
    return [
        Placement(row, options, pack, math.gcd(blocks.keys, row.block_n, _MOST_AT_ONCE))
        for pack in range(1, group + 1)
        if group % pack == 0
        for row in serving
        if row.block_m % pack == 0 and (one_block or blocks.queries % (row.block_m // pack) == 0)
    ]


@cache
def _serving(
    rows: tuple[HopperFwdConfig, ...], head_dim: int, head_dim_v: int, options: ForwardOptions
) -> list[HopperFwdConfig]:
    """List the rows of the head dims for which there are the fewest columns too many."""
    serving = [row for row in rows if row.serves(head_dim, head_dim_v, options, 1)]
    least = min((row.max_head_dim for row in serving), default=0)
    return [row for row in serving if row.max_head_dim == least]
