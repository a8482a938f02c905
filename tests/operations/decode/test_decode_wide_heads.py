"""Head dims beyond 256 over caches: decoding, paged, packed and in a cascade, in every format, and what fills caches.

Few pairs, because each is a kernel of its own: D in one bucket, E in halves of 192 or 256 columns (cuattn.head_dims).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cached_calls import assert_right, check, prepare

import cuattn
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS
from cuattn.runtime import executor as executors
from cuattn.testing import assert_paged_close
from cuattn.testing.arrays import Layout
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.options import make_sinks, make_slopes

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def make(head_dims, dtype=F16, *, lengths=(37, 0, 70), seqlens_q=1, heads=(4, 2), seed=0, **more):
    return cached_problem(
        np.random.default_rng(seed), lengths=lengths, seqlens_q=seqlens_q, heads=heads, head_dims=head_dims,
        dtype=dtype, **more,
    )  # fmt: skip


HEAD_DIMS = ((257, 257), (288, 320), (511, 512), (320, 500), (64, 512))


@pytest.mark.smoke
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(executor, head_dims):
    """Finished by the CTAs of a sequence, and by the kernel that merges splits."""
    problem = make(head_dims, page_size=5)
    for num_splits in (1, 2):
        assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize(("dtype", "head_dims"), [(F32, (64, 512)), (F32, (320, 500)), (F64, (512, 31))], ids=str)
def test_head_dims_without_tensor_cores(executor, dtype, head_dims):
    for seqlens_q in (1, 3):
        assert_right(executor, make(head_dims, dtype, heads=(2, 2), seqlens_q=seqlens_q), num_splits=2)


FORMATS = (
    *((F16, "e4m3fn", "head"), (BF16, "int8", "slot"), (BF16, "nvfp4", "tensor"), (BF16, "mxfp4", "tensor")),
    *((F16, "mxfp4", "tensor"), (F32, "int8", "slot")),
)


@pytest.mark.parametrize(("dtype", "kv_format", "scales"), FORMATS, ids=str)
def test_narrow_formats(executor, dtype, kv_format, scales):
    """The second half of a row of values begins within it, and so do its block scales; one row takes other kernels."""
    problem = make((512, 320), dtype, kv_format=kv_format, scales=scales, seqlens_q=2, page_size=16)
    assert_right(executor, problem, num_splits=2)
    if kv_format == "nvfp4":
        assert_right(executor, make((64, 512), dtype, heads=(2, 2), kv_format=kv_format, scales=scales), num_splits=2)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_all_options(executor, dtype):
    rng = np.random.default_rng(0)
    problem = make(
        (512, 320), dtype, lengths=(135, 40), seqlens_q=3, heads=(6, 2), page_size=16, window=(100, None), softcap=4.0,
        alibi_slopes=make_slopes(rng, (6,)), sinks=make_sinks(rng, 6), rope=cuattn.Rotary(), rotate_keys=True,
    )  # fmt: skip
    assert_right(executor, problem, num_splits=2)


@pytest.mark.parametrize(
    ("dtype", "rope"), [(F16, cuattn.Rotary(rotary_dim=70)), (F32, cuattn.Rotary(interleaved=True))], ids=("f16", "f32")
)
def test_rotations(executor, dtype, rope):
    problem = make((300, 300), dtype, rope=rope, rotate_keys=True, layouts=(None, Layout(pad=(0, 0, 0, 2)), None))
    assert_right(executor, problem)


def test_packed_queries(executor):
    """A prompt among them, which takes the rows for many queries."""
    problem = make((512, 512), lengths=(50, 2, 0, 33), seqlens_q=(20, 1, 3, 1), page_size=3)
    assert_right(executor, problem, num_splits=2)


@pytest.mark.parametrize("row", [row for row in FLASH_DECODE_CONFIGS if row.max_head_dim > 256], ids=str)
def test_a_config_row_changes_no_result(executor, row):
    """Every row, those for 99 KB of shared memory too, with more query rows than it has and several tiles of keys."""
    dtype = {2: F16, 4: F32, 8: F64}[row.itemsize]
    assert_right(executor, make((512, 512), dtype, seqlens_q=9, lengths=(75, 33)), config=row, num_splits=2)


def test_out_is_written_in_place_and_nothing_beside_it(executor):
    for page_size in (None, 4):
        problem = make((64, 509), page_size=page_size)
        target = executor.guarded((3, 1, 4, 509), F16, Layout(pad=(0, 1, 1, 3), offset=1))
        arrays, options = prepare(executor, problem, num_splits=2)
        function = cuattn.decode_attention if page_size is None else cuattn.paged_attention
        assert function(*arrays, out=target.array, **options) is target.array
        target.check()
        check(problem, executor.numpy(target.array))


def test_a_cascade(executor):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*shape, 512)).astype(F16) for shape in ((2, 1, 4), (6, 8, 2), (6, 8, 2)))
    shared, tables, lengths = cuattn.SharedPrefix([4, 1], 16), np.array([[0, 3], [5, 2]], np.int32), [11, 5]
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = cuattn.cascade_attention(*arrays, shared, tables, lengths, return_lse=True)
    whole = np.concatenate([np.broadcast_to(np.int32([4, 1]), (2, 2)), tables], axis=1)
    want, want_lse = cuattn.paged_attention(*arrays, whole, np.add(lengths, 16), return_lse=True)
    np.testing.assert_allclose(executor.numpy(out).astype(F64), executor.numpy(want).astype(F64), rtol=0, atol=2e-3)
    np.testing.assert_allclose(executor.numpy(lse), executor.numpy(want_lse), rtol=1e-6, atol=1e-5)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plans_count_the_ctas_that_share_a_row(executor, monkeypatch):
    """A plan says how many CTAs are launched, and its workspace is exact; a call without a plan chooses the same."""
    launched = []
    start = executors.Executor.launch

    def record(self, kernel, grid, block, args, smem_bytes=0):
        launched.append(grid[0])
        return start(self, kernel, grid, block, args, smem_bytes)

    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": F16}
    plan = cuattn.plan_decode([900, 40], head_dim_v=512, **shape)
    narrow = cuattn.plan_decode([900, 40], head_dim_v=256, **shape)
    problem = make((64, 512), lengths=(900, 40))
    arrays, options = prepare(executor, problem)
    monkeypatch.setattr(executors.Executor, "launch", record)
    workspace = executor.array(np.empty(plan.workspace_size(), np.uint8))
    out = cuattn.decode_attention(*arrays, plan=plan, workspace=workspace, **options)
    check(problem, executor.numpy(out))
    splits = np.broadcast_to(plan.num_splits, 2)
    assert splits.max() > 1 and launched[0] == plan.num_ctas == 2 * 2 * splits.sum()
    assert plan.estimate.least_time > 0 and narrow.num_ctas == 2 * np.broadcast_to(narrow.num_splits, 2).sum()


def test_the_least_time_reads_keys_once():
    """Two CTAs read the keys of a row; the floor of a plan counts them once, as bytes over the same bandwidth."""
    floors = []
    for head_dim_v in (256, 512):
        plan = cuattn.plan_decode([4096], num_heads=1, num_kv_heads=1, head_dim=256, head_dim_v=head_dim_v, dtype=F16)
        # The unit is a tile of a CTA: 256 columns of keys and 256 of values, either way.
        floors.append(plan.estimate.least_time)
    assert floors[1] == pytest.approx(1.5 * floors[0])


# --- what fills caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", (None, "nvfp4"))
def test_through_a_paged_cache(executor, kv_format):
    """Rows of 512 and 320 numbers, turned on their way in; a fork has a page of its own from the first token on."""
    cache = cuattn.PagedKVCache(
        num_layers=1, num_pages=8, page_size=16, num_kv_heads=2, head_dim=512, head_dim_v=320, dtype="float16",
        kv_format=kv_format, array_module=executor.xp,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def normal(*shape):
        return executor.array(rng.standard_normal(shape).astype(F16))

    def append(seqs, counts, q=None):
        step = cache.reserve(seqs, counts)
        tokens = sum(counts)
        step.append(0, normal(tokens, 2, 512), normal(tokens, 2, 320), rope=cuattn.Rotary())
        out = None if q is None else step.attend(0, q, rope=cuattn.Rotary())
        step.commit()
        return out

    first = cache.add()
    append([first], [20])
    seqs = [first, cache.fork(first)]
    q = normal(2, 1, 4, 512)
    out = executor.numpy(append(seqs, [1, 1], q))
    pages = {name: executor.numpy(x) if hasattr(x, "shape") else x for name, x in cache.layer_arrays(0).items()}
    arrays = executor.numpy(q), pages.pop("k_pages"), pages.pop("v_pages"), *cache.block_tables(seqs)
    assert_paged_close(out, *arrays, **pages, rope=cuattn.Rotary())
    assert out[0].tobytes() != out[1].tobytes()


@pytest.mark.parametrize("interleaved", (False, True))
def test_rope_of_wide_heads(executor, interleaved):
    """As append_kv turns them, so `rope` and `split_qkv` do."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((5, 4 * 512)).astype(F16)
    positions = np.arange(5)
    rotary = cuattn.Rotary(interleaved=interleaved)
    q, k, v = cuattn.split_qkv(executor.array(qkv), num_heads=2, num_kv_heads=1, positions=positions, rope=rotary)
    heads = qkv.reshape(5, 4, 512)
    turned = cuattn.reference.rope(heads[:, :3], positions, interleaved=interleaved)
    alone = cuattn.rope(executor.array(heads[:, :3]), positions, interleaved=interleaved)
    for got, want in ((q, turned[:, :2]), (k, turned[:, 2:]), (alone, turned)):
        np.testing.assert_allclose(executor.numpy(got).reshape(want.shape).astype(F64), want, rtol=1e-3, atol=4e-3)
    assert executor.numpy(v).tobytes() == heads[:, 3:].tobytes()
