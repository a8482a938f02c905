"""What the mutants of the backward kernels asked for (docs/mutants.md): every path of each kernel, in few variants.

Small head dims, which compile quickly, and for each format the same problems: plain, by position, packed, and with
every option at once.
"""

from __future__ import annotations

import numpy as np
import pytest
from backward_calls import after_forward, assert_gradients_right, assert_right, call_backward
from test_attention_backward import BF16, F16, F32, F64, normal

from cuattn.ops.attention.backward import bias_launch
from cuattn.testing.arrays import Layout
from cuattn.testing.options import make_bias, make_mask, make_slopes

FORMATS = {"float16": (F16, {}), "tf32": (F32, {"precision": "tf32"}), "float32": (F32, {})}
DIM = (32, 32)
LENGTHS = np.int32([0, 70, 70, 103]), np.int32([0, 90, 95, 159])


@pytest.fixture(params=FORMATS)
def format_(request):
    return FORMATS[request.param]


@pytest.mark.parametrize(
    ("seqlens", "options"),
    [
        ((70, 100), {}),
        ((130, 40), {}),
        ((150, 90), {"window": (20, 30)}),
        ((90, 150), {"window": (20, 30)}),
        ((150, 40), {"causal": True}),  # the first queries see nothing
        ((70, 100), {"causal": "top_left"}),  # the last keys are seen by nobody
        ((64, 64), {"window": (0, 0)}),
        ((65, 129), {"diagonal_offset": np.int32([-30, 100]), "causal": True}),
    ],
    ids=str,
)
def test_positions(executor, format_, seqlens, options):
    dtype, more = format_
    saved = after_forward(executor, *normal(dtype, 2, seqlens, (4, 2), DIM), dlse=True, **options, **more)
    assert_right(executor, saved)


@pytest.mark.parametrize(
    ("name", "head_dims"),
    [*((name, (30, 21)) for name in FORMATS), *(("float16", dims) for dims in ((32, 64), (64, 32))),
     ("tf32", (64, 32)), ("float32", (32, 64))],
    ids=str,
)  # fmt: skip
def test_head_dims(executor, name, head_dims):
    dtype, more = FORMATS[name]
    saved = after_forward(executor, *normal(dtype, 2, (40, 70), (2, 1), head_dims), dlse=True, **more)
    assert_right(executor, saved)


def test_float64(executor):
    saved = after_forward(executor, *normal(F64, 2, (40, 70), (2, 1), DIM), dlse=True, window=(30, 20))
    assert_right(executor, saved)


def test_gradients_of_k_and_v_in_two_launches(executor):
    assert_right(executor, after_forward(executor, *normal(F16, 1, (40, 70), (2, 1), (256, 200)), causal=True))


def test_nothing_but_the_gradients_is_written(executor, format_):
    """Where they lie in other strides than q, k and v."""
    dtype, more = format_
    saved = after_forward(executor, *normal(dtype, 2, (70, 45), (4, 2), (32, 24)), **more)
    layout = Layout(order=(0, 2, 1, 3), pad=(0, 3, 1, 8))
    targets = {
        name: executor.guarded(x.shape, dtype, layout)
        for name, x in zip(("dq", "dk", "dv"), saved.arrays[1:4], strict=True)
    }
    grads = call_backward(executor, saved, **{name: target.array for name, target in targets.items()})
    assert_gradients_right(grads, saved)
    for target in targets.values():
        target.check()


def everything(dtype, rng, shape):
    """Options of every kind; of the tiles of the mask some are hidden, some open, some mixed."""
    batch, heads = shape[:2]
    real = F64 if dtype == F64 else F32
    return {
        "mask": make_mask(rng, shape, "blocks", 32),
        "alibi_slopes": make_slopes(rng, (batch, heads)).astype(real),
        "sinks": np.array([0.0, -np.inf, 2.0, 3.0][:heads], real),
        "softcap": 3.0,
        "window": (90, 80),
        "dropout_p": 0.2,
        "dropout_seed": 5,
    }


@pytest.mark.parametrize(
    "bias_shape",
    [(2, 4, 100, 150), (4, 1, 150), (2, 1, 100, 1), (2, 4, 1, 1), (1, 1, 100, 150), (1,)],
    ids=str,
)
def test_everything(executor, format_, bias_shape):
    dtype, more = format_
    rng = np.random.default_rng(3)
    options = everything(dtype, rng, (2, 4, 100, 150)) | {"bias": make_bias(rng, bias_shape, F32, "normal")}
    saved = after_forward(executor, *normal(dtype, 2, (100, 150), (4, 2), DIM), dlse=True, **options, **more)
    assert_right(executor, saved, return_dbias=True)


@pytest.mark.parametrize("bias_shape", [(4, 1, 90), (3, 1, 70, 90), (1, 1)], ids=str)
def test_everything_packed(executor, format_, bias_shape):
    dtype, more = format_
    rng = np.random.default_rng(4)
    options = everything(dtype, rng, (3, 4, 70, 90)) | {"bias": make_bias(rng, bias_shape, F32, "normal")}
    q, k, v = (x[0] for x in normal(dtype, 1, (103, 159), (4, 2), DIM))
    saved = after_forward(executor, q, k, v, *LENGTHS, dlse=True, max_seqlen_q=70, max_seqlen_k=90, **options, **more)
    assert_right(executor, saved, return_dbias=True)


