"""plan_decode: any plan gives right results for any lengths, its lists are complete, its workspace is exact."""

from __future__ import annotations

import threading
from contextvars import copy_context

import numpy as np
import pytest
from cached_calls import assert_right
from hypothesis import given
from hypothesis import strategies as st
from simulated_cupy import installed

import cuattn
from cuattn import errors
from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.decode import splits
from cuattn.ops.decode.cost import CostModel
from cuattn.ops.decode.schedule import lists_of
from cuattn.runtime import executor as executors
from cuattn.testing import assert_decode_close, assert_paged_varlen_close
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.strategies import examples

F16 = np.dtype(np.float16)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": F16}
CAPACITY = 400


def problem(seqlen_q=1, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, 4, 32)).astype(F16)
    return (q, *(rng.standard_normal((batch, CAPACITY, 2, 32)).astype(F16) for _ in "kv"))


def attend(executor, arrays, seqlens_k, **options):
    out, lse = cuattn.decode_attention(*map(executor.array, arrays), seqlens_k, return_lse=True, **options)
    options.pop("plan", None)
    options.pop("workspace", None)
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert_decode_close(out, *arrays, seqlens_k, lse=lse, **options)
    return out, lse


# --- results ---------------------------------------------------------------------------------------------------------


@examples(14)
@given(data=st.data())
def test_any_plan_for_any_lengths(executor, data):
    """Also for lengths that it was not made for, as those of the next steps."""
    lengths = st.lists(st.integers(0, CAPACITY), min_size=3, max_size=3)
    options = data.draw(st.sampled_from(({}, {"window": (70, 0)}, {"sinks": np.array([0.5, -1, 2, 0], np.float32)})))
    seqlen_q = data.draw(st.sampled_from((1, 3, 20)))
    planned = data.draw(st.sampled_from(("lengths", "number", "grid")))
    plan = cuattn.plan_decode(
        data.draw(lengths),
        seqlen_q=seqlen_q,
        window=options.get("window"),
        num_splits=data.draw(st.integers(1, 9)) if planned == "number" else None,
        max_seqlen_k=CAPACITY,
        fixed_grid=planned == "grid",
        **HEADS,
    )
    arrays = problem(seqlen_q)
    for _ in range(2):
        attend(executor, arrays, data.draw(lengths), plan=plan, **options)


def test_packed_queries(executor):
    """Of a batch with prefills; a plan with a fixed grid also for other lengths of the queries."""
    rng = np.random.default_rng(1)
    pages = [rng.standard_normal((40, 16, 2, 32)).astype(F16) for _ in "kv"]
    q = rng.standard_normal((45, 4, 32)).astype(F16)
    tables = rng.permutation(40).reshape(4, 10).astype(np.int32)
    seqlens_k = [160, 33, 7, 50]
    for fixed_grid in (False, True):
        plan = cuattn.plan_decode(
            [160, 3, 0, 9], cu_seqlens_q=[0, 40, 41, 41, 45], max_seqlen_k=160, fixed_grid=fixed_grid, **HEADS
        )
        for starts in ([0, 40, 41, 41, 45], [0, 1, 2, 30, 45])[: 1 + fixed_grid]:
            arrays = [*map(executor.array, (q, *pages, tables)), starts, seqlens_k]
            out, lse = cuattn.paged_attention_varlen(*arrays, plan=plan, return_lse=True)
            out, lse = executor.numpy(out), executor.numpy(lse)
            assert_paged_varlen_close(out, q, *pages, tables, np.array(starts), seqlens_k, lse=lse)
    plan = cuattn.plan_decode([160, 3, 0, 9], cu_seqlens_q=[0, 40, 41, 41, 45], **HEADS)
    with pytest.raises(errors.ArgumentError, match=r"plan is for 40 queries of sequence 0; cu_seqlens_q gives it 1"):
        cuattn.paged_attention_varlen(*map(executor.array, (q, *pages, tables)), starts, seqlens_k, plan=plan)


