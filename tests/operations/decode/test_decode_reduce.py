"""The kernel that merges splits: its variants, what it leaves alone, and what it does not read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from merge_parts import F16, F32, F64, lses_of, outs_of

from cuattn import compile as kernel_compiler
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.options import Options
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.ops.decode import reduce
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS
from cuattn.ops.decode.params import pack_decode
from cuattn.ops.decode.schedule import Schedule
from cuattn.ops.merge import launch as merge_launch
from cuattn.ops.operand import Operand
from cuattn.runtime.executor import executor_for
from cuattn.testing.arrays import Layout
from cuattn.testing.merging import assert_merge_close

HEADS, HEAD_DIM = 3, 40


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_no_variant_spills(arch):
    for constants in reduce.variants():
        binary = kernel_compiler.build("attention_decode_reduce", constants, arch=arch, kind="cubin")
        for used in binary.resources.values():
            assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, (constants, used)


def merge(
    executor, seqlens_q, num_splits, *, packed, dtype=F32, listed=True, sinks=None, layout=None, head_dim=HEAD_DIM,
    seed=0,
):  # fmt: skip
    """Random partial results of sequences, merged by the kernel: (out, lse, the parts of each sequence)."""
    rng = np.random.default_rng(seed)
    accumulator = F64 if dtype == F64 else F32
    total, batch = sum(seqlens_q), len(seqlens_q)
    parts, outs, states, table = [], [], [], []
    for n, splits in zip(seqlens_q, num_splits, strict=True):
        part_max = lses_of(rng, (splits, HEADS, n), accumulator, 3.0)
        part_sum = np.where(np.isneginf(part_max), 0, rng.uniform(1, 9, part_max.shape)).astype(accumulator)
        with np.errstate(divide="ignore"):
            part_lse = part_max + np.log(part_sum)
        parts.append((outs_of(rng, part_lse, head_dim, accumulator), part_lse))
        table.append((splits, sum(len(x) for x in states)))
        if splits > 1 or not listed:
            outs.append(parts[-1][0].reshape(splits * n, HEADS, head_dim))
            state = np.stack([part_max, part_sum], axis=-1)
            states.append(state.swapaxes(1, 2).reshape(splits * n, HEADS, 2))
    num_partials = sum(len(x) for x in states)
    partial_out = np.concatenate([*outs, np.zeros((0, HEADS, head_dim), accumulator)])
    partial_state = np.concatenate([*states, np.zeros((0, HEADS, 2), accumulator)])
    rows = (total,) if packed else (batch, seqlens_q[0])
    out = executor.guarded((*rows, HEADS, head_dim), dtype, layout)
    lse = executor.guarded((HEADS, total) if packed else (batch, HEADS, seqlens_q[0]), accumulator)
    extents = Extents(batch, total if packed else seqlens_q[0], 64, HEADS, HEADS, head_dim, head_dim, packed)
    options = Options(sinks=None if sinks is None else executor.array(np.asarray(sinks, accumulator)))
    problem = SimpleNamespace(
        executor=executor_for(x=out.array), extents=extents, options=options, group=1, accumulator=accumulator.type,
        dtype=dtype, max_seqlen_q=UNBOUNDED, max_seqlen_k=64, scale=1.0, k_scale=None, v_scale=None, k_blocks=None,
        v_blocks=None, block_tables=None, rotary=None, rotate_keys=False, page_size=64, num_pages=batch,
    )  # fmt: skip
    starts = np.concatenate([[0], np.cumsum(seqlens_q)]).astype(np.int32)
    schedule = Schedule(
        num_items=0,
        cu_seqlens_q=executor.array(starts) if packed else None,
        num_splits=1 if listed else num_splits[0],
        splits=executor.array(np.array(table, np.int32)) if listed else None,
        num_partials=num_partials,
        max_splits=max(num_splits),
    )
    output = Operand(out.array)
    config = FLASH_DECODE_CONFIGS[0]
    params = pack_decode(problem, config, schedule, output, output, output, output, rotary_vectors=False)
    partials = executor.array(partial_out), executor.array(partial_state)
    reduce.launch_reduce(problem, schedule, *partials, output, lse.array, params)
    out.check()
    return out, lse, parts


def assert_merged(executor, merged, seqlens_q, num_splits, *, packed, sinks=None):
    """Rows of split sequences are right, the others untouched."""
    out, lse, parts = merged
    out_array, lse_array = executor.numpy(out.array), executor.numpy(lse.array)
    first = 0
    for b, (n, splits) in enumerate(zip(seqlens_q, num_splits, strict=True)):
        rows = np.s_[first : first + n] if packed else np.s_[b]
        columns = np.s_[:, first : first + n] if packed else np.s_[b]
        first += n
        if splits > 1 and n:
            sink = None if sinks is None else np.asarray(sinks, lse_array.dtype)
            assert_merge_close((out_array[rows], lse_array[columns]), *parts[b], sinks=sink)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_splits_of_each_sequence(executor, dtype, packed):
    """Of one, nothing is written: the kernel of the splits has done it. One sink is far above all logits."""
    seqlens_q, num_splits, sinks = ([3, 0, 1, 17, 2] if packed else [2] * 5), [4, 3, 1, 2, 33], [0.5, -np.inf, 120]
    merged = merge(executor, seqlens_q, num_splits, packed=packed, dtype=dtype, sinks=sinks)
    assert_merged(executor, merged, seqlens_q, num_splits, packed=packed, sinks=sinks)


def test_a_sequence_of_one_split_is_left_alone(executor):
    out, lse, _ = merge(executor, [2, 2], [1, 1], packed=False)
    before = executor.guarded(out.array.shape, F32), executor.guarded(lse.array.shape, F32)
    for array, poison in zip((out, lse), before, strict=True):
        np.testing.assert_array_equal(
            executor.numpy(array.array).view(np.uint32), executor.numpy(poison.array).view(np.uint32)
        )


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("num_splits", (2, 9, 130))
def test_as_many_splits_of_every_sequence(executor, num_splits, packed):
    seqlens_q = [5, 1, 0, 2] if packed else [3, 3]
    every = [num_splits] * len(seqlens_q)
    merged = merge(executor, seqlens_q, every, packed=packed, listed=False)
    assert_merged(executor, merged, seqlens_q, every, packed=packed)


@pytest.mark.parametrize("head_dim", (1, 200))
def test_head_dims(executor, head_dim):
    """A single column; and more columns than the lanes of a group take at once."""
    merged = merge(executor, [2, 1], [12, 3], packed=True, head_dim=head_dim)
    shape = merge_launch.block_shape(num_rows=9, num_parts=12, head_dim=head_dim, pack=4)
    assert shape.groups > 1
    assert (shape.lanes * 4 < head_dim) == (head_dim == 200)
    assert_merged(executor, merged, [2, 1], [12, 3], packed=True)


def test_rows_at_any_address(executor):
    layout = Layout(pad=(1, 1, 3), offset=1)
    merged = merge(executor, [3, 4], [2, 5], packed=True, dtype=F16, layout=layout)
    assert_merged(executor, merged, [3, 4], [2, 5], packed=True)


def test_more_rows_than_the_grid(executor, monkeypatch):
    """CTAs take turns."""
    monkeypatch.setattr(reduce, "MAX_GRID_X", 2)
    merged = merge(executor, [40, 40], [2, 3], packed=True)
    assert_merged(executor, merged, [40, 40], [2, 3], packed=True)


def test_same_bits_every_time(executor):
    first = merge(executor, [1, 2], [40, 9], packed=True)
    assert merge_launch.block_shape(num_rows=9, num_parts=40, head_dim=HEAD_DIM, pack=4).groups > 1
    for seed in range(2):
        with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=seed):
            again = merge(executor, [1, 2], [40, 9], packed=True)
        for x, y in zip(again[:2], first[:2], strict=True):
            np.testing.assert_array_equal(executor.numpy(x.array), executor.numpy(y.array))