@pytest.fixture(params=[1, 5])
def few_ctas(request, monkeypatch):
    """As on a large problem: a CTA sums several tiles of the gradient of a bias."""
    monkeypatch.setattr(bias_launch, "ENOUGH_CTAS", request.param)
    bias_launch._plan.cache_clear()
    yield
    bias_launch._plan.cache_clear()


@pytest.mark.parametrize("bias_shape", [(1, 1, 100, 150), (4, 1, 150), (2, 1, 100, 1), (4, 1, 1), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_sums_of_several_tiles(executor, few_ctas, dtype, bias_shape):
    rng = np.random.default_rng(8)
    bias = make_bias(rng, bias_shape, F32, "normal")
    arrays = normal(dtype, 2, (100, 150), (4, 2), DIM)
    saved = after_forward(executor, *arrays, bias=bias, window=(40, 30), dlse=True)
    assert_right(executor, saved, return_dbias=True)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_packed(executor, format_, on_device):
    dtype, more = format_
    q, k, v = (x[0] for x in normal(dtype, 1, (103, 159), (4, 2), DIM))
    saved = after_forward(executor, q, k, v, *LENGTHS, dlse=True, causal=True, **more)
    assert_right(executor, saved, schedule_on_device=on_device)


@pytest.mark.parametrize(("seqlen_q", "head_dims"), [(75, DIM), (75, (25, 64)), (80, DIM), (75, (96, 70))], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (20, 30)}], ids=str)
def test_any_order(executor, seqlen_q, head_dims, options):
    """dq as sums that are added to: in the strides of the caller, and nothing beside them."""
    saved = after_forward(executor, *normal(F16, 2, (seqlen_q, 150), (4, 2), head_dims), dlse=True, **options)
    target = executor.guarded(saved.arrays[1].shape, F16, Layout(order=(0, 2, 1, 3), pad=(0, 3, 1, 8)))
    grads = call_backward(executor, saved, deterministic=False, dq=target.array)
    assert_gradients_right(grads, saved)
    target.check()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_any_order_packed(executor, on_device):
    rng = np.random.default_rng(7)
    q, k, v = (x[0] for x in normal(F16, 1, (103, 159), (4, 2), DIM))
    options = everything(F16, rng, (3, 4, 70, 90)) | {"max_seqlen_q": 70, "max_seqlen_k": 90}
    if on_device:
        options = {"causal": True}
    saved = after_forward(executor, q, k, v, *LENGTHS, dlse=True, **options)
    assert_right(executor, saved, deterministic=False, schedule_on_device=on_device)


@pytest.mark.parametrize("kind", ["mask", "dropout", "bias", "softcap", "alibi"])
def test_one_option(executor, format_, kind):
    dtype, more = format_
    rng = np.random.default_rng(5)
    options = {
        "mask": {"mask": make_mask(rng, (2, 4, 140, 150), "blocks", 32)},
        "dropout": {"dropout_p": 0.4, "dropout_seed": 9, "dropout_offset": 3},
        "bias": {"bias": make_bias(rng, (2, 4, 140, 150), F32, "infinities")},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": make_slopes(rng, (4,))},
    }[kind]
    saved = after_forward(executor, *normal(dtype, 2, (140, 150), (4, 2), DIM), **options, **more)
    assert_right(executor, saved)


def test_a_logit_of_infinity_is_felt_by_those_who_see_it(executor, format_):
    """lse is NaN there; what is hidden in the same row is exactly 0."""
    dtype, more = format_
    rng = np.random.default_rng(6)
    bias = np.zeros((70, 80), np.float32)
    bias[5, 7] = bias[40, 60] = np.inf
    bias[5, 20:] = -np.inf
    mask = rng.random((70, 80)) < 0.8
    mask[[5, 40], [7, 60]] = True
    saved = after_forward(executor, *normal(dtype, 1, (70, 80), (2, 1), DIM), bias=bias, mask=mask, **more)
    grads = assert_right(executor, saved, return_dbias=True)
    assert np.isnan(grads.dq).any() and np.isnan(grads.dk).any()
    assert np.isfinite(grads.dk[0, 30]).all() or mask[40, 30]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (33, 16), (300, 150), (700, 3), (1100, 3)])
def test_sinks_alone(executor, seqlen_q, seqlen_k):
    """Rows of several entries of the batch, more and fewer than a CTA has threads; some see nothing."""
    arrays = normal(F16, 3, (seqlen_q, seqlen_k), (4, 2), DIM)
    sinks = np.float32([0.5, -np.inf, 1.0, 4.0])
    saved = after_forward(executor, *arrays, dlse=True, causal=True, sinks=sinks)
    assert_right(executor, saved)


def test_a_dbias_of_one_number_from_many_tiles(executor):
    """More terms than one CTA takes."""
    bias = np.float32([0.25])
    saved = after_forward(executor, *normal(F16, 2, (260, 300), (2, 1), DIM), bias=bias, causal=True, dlse=True)
    assert_right(executor, saved, return_dbias=True)


@pytest.mark.parametrize(("dtype", "options"), [(BF16, {}), (F32, {"precision": "tf32"}), (F32, {})], ids=str)
def test_a_row_whose_logits_all_overflow_sees_nothing(executor, dtype, options):
    """Its lse is -inf, though no key is hidden."""
    q, k, v = normal(dtype, 1, (40, 50), (2, 1), DIM)
    q[...], k[...] = 1e30, -1e30
    saved = after_forward(executor, q, k, v, **options)
    assert np.isneginf(saved.lse).all()
    grads = call_backward(executor, saved)
    assert not (grads.dq.any() or grads.dk.any() or grads.dv.any())