def test_workspace_is_exact_to_the_byte(executor):
    arrays, seqlens_k = problem(), [CAPACITY, 5, 170]
    plan = cuattn.plan_decode(seqlens_k, **HEADS)
    assert plan.num_splits.max() > 1 and plan.num_splits.min() == 1
    size = plan.workspace_size()
    assert size == sum(n for n in plan.num_splits.tolist() if n > 1) * 4 * (32 + 2) * 4
    workspace = executor.guarded((size,), np.uint8)
    first = attend(executor, arrays, seqlens_k, plan=plan, workspace=workspace.array)
    workspace.check()
    for x, y in zip(attend(executor, arrays, seqlens_k, plan=plan), first, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(errors.ShapeError, match=rf"workspace has {size - 1} bytes; {size} are needed"):
        cuattn.decode_attention(
            *map(executor.array, arrays), seqlens_k, plan=plan, workspace=executor.xp.empty(size - 1, np.uint8)
        )


def test_a_fixed_grid_does_not_depend_on_lengths(executor, monkeypatch):
    shapes = []
    start = executors.Executor.launch

    def record(self, kernel, grid, block, args, smem_bytes=0):
        shapes.append((kernel.entry, tuple(grid), tuple(block), smem_bytes))
        start(self, kernel, grid, block, args, smem_bytes)

    monkeypatch.setattr(executors.Executor, "launch", record)
    plan = cuattn.plan_decode(batch=3, max_seqlen_k=CAPACITY, fixed_grid=True, **HEADS)
    arrays, launched = problem(), []
    for seqlens_k in ([CAPACITY] * 3, [1, 0, 200]):
        attend(executor, arrays, seqlens_k, plan=plan)
        launched.append(list(shapes))
        shapes.clear()
    assert launched[0] == launched[1]
    assert launched[0][0][1] == (plan.num_ctas,)


# --- lists -----------------------------------------------------------------------------------------------------------


@examples(60)
@given(data=st.data())
def test_lists_cover_every_split_of_every_block_once(data):
    """And no two partial results are in one place."""
    batch = data.draw(st.integers(1, 6))
    seqlens_q, seqlens_k = (
        np.array(data.draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch))) for most in (40, 3000)
    )
    tokens = data.draw(st.sampled_from((1, 4, 16)))
    bounds = data.draw(st.sampled_from((Bounds(right=0), Bounds(), Bounds(100, 0), Bounds(right=0, from_end=False))))
    model = CostModel(data.draw(st.integers(1, 200)), data.draw(st.integers(1, 4)), 64, 1.0, 3.0, 0.1, 1.0)
    blocks = splits.blocks_of(seqlens_q, seqlens_k, tokens, 64, bounds)
    chosen = splits.for_lengths(model, blocks, batch, data.draw(st.integers(1, 8)), listed=True)
    lists = lists_of(blocks, seqlens_q, chosen)
    each = np.broadcast_to(chosen, batch)
    assert each.min() >= 1
    expected = [
        (b, block, split)
        for b in range(batch)
        for block in range(-(-seqlens_q[b] // tokens))
        for split in range(each[b])
    ]
    if lists.splits is None:
        work = [(*item, split) for item in lists.work.tolist() for split in range(lists.num_splits)]
        assert lists.num_partials == (seqlens_q.sum() * chosen if chosen > 1 else 0)
    else:
        work = [tuple(item) for item in lists.work.tolist()]
        np.testing.assert_array_equal(lists.splits[:, 0], each)
        places = [
            first + i for (count, first), n in zip(lists.splits, seqlens_q, strict=True) if count > 1
            for i in range(count * n)
        ]  # fmt: skip
        assert sorted(places) == list(range(lists.num_partials))
    assert sorted(work) == expected


@examples(40)
@given(data=st.data())
def test_blocks_see_the_tiles_that_a_loop_counts(data):
    seqlens_q, seqlens_k = ([data.draw(st.integers(0, most)) for _ in range(3)] for most in (9, 90))
    tokens, block_n = data.draw(st.sampled_from((1, 3))), data.draw(st.sampled_from((4, 16)))
    left, right = data.draw(st.integers(0, 40)), data.draw(st.sampled_from((0, 5, 2**31 - 1)))
    found = splits.blocks_of(np.array(seqlens_q), np.array(seqlens_k), tokens, block_n, Bounds(left, right))
    for b, block, tiles in zip(*(x.tolist() for x in found), strict=True):
        last = min((block + 1) * tokens, seqlens_q[b]) - 1
        offset = seqlens_k[b] - seqlens_q[b]
        seen = [
            j // block_n for j in range(seqlens_k[b]) if block * tokens + offset - left <= j <= last + offset + right
        ]
        assert tiles == (seen[-1] - seen[0] + 1 if seen else 0)
        assert tiles <= splits.most_tiles(tokens, seqlens_k[b], block_n, Bounds(left, right))


@pytest.mark.parametrize("num_sequences", (1, 3, 40))
def test_chosen_splits_are_about_the_best(num_sequences):
    """Of equal ones: against every number. Of others: against every size of a chunk."""
    model = CostModel(132, 3, 64, 1.0, 3.0, 0.1, 1.0)
    rng = np.random.default_rng(num_sequences)
    for _ in range(20):
        tiles = int(rng.integers(1, 300))
        counts = np.arange(1, tiles + 1)
        times = model.even(8 * num_sequences * counts, -(-tiles // counts), counts > 1)
        assert times[splits.uniform(model, 8 * num_sequences, tiles) - 1] <= 1.04 * times.min()
        lengths = rng.integers(1, 20000, num_sequences)
        blocks = splits.blocks_of(np.ones(num_sequences, np.int64), lengths, 4, 64, Bounds(right=0))
        chosen = splits.for_lengths(model, blocks, num_sequences, 8, listed=True)
        chunks = np.arange(1, blocks.tiles.max() + 1)
        choices = np.minimum(-(-blocks.tiles // chunks[:, None]), splits.MAX_SPLITS)
        time = splits.expected(model, blocks, 8, chosen, num_sequences)
        assert time <= 1.1 * splits.time_of(model, blocks, 8, choices).min()


# --- on a device -----------------------------------------------------------------------------------------------------


def test_lists_are_copied_to_a_device_once(monkeypatch):
    arrays, seqlens_k = problem(), [CAPACITY, 5, 170]
    with installed(monkeypatch) as cupy:
        waits = []
        cupy.cuda.get_current_stream = lambda: type("Stream", (), {"synchronize": lambda self: waits.append(1)})()
        plan = cuattn.plan_decode(seqlens_k, num_sms=132, **HEADS)
        on_device = [cupy.array(x) for x in (*arrays, np.array(seqlens_k, np.int32))]
        with pytest.raises(errors.ArgumentError, match="seqlens_k is on a device"):
            cuattn.plan_decode(on_device[3], **HEADS)
        uploads = []
        for _ in range(3):
            before = cupy.num_uploads
            out = cuattn.decode_attention(*on_device, plan=plan)
            uploads.append(cupy.num_uploads - before)
        assert uploads == [1, 0, 0] and len(waits) == 1 and cupy.num_synchronizations == 0
        assert_decode_close(out.get(), *arrays, seqlens_k)
        assert cuattn.plan_decode(on_device[3], max_seqlen_k=CAPACITY, fixed_grid=True, **HEADS).batch == 3


def test_threads_share_a_plan():
    arrays, seqlens_k = problem(), [CAPACITY, 5, 170]
    plan = cuattn.plan_decode(seqlens_k, **HEADS)
    results = [None] * 4

    def run(i):
        results[i] = cuattn.decode_attention(*arrays, seqlens_k, plan=plan)

    threads = [threading.Thread(target=copy_context().run, args=(run, i)) for i in range(4)]  # with these checkers
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, results[0])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_plan_of_another_shape():
    arrays, seqlens_k = problem(), [9, 5, 0]
    with pytest.raises(errors.ArgumentError, match="plan is 3; a result of"):
        cuattn.decode_attention(*arrays, seqlens_k, plan=3)
    plan = cuattn.plan_decode(seqlens_k, **HEADS)
    with pytest.raises(errors.ArgumentError, match="num_splits is 2 beside a plan"):
        cuattn.decode_attention(*arrays, seqlens_k, plan=plan, num_splits=2)
    for changed, named in (
        ({"seqlens_k": [1, 2]}, "batch = 2; the call has 3"),
        ({"seqlen_q": 2}, "query tokens = 6; the call has 3"),
        ({"num_heads": 8}, "heads = 8; the call has 4"),
        ({"num_kv_heads": 1}, "kv_heads = 1; the call has 2"),
        ({"head_dim": 16}, "head_dim = 16; the call has 32"),
        ({"head_dim_v": 16}, "head_dim_v = 16; the call has 32"),
        ({"dtype": np.float32}, "dtype = float32; the call has float16"),
        ({"cu_seqlens_q": [0, 1, 2, 3]}, "packed queries = True; the call has False"),
    ):
        other = cuattn.plan_decode(**{"seqlens_k": seqlens_k, **HEADS, **changed})
        with pytest.raises(errors.ArgumentError, match=named):
            cuattn.decode_attention(*arrays, seqlens_k, plan=other)


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (errors.ArgumentError, "seqlens_k and max_seqlen_k are both None", {}),
        (errors.ArgumentError, "batch is None", {"max_seqlen_k": 5}),
        (errors.ArgumentError, r"seqlens_k\[1\] is -1", {"seqlens_k": [3, -1]}),
        (errors.ArgumentError, r"seqlens_k\[1\] is 9; 0 to 5", {"seqlens_k": [3, 9], "max_seqlen_k": 5}),
        (errors.ShapeError, "3 by batch but 2 by seqlens_k", {"seqlens_k": [3, 9], "batch": 3}),
        (errors.ShapeError, r"seqlens_k has shape \(1, 1\)", {"seqlens_k": [[3]]}),
        (errors.DTypeError, "seqlens_k has dtype float64", {"seqlens_k": [0.5]}),
        (errors.ArgumentError, "cu_seqlens_q descends", {"seqlens_k": [3, 9], "cu_seqlens_q": [0, 2, 1]}),
        (errors.ArgumentError, "seqlen_q is 2 beside", {"seqlens_k": [3], "cu_seqlens_q": [0, 2], "seqlen_q": 2}),
        (errors.ArgumentError, "num_heads is 5; a multiple", {"seqlens_k": [3], "num_heads": 5}),
        (errors.ArgumentError, "head_dim is 513", {"seqlens_k": [3], "head_dim": 513}),
        (errors.DTypeError, "dtype is 'int8'", {"seqlens_k": [3], "dtype": "int8"}),
        (errors.DTypeError, "they do not go together", {"seqlens_k": [3], "kv_format": "float32"}),
        (errors.ArgumentError, "kv_format is 'fp8'", {"seqlens_k": [3], "kv_format": "fp8"}),
        (errors.ArgumentError, "num_splits is 0", {"seqlens_k": [3], "num_splits": 0}),
        (errors.ArgumentError, "num_sms is 0", {"seqlens_k": [3], "num_sms": 0}),
        (errors.ArgumentError, "fixed_grid is 1", {"seqlens_k": [3], "fixed_grid": 1}),
        (errors.ArgumentError, "window is 5", {"seqlens_k": [3], "window": 5}),
        (errors.ArrayTypeError, "array_module is 3", {"seqlens_k": [3], "array_module": 3}),
    ],
)
def test_bad_arguments(error, named, options):
    with pytest.raises(error, match=named):
        cuattn.plan_decode(**HEADS | options)


def test_a_plan_with_splits_of_their_own(executor, form):
    """Three sequences, one of which is finished at once; partial results of the others lie behind one another."""
    lengths = (170, 5, 400)
    problem = cached_problem(np.random.default_rng(7), lengths=lengths, seqlens_q=1, heads=(4, 2), page_size=16, **form)
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": form["dtype"]}
    plan = cuattn.plan_decode(lengths, kv_format=form.get("kv_format"), **shape)
    first, second, third = plan.num_splits.tolist()
    assert 1 == second < min(first, third)
    assert_right(executor, problem, plan=plan)
