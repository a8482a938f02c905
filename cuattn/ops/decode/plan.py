"""Planning decode calls on the host, once for all layers of a model.

* Tri Dao, Daniel Haziza, Francisco Massa and Grigory Sizov, "Flash-Decoding for long-context inference", 2023.
* Zihao Ye et al., "FlashInfer: efficient and customizable attention engine for LLM inference serving", 2025
  (arXiv:2501.01005).
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ArgumentError
from cuattn.messages import shown
from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import PlanOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.decode import plan_arguments, splits, workspace
from cuattn.ops.decode.config import FlashDecodeConfig, compiled_dims, select
from cuattn.ops.decode.cost import CostModel, cost_model
from cuattn.ops.decode.lengths import check_num_splits
from cuattn.ops.decode.plan_arguments import PlanLengths
from cuattn.ops.decode.schedule import Lists, Schedule, check_partials, even_schedule, lists_of, most_blocks
from cuattn.runtime.small_arrays import check_flag

if TYPE_CHECKING:
    from cuattn.ops.decode.problem import DecodeProblem
    from cuattn.runtime.executor import Executor

__all__ = ["DecodePlan", "PlanEstimate", "check_plan", "plan_decode"]


@dataclass(frozen=True, slots=True)
class PlanEstimate:
    """What a plan is expected to cost: docs/theory/flash-decoding.md. No measurement.

    Attributes
    ----------
    num_ctas : int
        CTAs that are started.
    num_slots : int
        CTAs that run at the same time: multiprocessors times the CTAs that fit on one.
    time : float
        The unit is the time in which a multiprocessor reads one tile of keys and values.
    least_time : float
        If all that were done was reading the keys and values.
    """

    num_ctas: int
    num_slots: int
    time: float
    least_time: float

    @property
    def waves(self) -> float:
        """Number of times that the device is filled with CTAs."""
        return self.num_ctas / self.num_slots

    @property
    def efficiency(self) -> float:
        """Ratio of the least time to the expected one."""
        return self.least_time / self.time if self.time else 1.0


class _Copies:
    """Copies of schedules whose lists are where kernels read them, made once for each device and kernel shape."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: dict[tuple[Executor, int, int], Schedule] = {}


