"""What the Hopper kernel is passed: tensor maps, pointers, schedule, grid; without running it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from simulated_cupy import installed

from cuattn.ops.attention.arguments import check
from cuattn.ops.attention.forward import hopper_launch
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.params import UNBOUNDED, forward_layout
from cuattn.ops.operand import Operand
from cuattn.runtime import executor as executors
from cuattn.testing import kernels
from cuattn.testing.arrays import Layout, place

F16 = np.float16
SMALL = HopperFwdConfig(128, 128, 1, 64, 2, 56, 256)  # tiles of 64 by 64
LARGE = HopperFwdConfig(128, 128, 2, 128, 2, 40, 232)


@pytest.fixture
def launches(monkeypatch):
    """Launches that only note what they were given, by name."""
    noted = []

    def start(self, kernel, grid, block, args, smem_bytes=0):
        assert kernel == ("attention_forward_hopper", "cuattn_attention_forward_hopper")
        given = {name.removeprefix("g_"): value for name, value in args.items()}
        given["schedule"] = np.frombuffer(given["schedule"].tobytes(), np.int32).tolist()
        noted.append(SimpleNamespace(arch=self.arch, grid=grid, block=block, smem_bytes=smem_bytes, **given))

    monkeypatch.setattr(executors.HostExecutor, "kernel", lambda self, source, constants, entry: (source, entry))
    monkeypatch.setattr(executors.HostExecutor, "launch", start)
    hopper_launch._loaded.cache_clear()
    yield noted
    hopper_launch._loaded.cache_clear()


def arrays(*, batch=2, seqlens=(100, 150), heads=(4, 2), head_dims=(40, 64), layout=None):
    shapes = (
        (batch, seqlens[0], heads[0], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[1]),
    )
    return [place(np.ones(shape, F16), layout).array for shape in shapes]


def one(launches, function, *args, config=SMALL, **options):
    function(*args, config=config, **options)
    (only,) = launches
    launches.clear()
    return only


def test_maps_of_a_batch(launches):
    """Rows of q are (pack, query) of a pack of heads; all strides are those of the arrays."""
    q, k, v = arrays(layout=Layout(order=(0, 2, 1, 3), pad=(0, 3, 0, 8)))
    told = one(launches, kernels.attention, q, k, v)
    batch, seq, head, _ = q.strides
    assert (told.map_q.array is q, told.map_k.array is k, told.map_v.array is v) == (True, True, True)
    assert told.schedule[3] == 1
    assert told.map_q.dims == (40, 1, 100, 4, 2) and told.map_q.box == (64, 1, 64, 1, 1)
    assert told.map_q.strides[2:] == (seq, head, batch)
    for x, told_map in ((k, told.map_k), (v, told.map_v)):
        batch, seq, head, last = x.strides
        assert told_map.dims == (x.shape[3], 150, 2, 2) and told_map.box == (64, 64, 1, 1)
        assert told_map.strides == (last, seq, head, batch)
    assert {m.swizzle for m in (told.map_q, told.map_k, told.map_v)} == {"128B"}


def test_maps_of_packed_heads(launches):
    q, k, v = arrays(seqlens=(5, 150), heads=(8, 2))
    told = one(launches, kernels.attention, q, k, v)
    batch, seq, head, last = q.strides
    assert told.schedule == [4, 1, 4, 4]
    assert told.map_q.dims == (40, 4, 5, 2, 2) and told.map_q.box == (64, 4, 16, 1, 1)
    assert told.map_q.strides == (last, head, seq, 4 * head, batch)


def test_maps_and_lists_of_packed_sequences(launches):
    q, k, v = (x[0] for x in arrays(heads=(4, 4), layout=Layout(pad=(0, 0, 1, 8))))
    starts = np.int32([0, 90, 90, 100]), np.int32([0, 20, 150, 150])
    told = one(launches, kernels.attention_varlen, q, k, v, *starts, causal=True)
    assert told.map_q.dims == (40, 1, 100, 4, 1) and told.map_k.dims == (40, 150, 4, 1)
    assert told.map_q.strides[2:4] == q.strides[:2] and told.map_v.strides[1:3] == v.strides[:2]
    assert told.work.tolist() == [[0, 1], [0, 0], [2, 0]]
    assert told.schedule == [12, 3, 4, 1]
    assert [told.cu_seqlens_q.tolist(), told.cu_seqlens_k.tolist()] == [x.tolist() for x in starts]


def test_packed_heads_of_packed_sequences(launches):
    """Entries of the list are blocks of as many queries as a tile holds of each head."""
    q, k, v = (x[0] for x in arrays(seqlens=(60, 150), heads=(8, 2)))
    told = one(launches, kernels.attention_varlen, q, k, v, [0, 20, 60], [0, 75, 150])
    assert told.schedule == [10, 5, 2, 4]
    assert sorted(told.work.tolist()) == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]


def test_arguments_that_a_call_does_not_use_are_null(launches):
    q, k, v = arrays()
    told = one(launches, kernels.attention, q, k, v)
    names = "lse", "alibi_slopes", "sinks", "diagonal_offsets", "cu_seqlens_q", "cu_seqlens_k", "work"
    assert [name for name in names if getattr(told, name) is not None] == []
    assert told.out.shape == (2, 100, 4, 64)
    options = {
        "alibi_slopes": np.float32([1, 2, 3, 4]),
        "sinks": np.float32([5, 6, 7, 8]),
        "diagonal_offset": np.int32([9, -9]),
        "return_lse": True,
    }
    told = one(launches, kernels.attention, q, k, v, **options)
    assert told.lse.shape == (2, 4, 100)
    assert [told.alibi_slopes.tolist(), told.sinks.tolist()] == [[[1, 2, 3, 4]], [5, 6, 7, 8]]
    assert told.diagonal_offsets.tolist() == [9, -9]


def test_the_numbers_are_those_of_every_forward_kernel(launches):
    """attention/attention_params.cuh, by the names of its fields."""
    q, k, v = arrays()
    told = one(launches, kernels.attention, q, k, v, window=(7, None), softcap=2.5, scale=0.5)
    fields = np.frombuffer(told.params.tobytes(), forward_layout(np.float32).dtype)[0]
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert fields[name].tolist() == tuple(stride // 2 for stride in x.strides[:3])
    assert fields["out"].tolist() == (100 * 4 * 64, 4 * 64, 64)
    assert all(fields[name].tolist() == (0, 0, 0, 0) for name in ("bias", "mask", "tile_class"))
    numbers = {
        "num_heads": 4,
        "heads_per_kv_head": 2,
        "seqlen_q": 100,
        "seqlen_k": 150,
        "max_seqlen_q": UNBOUNDED,
        "max_seqlen_k": UNBOUNDED,
        "head_dim": 40,
        "head_dim_v": 64,
        "diagonal_offset": 0,
        "diagonal_from_end": 1,
        "window_left": 7,
        "window_right": UNBOUNDED,
        "use_dropout": 0,
        "keep_scale": 1.0,
        "scale": 0.5,
        "softcap": 2.5,
    }
    assert {name: fields[name] for name in numbers} == numbers
    assert fields["scale_log2"] == pytest.approx(0.5 * np.log2(np.e))


def test_the_grid_is_persistent(launches):
    """At most as many CTAs as run at the same time; no more than there are tiles."""
    for batch, num_ctas in ((1, 2), (2, 4), (3, hopper_launch.HOST_CTAS)):
        q, k, v = arrays(batch=batch, seqlens=(100, 150), heads=(1, 1))
        told = one(launches, kernels.attention, q, k, v)
        assert told.schedule[0] == 2 * batch
        assert (told.grid, told.block) == ((num_ctas,), (256,))
        assert told.smem_bytes == SMALL.smem_bytes(64, 64)
        assert told.arch == "sm_90a"


def test_heads_take_turns_where_the_cache_is_small(launches, monkeypatch):
    q, k, v = arrays(heads=(8, 4))
    assert one(launches, kernels.attention, q, k, v, config=LARGE).schedule == [16, 1, 16, 1]
    monkeypatch.setattr(hopper_launch, "L2_BYTES", 2 * 150 * (40 + 64) * 2)
    assert one(launches, kernels.attention, q, k, v, config=LARGE).schedule == [16, 1, 4, 1]


def test_arrays_that_are_copied(launches):
    """One whose last axis is strided goes to the kernel as a copy without gaps."""
    q = np.ones((2, 100, 4, 128), F16)[..., ::2]
    told = one(launches, kernels.attention, q, q, q)
    assert told.map_q.array.shape == q.shape and told.map_q.array.flags.c_contiguous
    assert told.map_k.strides == (2, 4 * 64 * 2, 64 * 2, 100 * 4 * 64 * 2)


def test_the_table_is_used_where_no_config_is_given(launches, monkeypatch):
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    q, k, v = arrays(head_dims=(128, 128))
    told = one(launches, kernels.attention, q, k, v, config=None)
    row = next(row for row in HOPPER_FWD_CONFIGS if row.max_head_dim == 128 and row.max_seqlen_q == 0)
    assert told.map_q.box[2] == row.block_m and told.map_k.box[1] == row.block_n


def test_maps_of_an_array_on_a_gpu_are_made_once(monkeypatch):
    """For the driver takes its time; they are the bytes that the kernel gets, and hold no array."""
    made = []

    def make(array, box, **view):
        made.append(view)
        return SimpleNamespace(value=(box, *view.values()))

    monkeypatch.setattr(hopper_launch, "tensor_map", make)
    monkeypatch.setattr(hopper_launch, "_encoded", {})
    monkeypatch.setattr(hopper_launch, "_MAX_ENCODED", 3)
    with installed(monkeypatch) as cupy:
        q, k, v = (cupy.wrap(x) for x in arrays())
        problem = check(q, k, v, scale=None, causal=False, out=None)
        sizes = problem.extents.seqlen_k, problem.extents.num_kv_heads, problem.extents.batch
        first = [hopper_launch.rows_map(Operand(x), sizes, 64) for x in (k, v)]
        again = [hopper_launch.rows_map(Operand(x), sizes, 64) for x in (k, v)]
        assert first == again and first[0] is again[0] and len(made) == 2
        others = [hopper_launch.rows_map(Operand(k), sizes, block_n) for block_n in (64, 128)]
        assert others[0] is first[0] and others[1] != first[0] and len(made) == 3
        hopper_launch._query_map(Operand(q), problem.extents, 1, 64)  # there is room for three
        assert len(made) == 4 and len(hopper_launch._encoded) == 1
