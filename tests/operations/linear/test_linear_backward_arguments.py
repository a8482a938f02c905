"""What the gradients of linear attention refuse, before anything is launched or written, and what they are given."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from idle_executor import install
from linear_calls import F16, F32, F64, qkv, state_like

import cuattn
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, ShapeError

RNG = np.random.default_rng(0)
Q, K, V = qkv(RNG, F32, 6, (4, 2, 2), (8, 12))
DOUT = RNG.standard_normal((2, 6, 4, 12)).astype(F32)
STATE = state_like(RNG, K, V)

REFUSED = [
    (ShapeError, {"dout": DOUT[:, :5]}, "dout has shape"),
    (ShapeError, {"dout": DOUT[:, :, :2]}, r"\(2, 6, 4, 12\), is needed"),
    (ShapeError, {"dout": DOUT[..., :8]}, "dout has shape"),
    (ShapeError, {"k": K[:, :5], "v": V[:, :5]}, "6 tokens and k has 5"),
    (ShapeError, {"decay": np.zeros(3, F32)}, "decay has shape"),
    (ShapeError, {"dstate": (STATE.s[:1], STATE.z)}, "dstate.s"),
    (ShapeError, {"dstate": (STATE.s, STATE.z[..., :3])}, "dstate.z"),
    (ShapeError, {"initial_state": (STATE.s[:1], STATE.z)}, "initial_state.s"),
    (DTypeError, {"dout": DOUT.astype(F16)}, "dout has dtype float16"),
    (DTypeError, {"q": Q.astype(F64)}, "k has dtype float32"),
    (DTypeError, {"dstate": (STATE.s.astype(F64), STATE.z)}, "dstate.s"),
    (ArgumentError, {"dstate": STATE.s}, "LinearState"),
    (ArgumentError, {"initial_state": (STATE.s, None)}, "no z"),
    (ArgumentError, {"causal": False, "decay": [-1.0, -1.0]}, "causal=True"),
    (ArgumentError, {"feature_map": "gelu"}, "feature_map"),
    (ArgumentError, {"chunk": 5}, "chunk"),
    (NonFiniteError, {"scale": np.nan}, "scale"),
    (NonFiniteError, {"decay": [np.nan, 0.0]}, "decay"),
    (ArrayTypeError, {"dout": "dout"}, "dout"),
    (ArrayTypeError, {"dout": None}, "dout"),
    (ArrayTypeError, {"dstate": ("s", "z")}, "dstate.s"),
]


@pytest.mark.parametrize(("error", "wrong", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(monkeypatch, error, wrong, message):
    idle = install(monkeypatch)
    with pytest.raises(error, match=message):
        cuattn.linear_attention_backward(**{"dout": DOUT, "q": Q, "k": K, "v": V} | wrong)
    assert not idle.allocated


def test_the_options_are_those_of_the_forward():
    forward = inspect.signature(cuattn.linear_attention).parameters
    backward = inspect.signature(cuattn.linear_attention_backward).parameters
    assert list(backward) == ["dout", *(n for n in forward if n not in ("return_state", "out", "state_out")), "dstate"]
    assert all(backward[name].default == forward[name].default for name in backward if name in forward)
    assert cuattn.LinearGrads._fields == ("dq", "dk", "dv", "ddecay", "dbeta", "dinitial_state")