@dataclass(frozen=True, eq=False, repr=False)
class DecodePlan:
    """How the work of decode calls is divided; made by `plan_decode`. Immutable, and safe to use from several threads.

    A plan is for a shape: with other lengths of the keys than those it was made for, results are as right, only not in
    the least time.

    Attributes
    ----------
    batch, num_tokens : int
        Sequences, and query tokens of all of them.
    packed : bool
        For `paged_attention_varlen`, not for a batch of equal numbers of queries.
    num_heads, num_kv_heads, head_dim, head_dim_v : int
    dtype : numpy.dtype
        Of q.
    num_splits : int, or read-only int64 array [batch]
        Parts that the keys go into: of every sequence, or of each.
    fixed_grid : bool
        Whether nothing that is launched depends on a length.
    num_partials : int
        Partial results: splits times query tokens, of the sequences that are split.
    estimate : PlanEstimate
    """

    batch: int
    num_tokens: int
    packed: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: np.dtype[Any]
    num_splits: int | NDArray[np.int64]
    fixed_grid: bool
    num_partials: int
    estimate: PlanEstimate
    _lengths: PlanLengths
    _bounds: Bounds
    _copies: _Copies = field(default_factory=_Copies)

    @property
    def num_ctas(self) -> int:
        """Number of CTAs that are started; the merge, where something is split, is a kernel of its own."""
        return self.estimate.num_ctas

    def workspace_size(self) -> int:
        """Return the bytes of ``workspace=`` of a call with this plan; 0 where no sequence is split."""
        itemsize = 8 if self.dtype == np.float64 else 4
        return workspace.nbytes(self.num_partials, self.num_heads, self.head_dim_v, itemsize)

    def __repr__(self) -> str:
        if isinstance(self.num_splits, int):
            num_splits = str(self.num_splits)
        else:
            num_splits = f"{self.num_splits.min()} to {self.num_splits.max()}"
        return (
            f"DecodePlan({self.batch} sequences, {self.num_tokens} tokens, {num_splits} splits, {self.num_ctas} CTAs, "
            f"{self.workspace_size()} bytes)"
        )

    def check(self, problem: DecodeProblem) -> None:
        """Raise `ArgumentError` if a call is not of the shape that the plan is for."""
        extents = problem.extents
        tokens = extents.seqlen_q if extents.packed else extents.batch * extents.seqlen_q
        for what, planned, given in (
            ("packed queries", self.packed, extents.packed),
            ("batch", self.batch, extents.batch),
            ("query tokens", self.num_tokens, tokens),
            ("heads", self.num_heads, extents.num_heads),
            ("kv_heads", self.num_kv_heads, extents.num_kv_heads),
            ("head_dim", self.head_dim, extents.head_dim),
            ("head_dim_v", self.head_dim_v, extents.head_dim_v),
            ("dtype", self.dtype, problem.dtype),
        ):
            if planned != given:
                raise ArgumentError(f"plan is for {what} = {planned}; the call has {given}")
        queries = problem.host_seqlens_q
        if self.packed and not self.fixed_grid and queries is not None:
            differ = queries != self._lengths.seqlens_q
            if differ.any():
                at = int(np.argmax(differ))
                raise ArgumentError(
                    f"plan is for {self._lengths.seqlens_q[at]} queries of sequence {at}; cu_seqlens_q gives it "
                    f"{queries[at]} (with fixed_grid=True, a plan is for any)"
                )

    def schedule(self, problem: DecodeProblem, config: FlashDecodeConfig) -> Schedule:
        """Return the work items of a call that `check` has passed."""
        tokens = config.tokens_per_block(problem.group)
        if isinstance(self.num_splits, int) and (self.fixed_grid or not self.packed):
            return even_schedule(problem, tokens, self.num_splits)
        made = self._schedule_on(problem.executor, tokens, config.block_n)
        # What the host has compared is what the plan has; what it has not seen must not lead astray.
        return made if problem.host_seqlens_q is None else replace(made, cu_seqlens_q=problem.cu_seqlens_q)

    def _schedule_on(self, executor: Executor, tokens: int, block_n: int) -> Schedule:
        key = executor, tokens, block_n
        made = self._copies.made.get(key)
        if made is None:
            with self._copies.lock:
                made = self._copies.made.get(key)
                if made is None:
                    made = self._copies.made[key] = self._copy_to(executor, tokens, block_n)
        return made

    def _copy_to(self, executor: Executor, tokens: int, block_n: int) -> Schedule:
        queries = self._lengths.seqlens_q
        starts = executor.put(np.concatenate([[0], np.cumsum(queries)]), np.int32) if self.packed else None
        made = self._lists(tokens, block_n).on(executor, starts)
        if executor.name == "cuda":  # once: later calls on other streams find the lists there
            with executor.on_device():
                sys.modules["cupy"].cuda.get_current_stream().synchronize()
        return made

    def _lists(self, tokens: int, block_n: int) -> Lists:
        lengths = self._lengths
        blocks = splits.blocks_of(lengths.seqlens_q, lengths.seqlens_k, tokens, block_n, self._bounds)
        return lists_of(blocks, lengths.seqlens_q, self.num_splits)


def check_plan(plan: Any, problem: DecodeProblem) -> DecodePlan | None:
    """Return the plan of a call, or None. Raises `ArgumentError` if it is none, or one for another shape."""
    if plan is None:
        return None
    if not isinstance(plan, DecodePlan):
        raise ArgumentError(f"plan is {shown(plan)}; a result of cuattn.plan_decode or None is allowed")
    if problem.num_splits is not None:
        raise ArgumentError(f"num_splits is {problem.num_splits} beside a plan, which says it; leave one of them out")
    plan.check(problem)
    return plan


_OPERATION = Operation("plan_decode", "plan")


