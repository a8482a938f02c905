"""The gradients of cuattn.compat.flash_attn: arguments as in the forward functions, results where their inputs lie."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from test_compat_flash_attn import SAME, arguments

import cuattn
from cuattn.compat import flash_attn
from cuattn.errors import ArgumentError, CuattnError, DTypeError, OverlapError, ShapeError
from cuattn.runtime import executor as executors
from cuattn.testing import assert_gradients_close, assert_varlen_gradients_close

FORWARD = [name.removesuffix("_backward") for name in flash_attn.__all__ if name.endswith("_backward")]
LENGTHS_Q, LENGTHS_K = np.array([0, 3, 3, 12], np.int32), np.array([0, 1, 8, 15], np.int32)


def make(*, packed=False, dtype=np.float16, seed=0, same_heads=False, same_lengths=False):
    """q and kv: two sequences of 9 queries and 13 keys, or three packed ones of 12 and 15 tokens."""
    rng = np.random.default_rng(seed)
    kv_heads = 4 if same_heads else 2
    leading_q, leading_k = ((12,), (15,)) if packed else ((2, 9), (2, 13))
    q = rng.standard_normal((*leading_q, 4, 32)).astype(dtype)
    kv = rng.standard_normal((*(leading_q if same_lengths else leading_k), 2, kv_heads, 32)).astype(dtype)
    return q, kv, rng.standard_normal(q.shape).astype(dtype)


def forward(executor, q, kv, lengths, options):
    """out and lse of the forward function, and k and v."""
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]
    function = flash_attn.flash_attn_varlen_func if lengths else flash_attn.flash_attn_func
    out, lse, _ = function(*(executor.array(x) for x in (q, k, v)), *lengths, **options, return_attn_probs=True)
    return k, v, executor.numpy(out), executor.numpy(lse)


def named(executor, dq, dk, dv):
    return SimpleNamespace(dq=executor.numpy(dq), dk=executor.numpy(dk), dv=executor.numpy(dv), dbias=None, dsinks=None)


@pytest.mark.parametrize("name", FORWARD)
def test_signatures(name):
    """dout, the arrays of the forward call, out and softmax_lse, and then the rest of the forward call."""
    ours = inspect.signature(getattr(flash_attn, f"{name}_backward")).parameters
    theirs = inspect.signature(getattr(flash_attn, name)).parameters
    arrays = [x for x in theirs if x in ("q", "k", "v", "kv", "qkv")]
    rest = [x for x in theirs if x not in (*arrays, "return_attn_probs", "block_table")]
    gradients = [f"d{x}" for x in arrays]
    positional = [x for x in rest if not x.startswith(("dropout_seed", "dropout_offset"))]
    expected = ["dout", *arrays, "out", "softmax_lse", *positional]
    assert [x.name for x in ours.values() if x.kind is x.POSITIONAL_OR_KEYWORD] == expected
    assert [x.name for x in ours.values() if x.kind is x.KEYWORD_ONLY] == [
        *gradients,
        "dropout_seed",
        "dropout_offset",
    ]
    assert all(ours[x].default == theirs[x].default for x in rest)


@pytest.mark.parametrize(("theirs", "ours"), SAME, ids=lambda options: "-".join(options) or "plain")
def test_options_mean_what_they_say(executor, theirs, ours):
    q, kv, dout = make()
    theirs = arguments(executor, theirs)
    k, v, out, lse = forward(executor, q, kv, (), theirs)
    grads = flash_attn.flash_attn_func_backward(*(executor.array(x) for x in (dout, q, k, v, out, lse)), **theirs)
    assert_gradients_close(named(executor, *grads), dout, q, k, v, out, lse, **ours)


@pytest.mark.parametrize(("theirs", "ours"), SAME[::3], ids=lambda options: "-".join(options) or "plain")
def test_options_of_packed_sequences(executor, theirs, ours):
    q, kv, dout = make(packed=True)
    theirs, lengths = arguments(executor, theirs), (LENGTHS_Q, LENGTHS_K)
    on_device = [executor.array(x) for x in lengths]
    k, v, out, lse = forward(executor, q, kv, (*on_device, 9, 7), theirs)
    grads = flash_attn.flash_attn_varlen_func_backward(
        *(executor.array(x) for x in (dout, q, k, v, out, lse)), *on_device, 9, 7, **theirs
    )
    assert_varlen_gradients_close(named(executor, *grads), dout, q, k, v, out, lse, *lengths, **ours)


OPTIONS = {
    "deterministic": True,
    "softmax_scale": 0.5,
    "causal": True,
    "window_size": (4, 2),
    "softcap": 2.0,
    "alibi_slopes": [0.5, 0, 1, 2],
}


def slopes(options):
    return options | {"alibi_slopes": np.array(options["alibi_slopes"], np.float32)}


@pytest.mark.parametrize("given", (False, True), ids=["new", "given"])
@pytest.mark.parametrize("packed", (False, True), ids=["dense", "varlen"])
@pytest.mark.parametrize("together", ("qkv", "kv"))
def test_gradients_lie_as_their_inputs_do(executor, together, packed, given):
    """In one array, of which a kernel writes each part: the bits of the functions that take three."""
    q, kv, dout = make(packed=packed, same_heads=together == "qkv", same_lengths=together == "qkv")
    infix = "_varlen" if packed else ""
    options = slopes(OPTIONS) | {"dropout_p": 0.2, "dropout_seed": 5, "dropout_offset": 1}
    lengths = (executor.array(LENGTHS_Q), executor.array(LENGTHS_Q if together == "qkv" else LENGTHS_K), 9, 9)
    lengths = lengths if packed else ()
    k, v, out, lse = forward(executor, q, kv, lengths, options)
    separate = getattr(flash_attn, f"flash_attn{infix}_func_backward")(
        *(executor.array(x) for x in (dout, q, k, v, out, lse)), *lengths, **options
    )
    expected = [executor.numpy(x) for x in separate]
    axis = q.ndim - 2
    dout, out, lse = map(executor.array, (dout, out, lse))
    if together == "qkv":
        qkv = executor.array(np.stack([q, k, v], axis))
        into = {"dqkv": executor.array(np.full(qkv.shape, np.nan, np.float16))} if given else {}
        rest = (lengths[0], 9) if packed else ()
        function = getattr(flash_attn, f"flash_attn{infix}_qkvpacked_func_backward")
        result = function(dout, qkv, out, lse, *rest, **options, **into)
        got = np.moveaxis(executor.numpy(result), axis, 0)
    else:
        kv = executor.array(kv)
        into = {}
        if given:
            into["dq"] = executor.array(np.full(q.shape, np.nan, np.float16))
            into["dkv"] = executor.array(np.full(kv.shape, np.nan, np.float16))
        function = getattr(flash_attn, f"flash_attn{infix}_kvpacked_func_backward")
        dq, result = function(dout, executor.array(q), kv, out, lse, *lengths, **options, **into)
        assert not given or dq is into["dq"]
        got = executor.numpy(dq), *np.moveaxis(executor.numpy(result), axis, 0)
    assert not given or result is into["dqkv" if together == "qkv" else "dkv"]
    for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("name", FORWARD)
def test_nothing_is_concatenated(monkeypatch, name):
    """Kernels write to the memory that is returned: one allocation for gradients that lie together."""
    allocated = []
    empty = executors.HostExecutor.empty
    monkeypatch.setattr(
        executors.HostExecutor, "empty", lambda self, *args: allocated.append(empty(self, *args)) or allocated[-1]
    )
    packed = "varlen" in name
    q, kv, dout = make(packed=packed, same_heads=True, same_lengths=True)
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]
    axis = q.ndim - 2
    arrays = (np.stack([q, k, v], axis),) if "qkv" in name else (q, kv) if "kvpacked" in name else (q, k, v)
    lengths = ((LENGTHS_Q, 9) if "qkv" in name else (LENGTHS_Q, LENGTHS_Q, 9, 9)) if packed else ()
    out, lse, _ = getattr(flash_attn, name)(*arrays, *lengths, return_attn_probs=True)
    allocated.clear()
    result = getattr(flash_attn, f"{name}_backward")(dout, *arrays, out, lse, *lengths)
    results = result if isinstance(result, tuple) else (result,)
    assert [x.shape for x in results] == [x.shape for x in arrays]
    for x in results:
        assert any(x is y for y in allocated)
    assert sum(x.nbytes for x in allocated if x.dtype == np.float16) == sum(x.nbytes for x in arrays)


def test_no_query_heads():
    """Nobody reads the keys, so no kernel runs, and all gradients are zeros."""
    kv = np.ones((2, 3, 2, 4, 32), np.float16)
    q = np.ones((2, 5, 0, 32), np.float16)
    lse = np.ones((2, 0, 5), np.float32)
    dq, dkv = flash_attn.flash_attn_kvpacked_func_backward(q, q, kv, q, lse)
    assert dq.shape == q.shape and dkv.shape == kv.shape
    assert not dkv.any()


@pytest.mark.parametrize("name", FORWARD)
def test_everything_is_handed_on(monkeypatch, name):
    """What reaches the checks, for arguments by position."""
    calls = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        raise ArgumentError("seen")

    targets = ("cuattn.ops.attention.backward.arguments.check", "cuattn.ops.attention.backward.arguments.check_packed")
    for target in targets:
        monkeypatch.setattr(target, record)
    for public in ("attention_backward", "attention_varlen_backward"):
        monkeypatch.setattr(cuattn, public, record)
    packed = "varlen" in name
    q, kv, dout = make(packed=packed, same_heads=True, same_lengths=True)
    axis = q.ndim - 2
    qkv = np.concatenate([np.expand_dims(q, axis), kv], axis)
    arrays = (qkv,) if "qkv" in name else (q, kv) if "kvpacked" in name else (q, kv[..., 0, :, :], kv[..., 1, :, :])
    lengths = (("cu", 5) if "qkv" in name else ("cu_q", "cu_k", 5, 6)) if packed else ()
    gradients = {
        f"d{x}": np.zeros_like(y) for x, y in zip(("qkv",) if "qkv" in name else ("q", "kv"), arrays, strict=False)
    }
    if "packed" not in name:
        gradients = {"dq": "dq", "dk": "dk", "dv": "dv"}
    values = (0.1, 0.5, True, (3, -1), 2.0, "slopes", True)
    with pytest.raises(ArgumentError, match="seen"):
        getattr(flash_attn, f"{name}_backward")(
            dout, *arrays, "out", "lse", *lengths, *values, **gradients, dropout_seed=3, dropout_offset=4
        )
    ((args, kwargs),) = calls
    assert args[0] is dout and args[4:6] == ("out", "lse")
    for x, y in zip(args[1:4], (q, kv[..., 0, :, :], kv[..., 1, :, :]), strict=True):
        np.testing.assert_array_equal(x, y)
    expected = {
        **{"scale": 0.5, "causal": True, "window": (3, None), "softcap": 2.0, "alibi_slopes": "slopes"},
        **{"dropout_p": 0.1, "dropout_seed": 3, "dropout_offset": 4, "deterministic": True},
    }
    if packed:
        assert args[6:] == (("cu", "cu") if "qkv" in name else ("cu_q", "cu_k"))
        expected |= {"max_seqlen_q": 5, "max_seqlen_k": 5 if "qkv" in name else 6}
    given = {x: kwargs.pop(x) for x in ("dq", "dk", "dv")}
    assert kwargs == expected
    for x, y in gradients.items():
        if x == "dq" or isinstance(y, str):
            assert given[x] is y
        else:
            assert all(np.shares_memory(given[f"d{part}"], y) for part in x[1:])


def test_deterministic_is_handed_on():
    """False by default, as in the package: the order of sums is then free."""
    assert inspect.signature(flash_attn.flash_attn_func_backward).parameters["deterministic"].default is False
    x = np.zeros((1, 2, 1, 32), np.float16)
    with pytest.raises(ArgumentError, match="deterministic is 1"):
        flash_attn.flash_attn_func_backward(x, x, x, x, x, np.zeros((1, 1, 2), np.float32), deterministic=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"dropout_p": 0.1}, ArgumentError, "dropout_p is 0.1 and dropout_seed is None"),
        ({"window_size": 3}, ArgumentError, "window_size is 3"),
        ({"softcap": None}, ArgumentError, "softcap is None"),
        ({"softmax_scale": "1"}, ArgumentError, "softmax_scale is '1'"),
        ({"dkv": np.zeros((2, 13, 3, 2, 32), np.float16)}, ShapeError, r"dkv has shape .* \[batch, seqlen_k, 2,"),
        ({"dkv": np.zeros((2, 12, 2, 2, 32), np.float16)}, ShapeError, "dk has shape"),
        ({"dkv": np.zeros((2, 13, 2, 2, 32), np.float32)}, DTypeError, "dk has dtype float32"),
        ({"dkv": [1]}, TypeError, r"dkv: .*list is no array"),
        ({"kv": np.zeros((2, 13, 2, 32), np.float16)}, ShapeError, r"kv has shape .* \[batch, seqlen_k, 2,"),
        ({"kv": np.zeros((2, 13, 2, 2, 32), np.int8)}, DTypeError, "k has dtype int8"),
        ({"dout": np.zeros((2, 9, 4, 31), np.float16)}, ShapeError, "dout has shape"),
        ({"softmax_lse": np.zeros((2, 4, 9), np.float16)}, DTypeError, "lse has dtype float16"),
    ),
    ids=lambda x: None if callable(x) else str(x)[:40],
)
def test_wrong_arguments(changes, error, message):
    q, kv, dout = make()
    call = {"dout": dout, "q": q, "kv": kv, "out": q, "softmax_lse": np.zeros((2, 4, 9), np.float32)}
    with pytest.raises(error, match=message) as caught:
        flash_attn.flash_attn_kvpacked_func_backward(**call | changes)
    assert isinstance(caught.value, CuattnError)


def test_gradients_over_their_inputs():
    q, kv, dout = make()
    lse = np.zeros((2, 4, 9), np.float32)
    with pytest.raises(OverlapError, match="dk lies in the memory range of k"):
        flash_attn.flash_attn_kvpacked_func_backward(dout, q, kv, q.copy(), lse, dkv=kv)
