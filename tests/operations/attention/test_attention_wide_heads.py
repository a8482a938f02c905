"""Head dims beyond 256, of keys, of values and of both: forward against the float64 reference, and who refuses them.

Few pairs, because each is a kernel of its own: D in one bucket, E in halves of 192 or 256 columns (cuattn.head_dims).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_calls import assert_right, assert_varlen_right, call
from packed_sequences import pack

import cuattn
from cuattn.compat import flash_attn
from cuattn.errors import NotSupportedError, ShapeError
from cuattn.ops.attention.arguments import check
from cuattn.ops.attention.forward import tuned_rows
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, PlainFwdConfig
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS
from cuattn.runtime import executor as executors
from cuattn.testing import assert_attention_close, kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.options import make_bias, make_mask, make_sinks, make_slopes

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def make(head_dims, dtype=F16, *, heads=(4, 2), seqlens=(21, 37), batch=1, seed=0):
    """q, k and v of standard normal numbers."""
    rng = np.random.default_rng(seed)
    of_k = batch, seqlens[1], heads[1]
    shapes = (batch, seqlens[0], heads[0], head_dims[0]), (*of_k, head_dims[0]), (*of_k, head_dims[1])
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


#: D only, E only, both; rows that are multiples of 16 bytes and rows that are not; halves of 192 and of 256 columns.
HEAD_DIMS = ((257, 257), (288, 320), (320, 500), (511, 512), (512, 512), (64, 512), (500, 31))


@pytest.mark.smoke
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(executor, head_dims):
    assert_right(executor, *make(head_dims), causal=True)


@pytest.mark.parametrize("head_dims", ((64, 512), (511, 257)), ids=str)
def test_head_dims_of_float32(executor, head_dims):
    assert_right(executor, *make(head_dims, F32), causal=True)


@pytest.mark.parametrize(
    ("dtype", "head_dims", "precision"),
    [(BF16, (512, 320), None), (F64, (288, 500), None), (F32, (64, 320), "tf32"), (E4M3, (512, 512), None)],
    ids=str,
)
def test_other_elements(executor, dtype, head_dims, precision):
    descales = {"v_descale": np.float32([[0.5, 3.0]])} if dtype == E4M3 else {}
    assert_right(executor, *make(head_dims, dtype), causal=True, precision=precision, **descales)


@pytest.mark.parametrize(("dtype", "head_dims"), [(F16, (512, 512)), (F32, (320, 500))], ids=str)
def test_every_option(executor, dtype, head_dims):
    """Among them those that a kernel remembers until its end: the sink, and the rescaling of what dropout keeps."""
    rng = np.random.default_rng(0)
    shape = 1, 4, 21, 37
    options = {
        "window": (20, 9),
        "softcap": 3.0,
        "bias": make_bias(rng, shape, F16, "normal"),
        "mask": make_mask(rng, shape, "random"),
        "alibi_slopes": make_slopes(rng, (4,)),
        "sinks": make_sinks(rng, 4),
        "dropout_p": 0.3,
        "dropout_seed": 5,
    }
    assert_right(executor, *make(head_dims, dtype), **options)


SMALLEST = {"tf32": ("mma", 4, F32), "float64": ("fma", 8, F64)}


@pytest.mark.parametrize("name", SMALLEST)
def test_tiles_that_take_turns_in_shared_memory(executor, name):
    """The rows for 99 KB: no tile is loaded ahead, some are passed over, and warps skip some that others need."""
    products, itemsize, dtype = SMALLEST[name]
    row = [r for r in FLASH_FWD_CONFIGS if (r.products, r.itemsize) == (products, itemsize)][-1]
    q, k, v = make((270, 33), dtype, heads=(2, 1), seqlens=(40, 100))
    mask = np.ones(100, bool)
    mask[32:64] = False
    options = {"window": (30, 3), "mask": mask, **({"precision": "tf32"} if name == "tf32" else {})}
    arrays = [executor.array(x) for x in (q, k, v)]
    moved = options | {"mask": executor.array(mask)}
    out, lse = kernels.attention(*arrays, return_lse=True, config=row, **moved)
    assert row.is_legal(512, 256, 99 * 1024)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), **options)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_packed_sequences(executor, dtype):
    arrays, starts = pack([(5, 9), (0, 3), (33, 40), (1, 70)], dtype, head_dims=(64, 512))
    assert_varlen_right(executor, *arrays, *starts, causal=True, sinks=np.float32([0.5, -1]))


def test_a_query_that_sees_nothing_is_zero_in_every_column(executor):
    out, lse = assert_right(executor, *make((64, 512), seqlens=(40, 7)), causal=True)
    assert not out[:, :33].any() and np.isneginf(lse[..., :33]).all()


def test_no_keys(executor):
    out, lse = call(executor, *make((64, 512), seqlens=(3, 0)))
    assert not out.any() and np.isneginf(lse).all()


LAYOUTS = {"heads_first": Layout(order=(0, 2, 1, 3)), "padded": Layout(pad=(1, 1, 1, 8)), "odd": Layout(offset=1)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_out_is_written_in_place_and_nothing_beside_it(executor, dtype, layout):
    """The halves of a row are next to each other, and end where the row does."""
    q, k, v = make((64, 509), dtype, batch=2)
    out = executor.guarded((2, 21, 4, 509), dtype, LAYOUTS[layout])
    arrays = [executor.array(place(x, LAYOUTS[layout] if layout != "odd" else None)) for x in (q, k, v)]
    assert cuattn.attention(*arrays, causal=True, out=out.array) is out.array
    out.check()
    assert_attention_close(executor.numpy(out.array), q, k, v, causal=True)


def test_columns_do_not_change_each_other(executor):
    """Each column of the result is, bit for bit, what it is where its half of the values is all there is."""
    q, k, v = make((64, 512))
    out, lse = call(executor, q, k, v)
    for half in (slice(0, 256), slice(256, 512)):
        alone, lse_alone = call(executor, q, k, np.ascontiguousarray(v[..., half]))
        assert alone.tobytes() == np.ascontiguousarray(out[..., half]).tobytes()
        assert lse_alone.tobytes() == lse.tobytes()


@pytest.mark.parametrize("head_dims", ((64, 512), (500, 7)), ids=str)
def test_the_kernel_to_be_read_and_the_unfused_one(executor, head_dims):
    q, k, v = make(head_dims, seqlens=(5, 9))
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = kernels.attention(*arrays, causal=True, return_lse=True, config=PlainFwdConfig())
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), causal=True)
    out, lse = cuattn.standard_attention(*arrays, causal=True, return_lse=True)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), causal=True)


# --- what is said about a call ----------------------------------------------------------------------------------------


def test_the_path_of_a_call():
    q, k, v = make((64, 512))
    for arch in ("sm_80", "sm_86", "sm_90a", "sm_120a"):
        found = cuattn.forward_path(q, k, v, arch=arch)
        assert found.kernel == "attention_forward" and found.row in FLASH_FWD_CONFIGS
    found = cuattn.forward_path(q, k, v, arch="sm_90a")
    assert "not the Hopper kernel: head dims 64 and 512 are not both at most 256" in found.reason
    with pytest.raises(NotSupportedError, match="head dims 64 and 512"):
        kernels.attention(q, k, v, config=HOPPER_FWD_CONFIGS[0])
    assert cuattn.forward_path(*make((512, 512), F64), arch="sm_86").row.num_stages == 0


def test_one_launch_and_nothing_but_the_results_is_allocated(monkeypatch):
    """Two CTAs for each block of queries and head, which share a row of the result."""
    launched, allocated = [], []
    start, empty = executors.Executor.launch, executors.Executor.empty

    def record(self, kernel, grid, block, args, smem_bytes=0):
        launched.append(grid)
        return start(self, kernel, grid, block, args, smem_bytes)

    def count(self, shape, dtype):
        allocated.append(shape)
        return empty(self, shape, dtype)

    monkeypatch.setattr(executors.Executor, "launch", record)
    monkeypatch.setattr(executors.Executor, "empty", count)
    q, k, v = make((64, 512), batch=3)
    cuattn.attention(q, k, v, out=np.empty((3, 21, 4, 512), F16))
    assert launched == [(2 * 3 * 4,)] and allocated == []


def test_calls_of_other_halves_are_tuned_apart():
    names = {
        tuned_rows.call_class(check(*make((64, e)), scale=None, causal=False, out=None), None)
        for e in (256, 257, 384, 385, 512)
    }
    assert [name.split("/")[2] for name in sorted(names)] == ["e256", "e384", "e512"]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dims", "named"), [((257, 8), "q"), ((8, 512), "v"), ((600, 8), "q")], ids=str)
def test_gradients_are_refused_before_anything_is_written(head_dims, named):
    q, k, v = make(head_dims)
    out, lse, dq = np.zeros((1, 21, 4, head_dims[1]), F16), np.zeros((1, 4, 21), np.float32), np.full_like(q, 7)
    said = rf"{named} has head dim {max(head_dims)}; gradients are for 1 to 256 \(attention .* takes up to 512\)"
    with pytest.raises(ShapeError, match=said):
        cuattn.attention_backward(out, q, k, v, out, lse, dq=dq)
    assert (dq == 7).all()
    with pytest.raises(ShapeError, match=said):
        flash_attn.flash_attn_func_backward(out, q, k, v, out, lse)
    starts = [np.array([0, x.shape[1]], np.int32) for x in (q, k)]
    with pytest.raises(ShapeError, match=said):
        cuattn.attention_varlen_backward(out[0], q[0], k[0], v[0], out[0], lse[0], *starts)
    with pytest.raises(ShapeError, match=said):
        cuattn.attention_backward_workspace_size(q, k, v)


def test_compat_takes_them_forward(executor):
    q, k, v = make((64, 512))
    out = flash_attn.flash_attn_func(*(executor.array(x) for x in (q, k, v)), causal=True)
    assert_attention_close(executor.numpy(out), q, k, v, causal=True)