@takes_options(_OPERATION, before="num_splits")
def plan_decode(
    seqlens_k: Any = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    head_dim_v: int | None = None,
    kv_format: str | None = None,
    batch: int | None = None,
    seqlen_q: int = 1,
    cu_seqlens_q: Any = None,
    max_seqlen_k: int | None = None,
    num_splits: int | None = None,
    fixed_grid: bool = False,
    num_sms: int | None = None,
    array_module: Any = None,
    **options: Unpack[PlanOptions],
) -> DecodePlan:
    """Divide the work of decode calls, once for every layer of a model: pass the result as ``plan=``.

    The keys of a sequence go into splits, each the work of CTAs of its own, whose results a second kernel merges. How
    many are worth their cost follows from a model of a GPU that reads keys and values as fast as its memory gives them:
    multiprocessors, CTAs that fit on one, the tiles of every sequence, what starting a CTA and merging take. All of it
    happens on the host; nothing is read from a device or launched. Calls without a plan do the same by themselves; a
    plan saves them the search, says how large a workspace must be, and can fix the grid. Options are to be as the calls
    will have them: they bound the keys that are read.

    Any plan gives right results for any lengths of the keys: which keys a split has is computed on the device, from the
    lengths that are there. A plan for a contiguous cache is one for pages of any size.

    Parameters
    ----------
    seqlens_k : integers [batch], optional
        Keys of each sequence, as for `cuattn.decode_attention`; a list or a NumPy array. Sequences of different lengths
        then get splits of about the same size, the longest first. An array on a device is not read.
    num_heads, num_kv_heads, head_dim : int
    head_dim_v : int, optional
        ``head_dim`` by default.
    dtype : dtype
        Of q: float16, bfloat16, float32 or float64.
    kv_format : str, optional
        Of the cache, as for `cuattn.decode_attention`; ``dtype`` by default. It decides the bytes of a tile, no more.
    batch : int, optional
        Needed where neither ``seqlens_k`` nor ``cu_seqlens_q`` says it.
    seqlen_q : int
        Query tokens of each sequence.
    cu_seqlens_q : integers [batch + 1], optional
        A list or a NumPy array: the plan is for `cuattn.paged_attention_varlen`.
    max_seqlen_k : int, optional
        The longest sequence to expect. Needed where the host does not know ``seqlens_k``.
    causal : {True, False, "bottom_right", "top_left"}
        As for `cuattn.decode_attention`.
    **options
        As for `cuattn.attention`.
    num_splits : int, optional
        So many splits of every sequence, instead of as many as are expected to be the fastest.
    fixed_grid : bool
        Launch the same whatever the lengths are, as a CUDA graph needs it: as many splits for each sequence, by
        ``max_seqlen_k`` (by default the longest of ``seqlens_k``), and no lists. Packed queries may be spread over the
        sequences differently from call to call.
    num_sms : int, optional
        Multiprocessors to plan for. By default those of the device; for NumPy arrays the 132 of an H200.
    array_module : module, optional
        ``cupy`` to plan for the current GPU. By default ``numpy``, or where ``seqlens_k`` lies.

    Returns
    -------
    DecodePlan
        Its lists are copied to a device by the first call there that needs them, which waits for the copy: make it
        before a graph is captured, or fix the grid, which needs none.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError
        Arguments of the wrong kind, dtype or shape, or numbers of sequences that differ.
    ArgumentError
        An extent or a length out of range; ``seqlens_k`` on a device without ``max_seqlen_k``; ``cu_seqlens_q`` on a
        device; another value of an option than those above.

    References
    ----------
    Dao et al., "Flash-Decoding for long-context inference", 2023; Ye et al., "FlashInfer", 2025 (arXiv:2501.01005).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> plan = cuattn.plan_decode([100, 60000], num_heads=32, num_kv_heads=8, head_dim=128, dtype=np.float16)
    >>> plan.num_splits.tolist(), plan.workspace_size()
    ([1, 20], 332800)
    >>> cuattn.plan_decode(batch=2, max_seqlen_k=60000, num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16",
    ...                    fixed_grid=True).num_splits
    9
    """
    _OPERATION.refuse_unknown(options)
    fixed_grid = check_flag("fixed_grid", fixed_grid)
    executor = plan_arguments.executor_of(array_module, seqlens_k)
    num_heads, num_kv_heads, head_dim, head_dim_v = plan_arguments.check_heads(
        num_heads, num_kv_heads, head_dim, head_dim_v
    )
    dtype, row = plan_arguments.check_format(dtype, kv_format)
    lengths = plan_arguments.check_lengths(executor, seqlens_k, batch, seqlen_q, cu_seqlens_q, max_seqlen_k)
    num_splits = check_num_splits(num_splits)
    shape = lengths.seqlens_q.size, num_heads, None, None
    bounds = _OPERATION.check(options, executor, logits_shape=shape, num_kv_heads=num_kv_heads, dtype=dtype).bounds
    if fixed_grid:
        lengths = replace(lengths, seqlens_k=np.full_like(lengths.seqlens_k, lengths.max_seqlen_k))
    group = num_heads // num_kv_heads
    rows = group * int(lengths.seqlens_q.max(initial=1))
    bucket, columns, column_blocks = compiled_dims(head_dim, head_dim_v)
    limit = executor.smem_limit_bytes
    config = select(dtype, row, bucket, columns, rows_per_kv_head=rows, smem_limit_bytes=limit)
    arch, sms = executor.machine
    if num_sms is not None:
        sms = plan_arguments.check_extent("num_sms", num_sms, 1)
    itemsize = 8 if dtype == np.float64 else 4
    model = cost_model(config, row, head_dim, head_dim_v, min(rows, config.block_m), itemsize, arch=arch, num_sms=sms)
    heads = num_kv_heads * config.head_blocks(group) * column_blocks
    chosen, estimate = _choose(model, lengths, bounds, config.tokens_per_block(group), heads, num_splits, fixed_grid)
    each = np.broadcast_to(chosen, lengths.seqlens_q.shape)
    if isinstance(chosen, np.ndarray):
        chosen.flags.writeable = False
    return DecodePlan(
        batch=lengths.seqlens_q.size,
        num_tokens=int(lengths.seqlens_q.sum()),
        packed=lengths.packed,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        num_splits=chosen,
        fixed_grid=fixed_grid,
        num_partials=check_partials(int(np.where(each > 1, each * lengths.seqlens_q, 0).sum())),
        estimate=estimate,
        _lengths=lengths,
        _bounds=bounds,
    )


