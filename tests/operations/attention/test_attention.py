"""cuattn.attention at the edges of its buckets, tiles and layouts, each against the float64 reference."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from attention_calls import prepare
from option_cases import OPTION_CASES, formats_of, option_case

import cuattn
from cuattn.errors import SlowHostCallWarning
from cuattn.head_dims import COLUMNS
from cuattn.ops.attention import slow_calls
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, PlainFwdConfig
from cuattn.testing import assert_attention_close, assert_varlen_close, kernels
from cuattn.testing.arrays import Layout, place

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
DTYPES = (F16, BF16, F32, F64)


def make(shape, dtype, seed=0):
    """q [B, N, H, D], k [B, M, G, D], v [B, M, G, E] for shape (B, N, M, H, G, D, E)."""
    batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v = shape
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, seqlen_q, heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim_v),
    )
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def assert_right(executor, q, k, v, **options):
    """The call agrees with the reference; q, k and v are NumPy arrays in any layout, and come back unchanged."""
    out, lse = cuattn.attention(*(executor.array(x) for x in (q, k, v)), return_lse=True, **options)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), **options)


HEAD_DIMS = (1, 2, 7, 8, 17, 31, 32, 33, 40, 63, 64, 65, 72, 95, 96, 97, 127, 128, 129, 160, 191, 192, 193, 255, 256)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(executor, head_dim):
    """Every bucket at its edges; head dims that are no multiple of 8 take the element-wise load path as well."""
    assert_right(executor, *make((1, 19, 37, 2, 1, head_dim, head_dim), F16), causal=True)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [*((BF16, d) for d in (33, 128, 255)), *((dtype, d) for dtype in (F32, F64) for d in (1, 96, 129, 256))],
    ids=str,
)
def test_head_dims_of_other_dtypes(executor, dtype, head_dim):
    """Each load path, and each row of their tables."""
    assert_right(executor, *make((1, 19, 37, 2, 1, head_dim, head_dim), dtype), causal=True)


@pytest.mark.parametrize(
    ("dtype", "head_dims"),
    [
        *((F16, dims) for dims in ((192, 128), (64, 256), (256, 1), (1, 256), (40, 96))),
        *((F32, dims) for dims in ((64, 256), (256, 1))),
    ],
    ids=str,
)
def test_value_head_dim_differs(executor, dtype, head_dims):
    assert_right(executor, *make((2, 21, 50, 2, 2, *head_dims), dtype))


SEQLENS = (
    *((1, 1), (1, 64), (1, 65), (63, 129), (64, 64), (65, 63), (127, 1), (128, 128), (129, 127), (129, 200)),
    *((200, 33), (257, 16), (2, 257), (130, 15)),
)


@pytest.mark.parametrize("causal", (False, True, "top_left"))
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_sequence_lengths(executor, seqlens, causal):
    """One more and one less than every tile; more queries than keys, which leaves rows empty under a causal mask."""
    for dtype in (F16, F32):
        assert_right(executor, *make((1, *seqlens, 2, 1, 64, 64), dtype), causal=causal)


def test_causal_row_that_sees_nothing(executor):
    q, k, v = make((1, 150, 20, 1, 1, 32, 32), F16)
    out, lse = cuattn.attention(*(executor.array(x) for x in (q, k, v)), causal=True, return_lse=True)
    assert not executor.numpy(out)[:, :130].any()
    assert np.isneginf(executor.numpy(lse)[:, :, :130]).all()
    assert np.isfinite(executor.numpy(lse)[:, :, 130:]).all()


def test_every_row_of_a_long_sequence_is_finite(executor):
    """A running maximum that is only the tile's would overflow here: logits grow along the keys."""
    q, k, v = make((1, 130, 1024, 1, 1, 32, 32), F16)
    k *= np.linspace(0.1, 6, 1024).astype(F16).reshape(1, -1, 1, 1)
    assert_right(executor, q, k, v, scale=1.0)


