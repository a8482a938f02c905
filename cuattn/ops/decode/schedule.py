"""What the CTAs of a decode call do: the work items of the grid, and into how many splits the keys of a sequence go.

Where the host knows the lengths, work and splits follow them; what was found is kept, for every layer of a model asks
the same. Where only the device knows them, every sequence gets the splits that its longest possible one would. Either
way the splits are a number: which keys belong to which is computed on the device, from the lengths that are true there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ArgumentError
from cuattn.formats import KVFormat
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.attention.sequences import device_work_list
from cuattn.ops.decode import splits
from cuattn.ops.decode.config import FlashDecodeConfig, compiled_dims
from cuattn.ops.decode.cost import CostModel, cost_model
from cuattn.ops.decode.splits import Blocks
from cuattn.runtime.executor import Executor

if TYPE_CHECKING:
    from cuattn.ops.decode.problem import DecodeProblem

__all__ = ["Lists", "Schedule", "check_partials", "even_schedule", "lists_of", "most_blocks", "schedule"]

MAX_PARTIALS = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Work items, as kernels/decode/decode_block.cuh reads them.

    Attributes
    ----------
    num_items : int
        Items of the grid, splits included; each is a CTA for every key/value head and block of heads.
    cu_seqlens_q : int32 [batch + 1] where kernels read it, or None
        Of packed queries, those that the work is for.
    num_splits : int
        Of every sequence; 1 where ``splits`` says it.
    work : int32 [num_work, 2 or 3] where kernels read it, or None
    work_columns : int
        0 without ``work``.
    splits : int32 [batch, 2] where kernels read it, or None
        Number of splits of each sequence, and its first partial result.
    num_partials : int
        Rows [heads, head_dim_v] of partial results; 0 where no sequence is split.
    max_splits : int
        The most splits of a sequence.
    """

    num_items: int
    cu_seqlens_q: Any = None
    num_splits: int = 1
    work: Any = None
    work_columns: int = 0
    splits: Any = None
    num_partials: int = 0
    max_splits: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The lists of a schedule, on the host."""

    work: NDArray[np.int32]  # [num_work, 2 or 3], those with the most keys first
    splits: NDArray[np.int32] | None  # [batch, 2]
    num_splits: int
    num_partials: int
    max_splits: int

    def on(self, executor: Executor, cu_seqlens_q: Any) -> Schedule:
        """Return the schedule, after one copy to where the kernels read."""
        given = self.work if self.splits is None else np.concatenate([self.splits.ravel(), self.work.ravel()])
        copied = executor.put(given, np.int32)
        work = copied if self.splits is None else copied[self.splits.size :].reshape(self.work.shape)
        return Schedule(
            num_items=self.work.shape[0] * self.num_splits,
            cu_seqlens_q=cu_seqlens_q,
            num_splits=self.num_splits,
            work=work,
            work_columns=self.work.shape[1],
            splits=None if self.splits is None else copied[: self.splits.size].reshape(self.splits.shape),
            num_partials=self.num_partials,
            max_splits=self.max_splits,
        )


def schedule(problem: DecodeProblem, config: FlashDecodeConfig) -> Schedule:
    """Make the work items of a call."""
    if problem.plan is not None:
        return problem.plan.schedule(problem, config)
    extents, bounds = problem.extents, problem.options.bounds
    most = extents.seqlen_q if problem.max_seqlen_q is None else problem.max_seqlen_q
    itemsize = 8 if problem.accumulator is np.float64 else 4
    tokens, heads, model = _shape(config, problem.kv_format, extents, most, itemsize, *problem.executor.machine)
    if problem.host_seqlens_q is None or problem.host_seqlens_k is None:
        num_splits = problem.num_splits
        if num_splits is None:
            num_blocks = most_blocks(extents.batch, extents.seqlen_q, extents.packed, tokens)
            tiles = splits.most_tiles(tokens, extents.seqlen_k, config.block_n, bounds)
            num_splits = splits.uniform(model, heads * num_blocks, tiles)
        if not extents.packed or problem.host_seqlens_q is None:
            return even_schedule(problem, tokens, num_splits)
        seqlens_k = np.full(extents.batch, extents.seqlen_k)
    else:
        # The keys of a tile are as one: a plan is good until a sequence grows by a tile.
        num_splits, seqlens_k = problem.num_splits, -(-problem.host_seqlens_k // config.block_n) * config.block_n
    if num_splits is not None and not extents.packed:
        return even_schedule(problem, tokens, num_splits)
    seqlens_q = problem.host_seqlens_q
    known = (seqlens_q.tobytes(), seqlens_k.tobytes())
    found = _find(model, bounds, tokens, heads, extents.packed, num_splits, *known)
    if isinstance(found, int):
        return even_schedule(problem, tokens, found)
    return found.on(problem.executor, problem.cu_seqlens_q)


@lru_cache(maxsize=1024)
def _shape(
    config: FlashDecodeConfig, kv_format: KVFormat, extents: Extents, most: int, itemsize: int, arch: str, num_sms: int
) -> tuple[int, int, CostModel]:
    """Return query tokens of a block, CTAs for each block, and the model, for ``most`` queries of a sequence."""
    group = extents.heads_per_kv_head
    heads = extents.num_kv_heads * config.head_blocks(group)
    heads *= compiled_dims(extents.head_dim, extents.head_dim_v)[2]  # as many CTAs share a row of the result
    rows = min(config.block_m, most * group)
    dims = extents.head_dim, extents.head_dim_v
    model = cost_model(config, kv_format, *dims, rows, itemsize, arch=arch, num_sms=num_sms)
    return config.tokens_per_block(group), heads, model


def most_blocks(batch: int, seqlen_q: int, packed: bool, tokens: int) -> int:
    """Return how many row blocks queries may need; ``seqlen_q`` are those of all sequences where they are packed."""
    return seqlen_q // tokens + min(batch, seqlen_q) if packed else batch * -(-seqlen_q // tokens)


def even_schedule(problem: DecodeProblem, tokens: int, num_splits: int) -> Schedule:
    """Cut each sequence into as many splits as any other. The grid does not depend on any length."""
    made = _even(problem.extents, tokens, num_splits)
    if not problem.extents.packed:
        return made
    starts = problem.cu_seqlens_q
    work = device_work_list(problem.executor, starts, problem.extents.seqlen_q, tokens, problem.max_seqlen_q)
    return replace(made, cu_seqlens_q=starts, work=work, work_columns=2)


@lru_cache(maxsize=1024)
def _even(extents: Extents, tokens: int, num_splits: int) -> Schedule:
    total = extents.seqlen_q if extents.packed else extents.batch * extents.seqlen_q
    return Schedule(
        num_items=num_splits * most_blocks(extents.batch, extents.seqlen_q, extents.packed, tokens),
        num_splits=num_splits,
        num_partials=check_partials(total * num_splits) if num_splits > 1 else 0,
        max_splits=num_splits,
    )


def lists_of(blocks: Blocks, seqlens_q: NDArray[np.int64], num_splits: int | NDArray[np.int64]) -> Lists:
    """List the work of row blocks, in splits of every sequence alike or of each its own."""
    if isinstance(num_splits, int):
        order = np.argsort(-blocks.tiles, kind="stable")
        work = np.stack([blocks.batch_idx[order], blocks.block[order]], axis=1).astype(np.int32)
        num_partials = int(seqlens_q.sum()) * num_splits if num_splits > 1 else 0
        return Lists(work, None, num_splits, check_partials(num_partials), num_splits)
    each = num_splits[blocks.batch_idx]
    block = np.repeat(np.arange(each.size), each)
    split_idx = np.arange(block.size) - np.repeat(np.cumsum(each) - each, each)
    order = np.argsort(-(blocks.tiles / each)[block], kind="stable")
    block, split_idx = block[order], split_idx[order]
    work = np.stack([blocks.batch_idx[block], blocks.block[block], split_idx], axis=1).astype(np.int32)
    partials = np.where(num_splits > 1, num_splits * seqlens_q, 0)
    num_partials = check_partials(int(partials.sum()))
    first = np.cumsum(partials) - partials
    return Lists(work, np.stack([num_splits, first], axis=1).astype(np.int32), 1, num_partials, int(num_splits.max()))


@lru_cache(maxsize=256)
def _find(
    model: CostModel,
    bounds: Bounds,
    tokens: int,
    heads: int,
    packed: bool,
    num_splits: int | None,
    seqlens_q: bytes,
    seqlens_k: bytes,
) -> int | Lists:
    """Find the lists for lengths, or the number of splits of all where it needs none."""
    queries, keys = np.frombuffer(seqlens_q, np.int64), np.frombuffer(seqlens_k, np.int64)
    blocks = splits.blocks_of(queries, keys, tokens, model.block_n, bounds)
    found: int | NDArray[np.int64] | None = num_splits
    if found is None:
        found = splits.for_lengths(model, blocks, queries.size, heads, listed=packed)
    if isinstance(found, int) and not packed:
        return found
    return lists_of(blocks, queries, found)


def check_partials(num_partials: int) -> int:
    """Check the number of partial results, which kernels count in 32 bits. Raises `ArgumentError`."""
    if num_partials > MAX_PARTIALS:
        raise ArgumentError(
            f"num_splits times the query tokens is {num_partials}; at most {MAX_PARTIALS} partial results are allowed"
        )
    return num_partials