def _choose(
    model: CostModel,
    lengths: PlanLengths,
    bounds: Bounds,
    tokens: int,
    heads: int,
    num_splits: int | None,
    fixed_grid: bool,
) -> tuple[int | NDArray[np.int64], PlanEstimate]:
    """Choose the splits; returns them and what they are expected to cost."""
    seqlens_q, batch = lengths.seqlens_q, lengths.seqlens_q.size
    blocks = splits.blocks_of(seqlens_q, lengths.seqlens_k, tokens, model.block_n, bounds)
    chosen: int | NDArray[np.int64] | None = num_splits
    num_blocks = blocks.tiles.size
    if fixed_grid and lengths.packed:
        num_blocks = most_blocks(batch, int(seqlens_q.sum()), True, tokens)
    if chosen is None and fixed_grid:
        tiles = splits.most_tiles(tokens, lengths.max_seqlen_k, model.block_n, bounds)
        chosen = splits.uniform(model, heads * num_blocks, tiles)
    elif chosen is None:
        chosen = splits.for_lengths(model, blocks, batch, heads, listed=True)
    num_ctas = heads * (num_blocks * chosen if isinstance(chosen, int) else int(chosen[blocks.batch_idx].sum()))
    time = splits.expected(model, blocks, heads, chosen, batch)
    return chosen, PlanEstimate(num_ctas, model.num_slots, time, model.least(heads * float(blocks.tiles.sum())))