@pytest.mark.parametrize("heads", ((1, 1), (4, 1), (6, 2), (12, 3)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads(executor, dtype, heads):
    assert_right(executor, *make((2, 9, 40, *heads, 32, 32), dtype))


LAYOUTS = {
    "batch_heads_seqlen": Layout(order=(0, 2, 1, 3)),
    "seqlen_first": Layout(order=(1, 0, 2, 3)),
    "padded_rows": Layout(pad=(0, 3, 1, 8)),
    "padded_rows_of_odd_length": Layout(pad=(1, 0, 2, 3)),
    "seven_padded_to_sixteen": Layout(pad=(0, 0, 0, 9)),
    "base_off_by_one": Layout(offset=1),
    "base_off_by_eight": Layout(order=(0, 2, 1, 3), offset=8),
    "last_axis_strided": Layout(order=(0, 1, 3, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_layouts(executor, dtype, layout):
    """Views of buffers of NaN: one element too many, and the result is NaN."""
    arrays = [place(x, LAYOUTS[layout]) for x in make((2, 21, 70, 4, 2, 40, 24), dtype)]
    out, lse = cuattn.attention(*(executor.array(x) for x in arrays), causal=True, return_lse=True)
    q, k, v = (guarded.array for guarded in arrays)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), causal=True)


def test_reversed_and_broadcast_axes(executor):
    q, k, v = make((2, 21, 70, 4, 2, 32, 32), F16)
    q, k, v = (executor.array(x) for x in (q, k, v))
    same_head = executor.xp.broadcast_to(k[:, :, :1], (2, 70, 4, 32))
    for arrays in ((q[:, ::-1], k[:, ::-1], v[::-1]), (q, same_head, v[:, ::2].repeat(2, 1)[:, :, ::-1].repeat(2, 2))):
        out = cuattn.attention(*arrays)
        assert_attention_close(executor.numpy(out), *(executor.numpy(x) for x in arrays))


def test_elements_between_their_multiples():
    """A view into packed bytes: elements at odd addresses, which only a copy can align."""
    q, k, v = make((1, 5, 9, 1, 1, 32, 32), F16)
    odd = np.frombuffer(b"\0" + q.tobytes(), F16, offset=1).reshape(q.shape)
    assert not odd.flags.aligned
    assert cuattn.attention(odd, k, v).tobytes() == cuattn.attention(q, k, v).tobytes()


@pytest.mark.parametrize("head_dim_v", (1, 7, 32))
@pytest.mark.parametrize(
    "layout", ("padded_rows", "seven_padded_to_sixteen", "base_off_by_one", "last_axis_strided", "batch_heads_seqlen")
)
@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_out(executor, dtype, layout, head_dim_v):
    q, k, v = make((2, 21, 30, 2, 1, 32, head_dim_v), dtype)
    out = executor.guarded((2, 21, 2, head_dim_v), dtype, LAYOUTS[layout])
    result = cuattn.attention(*(executor.array(x) for x in (q, k, v)), out=out.array)
    assert result is out.array
    out.check()
    assert_attention_close(executor.numpy(out.array), q, k, v)


@pytest.mark.parametrize(("number", "row"), list(enumerate(FLASH_FWD_CONFIGS)), ids=str)
def test_a_config_row_changes_no_result(executor, number, row):
    """Every row at the largest head dim it serves, on a problem of several tiles each way; and any row obeys the same
    bound. Rows sum in different orders, so bits may differ. Every other row with a causal mask."""
    dtype = {2: F16, 4: F32, 8: F64}[row.itemsize]
    head_dim = row.max_head_dim
    q, k, v = make((1, 130, 135, 1, 1, head_dim, head_dim - 5), dtype, seed=1)
    if not row.is_legal(head_dim, COLUMNS[head_dim][0], 163 * 1024):
        pytest.fail(f"{row} is legal on no architecture for the head dim that it is listed for")
    tf32 = {"precision": "tf32"} if row.products == "mma" and dtype == F32 else {}
    causal = number % 2 == 1
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = kernels.attention(*arrays, causal=causal, return_lse=True, config=row, **tf32)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), causal=causal, **tf32)


@pytest.mark.parametrize("case", OPTION_CASES)
def test_plain_kernel(executor, case):
    """The kernel that is written to be read, with each option alone and with all of them."""
    for dtype in formats_of(case):
        for shape in ((2, 7, 33, 4, 2, 40, 24), (2, 9, 3, 2, 2, 256, 1)):
            arrays = make(shape, dtype)
            options = option_case(case, shape, dtype)
            on_executor, moved = prepare(executor, arrays, options)
            out, lse = kernels.attention(*on_executor, return_lse=True, config=PlainFwdConfig(), **moved)
            assert_attention_close(executor.numpy(out), *arrays, lse=executor.numpy(lse), **options)


@pytest.mark.parametrize("case", ("none", "sinks"))
def test_plain_kernel_without_keys(executor, case):
    shape = (2, 3, 0, 2, 1, 1, 256)
    arrays, options = make(shape, F32), option_case(case, shape, F32)
    out, lse = kernels.attention(*map(executor.array, arrays), return_lse=True, config=PlainFwdConfig(), **options)
    assert_attention_close(executor.numpy(out), *arrays, lse=executor.numpy(lse), **options)


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_plain_kernel_of_packed_sequences(executor, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((12, *extents)).astype(dtype) for extents in ((4, 24), (2, 24), (2, 40)))
    starts = np.int32([0, 5, 5, 12]), np.int32([0, 3, 9, 12])
    options = {"causal": True, "window": (3, None), "dropout_p": 0.2, "sinks": np.float32([0, -1, 2, 0.5])}
    arrays = *map(executor.array, (q, k, v)), *starts
    out, lse = kernels.attention_varlen(*arrays, return_lse=True, config=PlainFwdConfig(), **options)
    assert_varlen_close(executor.numpy(out), q, k, v, *starts, lse=executor.numpy(lse), **options)


def test_warns_once_of_a_slow_call(monkeypatch):
    monkeypatch.setattr(slow_calls, "SLOW_HOST_FLOPS", 1.0)
    q, k, v = make((1, 2, 2, 1, 1, 8, 8), F32)
    for call in (
        lambda: cuattn.attention(q, k, v),
        lambda: cuattn.attention_varlen(q[0], k[0], v[0], [0, 2], [0, 2]),
    ):
        monkeypatch.setattr(slow_calls, "_warned", False)
        with pytest.warns(SlowHostCallWarning, match="host executor") as caught:
            call()
            call()
        assert len(caught) == 1
        assert caught[0].filename == __file__


def test_a_host_call_does_not_import_cupy():
    code = (
        "import sys, numpy, cuattn\n"
        "q = numpy.zeros((1, 2, 1, 32), numpy.float16)\n"
        "cuattn.attention(q, q, q)\n"
        "assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
