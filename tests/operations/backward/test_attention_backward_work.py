"""The memory of the backward pass: nothing with an element for each query and key, and what its size is said to be."""

from __future__ import annotations

import tracemalloc

import idle_executor
import numpy as np
import pytest
from option_cases import F16, F32, F64, OPTION_CASES, option_case

import cuattn
from cuattn.errors import ShapeError
from cuattn.runtime import executor as executors
from cuattn.testing import assert_gradients_close

GRADIENTS = "dq", "dk", "dv"
BATCH, HEADS, KV_HEADS, HEAD_DIM = 1, 4, 2, 64


def rounded(num_bytes):
    """As parts of a workspace are."""
    return -(-num_bytes // 16) * 16


@pytest.fixture
def allocations(monkeypatch):
    """What the executor allocates; nothing is compiled or launched."""
    return idle_executor.install(monkeypatch).allocated


def size_of(allocations):
    return sum(rounded(array.nbytes) for array in allocations)


def long_arrays(seqlen_q, seqlen_k, dtype=np.float16):
    q, k, dout = (
        np.zeros((BATCH, seqlen, heads, HEAD_DIM), dtype)
        for seqlen, heads in ((seqlen_q, HEADS), (seqlen_k, KV_HEADS), (seqlen_q, HEADS))
    )
    lse = np.zeros((BATCH, HEADS, seqlen_q), np.float64 if dtype == np.float64 else np.float32)
    return dout, q, k, k.copy(), dout.copy(), lse


def sinks(n, m):
    return {"sinks": np.zeros(HEADS, np.float32)}


LONG = {
    "plain": lambda n, m: {},
    "causal": lambda n, m: {"causal": True},
    "window": lambda n, m: {"window": (256, 0), "softcap": 30.0},
    "dropout": lambda n, m: {"dropout_p": 0.1, "dropout_seed": 3},
    "slopes and sinks": lambda n, m: {"alibi_slopes": np.ones(HEADS, np.float32), **sinks(n, m)},
    "mask of keys": lambda n, m: {"mask": np.ones((BATCH, 1, 1, m), bool)},
    "bias of keys": lambda n, m: {"bias": np.zeros((BATCH, 1, 1, m), np.float32)},
    "bias of queries": lambda n, m: {"bias": np.zeros((HEADS, n, 1), np.float16)},
    "bias of heads": lambda n, m: {"bias": np.zeros((HEADS, 1, 1), np.float32)},
}


@pytest.mark.parametrize("deterministic", (True, False))
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64), ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", LONG)
def test_nothing_grows_with_queries_times_keys(allocations, name, dtype, deterministic):
    """Beside results, twice the queries and keys take at most twice the memory: a few numbers a query and head, a byte
    a tile of a mask or bias that is broadcast, and a bounded buffer for the gradient of a bias."""
    lengths, totals = (1024, 2048, 4096), []
    for seqlen in lengths:
        arrays, options = long_arrays(seqlen, seqlen, dtype), LONG[name](seqlen, seqlen)
        options |= {"deterministic": deterministic, "return_dbias": "bias" in options}
        cuattn.attention_backward(*arrays, **options)  # the first call fills what is kept from call to call
        allocations.clear()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        grads = cuattn.attention_backward(*arrays, **options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        results = size_of(x for x in grads if x is not None)
        totals.append(size_of(allocations) - results)
        assert totals[-1] == cuattn.attention_backward_workspace_size(*arrays[1:4], **options)
        assert peak - before - results < totals[-1] + 2**16  # NumPy allocates nothing else either
    numbers = 2 if deterministic else 2 + HEAD_DIM  # of a query and head: those of dq as well where order is free
    row = numbers * BATCH * HEADS * arrays[5].dtype.itemsize
    bounded = 4 * 2**20 if "bias" in name else 0
    for seqlen, total in zip(lengths, totals, strict=True):
        assert total <= row * seqlen + seqlen + bounded
    assert totals[1] <= 2 * totals[0] and totals[2] <= 2 * totals[1]
    assert totals[2] < lengths[2] ** 2 / 2  # not even half a byte for each logit of one head


def test_packed_sequences_take_memory_by_their_tokens(allocations):
    """Not by their number times the longest."""
    totals = []
    for tokens in (2048, 4096):
        q, k, dout = (np.zeros((tokens, heads, HEAD_DIM), np.float16) for heads in (HEADS, KV_HEADS, HEADS))
        lse = np.zeros((HEADS, tokens), np.float32)
        lengths = np.array([0, 1, 2, 3, 4, tokens])
        allocations.clear()
        grads = cuattn.attention_varlen_backward(dout, q, k, k, dout, lse, lengths, lengths)
        totals.append(size_of(allocations) - size_of(grads[:3]))
        options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
        assert totals[-1] == cuattn.attention_backward_workspace_size(q, k, k, **options)
        assert totals[-1] <= 2 * lse.nbytes + 16
    assert totals[1] <= 2 * totals[0]


def test_a_mask_of_everything_takes_a_byte_a_tile(allocations):
    arrays, seqlen = long_arrays(1024, 1024), 1024
    mask = np.ones((seqlen, seqlen), bool)
    plain = cuattn.attention_backward_workspace_size(*arrays[1:4])
    masked = cuattn.attention_backward_workspace_size(*arrays[1:4], mask=mask)
    assert 0 < masked - plain <= 2 * (mask.size // (32 * 32))


def small(name, dtype=F16):
    shape = 2, 19, 37, 4, 2, 32, 32
    rng = np.random.default_rng(1)
    q, k, v, dout = (
        rng.standard_normal(s).astype(dtype) for s in ((2, 19, 4, 32), (2, 37, 2, 32), (2, 37, 2, 32), (2, 19, 4, 32))
    )
    options = option_case(name, shape, dtype)
    out, lse = cuattn.attention(q, k, v, return_lse=True, **options)
    return (dout, q, k, v, out, lse), options | {"return_dbias": "bias" in options}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, F16) for name in OPTION_CASES), *(("everything", x) for x in (F32, F64))], ids=str
)
def test_the_size_that_is_said_is_enough(executor, name, dtype):
    """The bits without a workspace, whatever it held, and nothing written beside it; a byte less is refused."""
    arrays, options = small(name, dtype)
    given = {key: executor.array(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
    device_arrays = [executor.array(x) for x in arrays]
    expected = cuattn.attention_backward(*device_arrays, **given)
    size = cuattn.attention_backward_workspace_size(*device_arrays[1:4], **given)
    assert size % 16 == 0
    for fill in (0, 0xFF):
        memory = np.full(size + 1024, fill, np.uint8)
        on_device = executor.array(memory)
        start = -_address(on_device) % 16 + 256
        workspace = on_device[start : start + size]
        grads = cuattn.attention_backward(*device_arrays, **given, workspace=workspace)
        for x, y in zip(grads, expected, strict=True):
            assert (x is None) == (y is None)
            assert x is None or executor.numpy(x).tobytes() == executor.numpy(y).tobytes()
        after = executor.numpy(on_device)
        assert (after[:start] == fill).all() and (after[start + size :] == fill).all()
        assert (after[start : start + size] != fill).any()
    with pytest.raises(ShapeError, match=rf"workspace has {size - 1} bytes; {size} are needed"):
        cuattn.attention_backward(*device_arrays, **given, workspace=workspace[:-1])


def test_the_size_that_is_said_is_enough_for_sums_in_no_order(executor):
    """The sums begin at zero whatever the workspace held."""
    arrays, options = small("everything")
    given = {key: executor.array(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
    device_arrays = [executor.array(x) for x in arrays]
    plain, free = (
        cuattn.attention_backward_workspace_size(*device_arrays[1:4], deterministic=deterministic)
        for deterministic in (True, False)
    )
    assert free - plain == 4 * 2 * 4 * 32 * 32  # float32, of 2 sequences, 4 heads, 19 queries rounded to 32
    size = cuattn.attention_backward_workspace_size(*device_arrays[1:4], **given, deterministic=False)
    for fill in (0, 0xFF):
        memory = executor.array(np.full(size + 1024, fill, np.uint8))
        start = -_address(memory) % 16 + 256
        workspace = memory[start : start + size]
        grads = cuattn.attention_backward(*device_arrays, **given, workspace=workspace, deterministic=False)
        after = executor.numpy(memory)
        assert (after[:start] == fill).all() and (after[start + size :] == fill).all()
        grads = cuattn.AttentionGrads(*(None if x is None else executor.numpy(x) for x in grads))
        options.pop("return_dbias", None)
        assert_gradients_close(grads, *arrays, **options)
    with pytest.raises(ShapeError, match=rf"workspace has {size - 1} bytes; {size} are needed"):
        cuattn.attention_backward(*device_arrays, **given, workspace=workspace[:-1], deterministic=False)


def _address(x):
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


@pytest.mark.parametrize("name", OPTION_CASES)
def test_a_workspace_leaves_nothing_to_allocate(monkeypatch, name):
    """But results."""
    arrays, options = small(name)
    expected = cuattn.attention_backward(*arrays, **options)
    size = cuattn.attention_backward_workspace_size(*arrays[1:4], **options)
    workspace = np.zeros(size + 16, np.uint8)
    workspace = workspace[-workspace.ctypes.data % 16 :][:size]
    into = {name: np.zeros_like(x) for name, x in zip(GRADIENTS, arrays[1:4], strict=True)}
    allocated = []
    empty = executors.HostExecutor.empty
    monkeypatch.setattr(
        executors.HostExecutor, "empty", lambda self, *args: allocated.append(empty(self, *args)) or allocated[-1]
    )
    grads = cuattn.attention_backward(*arrays, **options, **into, workspace=workspace)
    extra = [x for x in (grads.dbias, grads.dsinks) if x is not None]
    assert sum(x.nbytes for x in allocated) == sum(x.nbytes for x in extra)
    for x, y in zip(grads, expected, strict=True):
        assert x is None or x.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", OPTION_CASES)
def test_the_size_follows_from_shapes_and_dtypes(name):
    """Arrays without memory stand for those that are not there yet; strides do not matter."""
    arrays, options = small(name)
    size = cuattn.attention_backward_workspace_size(*arrays[1:4], **options)
    stand_ins = [np.broadcast_to(x.dtype.type(0), x.shape) for x in arrays[1:4]]
    assert cuattn.attention_backward_workspace_size(*stand_ins, **options) == size
    odd = [np.concatenate([x, x], -1)[..., 1 : x.shape[-1] + 1] for x in arrays[1:4]]
    assert cuattn.attention_backward_workspace_size(*odd, **options) == size


def test_one_workspace_serves_call_after_call():
    """Also one that was made for a larger problem."""
    arrays, options = small("everything")
    size = cuattn.attention_backward_workspace_size(*arrays[1:4], **options)
    memory = np.full(2 * size + 16, 0xFF, np.uint8)
    workspace = memory[-memory.ctypes.data % 16 :][: 2 * size]
    for name in ("everything", "none", "bias", "everything"):
        arrays, options = small(name)
        expected = cuattn.attention_backward(*arrays, **options)
        grads = cuattn.attention_backward(*arrays, **options, workspace=workspace)
        for x, y in zip(grads, expected, strict=True):
            assert x is None or x.tobytes() == y.tobytes()


def test_workspaces_of_packed_sequences(executor):
    rng = np.random.default_rng(2)
    q, k, v, dout = (
        rng.standard_normal((n, h, 32)).astype(np.float16) for n, h in ((70, 4), (90, 2), (90, 2), (70, 4))
    )
    lengths = np.array([0, 3, 3, 70], np.int32), np.array([0, 20, 40, 90], np.int32)
    out, lse = cuattn.attention_varlen(q, k, v, *lengths, causal=True, return_lse=True)
    arrays = [executor.array(x) for x in (dout, q, k, v, out, lse)]
    for given in (lengths, tuple(map(executor.array, lengths))):
        named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), given, strict=True))
        size = cuattn.attention_backward_workspace_size(*arrays[1:4], **named, causal=True)
        memory = executor.array(np.full(size + 16, 0xFF, np.uint8))
        workspace = memory[-_address(memory) % 16 :][:size]
        expected = cuattn.attention_varlen_backward(*arrays, **named, causal=True)
        grads = cuattn.attention_varlen_backward(*arrays, **named, causal=True, workspace=workspace)
        for x, y in zip(grads[:3], expected[:3], strict=True):
            assert executor.numpy(x).tobytes() == executor.numpy(y).tobytes()
        with pytest.raises(ShapeError, match=rf"workspace has {size - 1} bytes; {size} are needed"):
            cuattn.attention_varlen_backward(*arrays, **named, causal=True, workspace=workspace[:-1])
