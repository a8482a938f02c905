"""What differential attention refuses: a typed error that names the argument, before anything is launched."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cuattn
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, OverlapError, ShapeError
from cuattn.runtime import executor as executors


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(executors.Executor, "launch", refuse)


def arrays(q=(2, 5, 8, 32), k=(2, 7, 4, 32), v=(2, 7, 2, 24), dtype=np.float16):
    return [np.ones(shape, dtype) for shape in (q, k, v)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    (
        ({"q": (5, 8, 32)}, r"q has shape \(5, 8, 32\), rank 3"),
        ({"v": (2, 7, 2, 24, 1)}, "v has shape .* rank 5"),
        ({"k": (3, 7, 4, 32), "v": (3, 7, 2, 24)}, "k has batch 3 .* q has batch 2"),
        ({"v": (1, 7, 2, 24)}, "v has batch 1"),
        ({"v": (2, 8, 2, 24)}, "v has seqlen 8 .* k has seqlen 7"),
        ({"k": (2, 7, 4, 31)}, "k has head dim 31 and q has head dim 32"),
        ({"q": (2, 5, 8, 257), "k": (2, 7, 4, 257)}, "q has head dim 257; allowed are 1 to 256"),
        ({"v": (2, 7, 2, 257)}, "v has head dim 257"),
        ({"v": (2, 7, 2, 0)}, "v has head dim 0"),
        ({"q": (2, 5, 7, 32)}, "q has 7 heads; they come in pairs"),
        ({"k": (2, 7, 3, 32)}, "k has 3 heads and v has 2; k has twice as many as v .* or as many"),
        ({"q": (2, 5, 6, 32)}, "q has 3 pairs of heads and v has 2 heads"),
        ({"k": (2, 7, 0, 32), "v": (2, 7, 0, 24)}, "q has 4 pairs of heads and v has 0 heads"),
    ),
)
def test_shapes(shapes, message):
    with pytest.raises(ShapeError, match=message):
        cuattn.differential_attention(*arrays(**shapes), 0.5)


def test_an_extent_of_two_to_the_31():
    q, k, v = arrays()
    with pytest.raises(ShapeError, match=f"k has shape .* at most {2**31 - 1}"):
        cuattn.differential_attention(q, np.broadcast_to(k[:, :1], (2, 2**31, 4, 32)), v, 0.5)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    (((np.int32,) * 3, "q has dtype int32"), ((np.float16, np.float32, np.float16), "k has dtype float32 and q")),
)
def test_dtypes(dtypes, message):
    with pytest.raises(DTypeError, match=message):
        cuattn.differential_attention(*(x.astype(d) for x, d in zip(arrays(), dtypes, strict=True)), 0.5)


@pytest.mark.parametrize(
    ("lambda_", "error", "message"),
    (
        (None, ArgumentError, "lambda_ is None"),
        (True, ArgumentError, "lambda_ is True"),
        ("0.5", ArgumentError, "lambda_ is '0.5'"),
        (math.nan, NonFiniteError, "lambda_ is nan"),
        ([0.1, 0.2, 0.3], ShapeError, r"lambda_ has shape \[3\]; allowed is \[\] or \[4\] or \[2, 5, 4\]"),
        (np.ones((2, 4, 5)), ShapeError, r"lambda_ has shape \[2, 4, 5\]; allowed is \[\] or \[4\] or \[2, 5, 4\]"),
        (np.ones((2, 5)), ShapeError, "lambda_ has shape"),
        (np.ones((2, 5, 4), complex), DTypeError, "lambda_ has dtype complex128"),
        ([0.1, 0.2, math.inf, 0.3], NonFiniteError, "lambda_ holds inf"),
        (object(), ArrayTypeError, "lambda_"),
    ),
)
def test_lambda(lambda_, error, message):
    with pytest.raises(error, match=message):
        cuattn.differential_attention(*arrays(), lambda_)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"norm": 1}, ArgumentError, "norm is 1"),
        ({"return_state": 1}, ArgumentError, "return_state is 1"),
        ({"norm_weight": np.ones(24)}, ArgumentError, "norm_weight is given and norm is False"),
        ({"norm": True, "norm_weight": np.ones(23)}, ShapeError, r"norm_weight has shape \[23\]; allowed is \[24\]"),
        ({"norm": True, "norm_weight": [math.nan] * 24}, NonFiniteError, "norm_weight holds nan"),
        ({"eps": -1e-9}, ArgumentError, "eps is -1e-09; a finite number from 0"),
        ({"eps": math.inf}, NonFiniteError, "eps is inf"),
        ({"eps": 1e39}, ArgumentError, "eps is 1e"),
        ({"output_scale": math.nan}, NonFiniteError, "output_scale is nan"),
        ({"output_scale": "1"}, ArgumentError, "output_scale is '1'"),
        (
            {"alibi_slopes": np.ones(2)},
            ShapeError,
            r"alibi_slopes has shape \[2\]; allowed is \[8\] or \[2, 8\] or \[4\]",
        ),
        ({"bias": np.ones((3, 5, 7))}, ShapeError, r"bias has shape .* = \[2, 8, 5, 7\] \(or half as many heads\)"),
        ({"mask": np.ones((2, 2, 8, 5, 7), bool)}, ShapeError, "mask has shape"),
        ({"mask": np.ones((5, 7))}, DTypeError, "mask has dtype float64"),
        ({"window": 3}, ArgumentError, "window is 3"),
        ({"dropout_p": 1.0}, ArgumentError, "dropout_p is 1.0"),
        ({"scale": math.inf}, NonFiniteError, "scale is inf"),
        ({"out": np.ones((2, 5, 8, 24), np.float16)}, ShapeError, "out has shape"),
        ({"out": np.ones((2, 5, 4, 24), np.float32)}, DTypeError, "out has dtype"),
    ),
    ids=str,
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        cuattn.differential_attention(*arrays(), 0.5, **options)


@pytest.mark.parametrize("keyword", ("sinks", "precision", "q_descale", "color"))
def test_options_that_it_does_not_take(keyword):
    with pytest.raises(
        TypeError, match=rf"^differential_attention\(\) got an unexpected keyword argument '{keyword}'$"
    ):
        cuattn.differential_attention(*arrays(), 0.5, **{keyword: None})


def test_overlap():
    q, k, v = arrays(q=(2, 7, 8, 32), v=(2, 7, 4, 32), k=(2, 7, 4, 32))
    with pytest.raises(OverlapError, match="out lies in the memory range of v"):
        cuattn.differential_attention(q, k, v, 0.5, out=v)
    lam = np.ones((2, 7, 4), np.float32)
    out = np.lib.stride_tricks.as_strided(lam.view(np.float16), (2, 7, 4, 1), (112, 16, 4, 2))
    with pytest.raises(OverlapError, match="out lies in the memory range of lambda_"):
        cuattn.differential_attention(q, k, v[..., :1], lam, out=out)


def test_the_lambda_of_a_layer():
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((3, 16)).astype(np.float16) for _ in range(4)]
    got = cuattn.differential_lambda(*vectors, cuattn.lambda_init(2))
    assert got.dtype == np.float32 and got.shape == (3,)
    expected = cuattn.reference.differential_lambda(*vectors, 0.8 - 0.6 * math.exp(-0.6))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert cuattn.differential_lambda(*(x[0].astype(float) for x in vectors), 0.2).dtype == np.float64
    assert cuattn.lambda_init(0) == pytest.approx(0.2) and cuattn.lambda_init(100) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"lq1": np.ones((1, 2, 3))}, ShapeError, "lq1 has shape"),
        ({"lk2": np.ones(5)}, ShapeError, r"lk2 has shape \(5,\) and lq1 has shape \(4,\)"),
        ({"lk1": np.ones(4, int)}, DTypeError, "lk1 has dtype int64"),
        ({"lq2": [1.0] * 4}, ArrayTypeError, "lq2"),
        ({"lambda_init": None}, ArgumentError, "lambda_init is None"),
        ({"lambda_init": math.nan}, NonFiniteError, "lambda_init is nan"),
    ),
)
def test_bad_vectors(change, error, message):
    given = dict.fromkeys(("lq1", "lk1", "lq2", "lk2"), np.ones(4)) | {"lambda_init": 0.2} | change
    with pytest.raises(error, match=message):
        cuattn.differential_lambda(**given)


@pytest.mark.parametrize(("depth", "error"), ((-1, ArgumentError), (math.inf, NonFiniteError), ("1", ArgumentError)))
def test_bad_depth(depth, error):
    with pytest.raises(error, match="depth is"):
        cuattn.lambda_init(depth)
