"""What linear attention refuses, before anything is launched or written."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from linear_calls import F16, F32, F64, qkv, state_like

import cuattn
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, OverlapError, ShapeError

RNG = np.random.default_rng(0)
Q, K, V = qkv(RNG, F32, 6, (4, 2, 2), (8, 12))
STATE = state_like(RNG, K, V)
NAN, INF = np.nan, np.inf


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


REFUSED = [
    # shapes
    (ShapeError, {"q": Q[0]}, "rank 3"),
    (ShapeError, {"k": K[:1], "v": V[:1]}, "same batch"),
    (ShapeError, {"k": K[:, :5]}, "same tokens"),
    (ShapeError, {"k": K[:, :5], "v": V[:, :5]}, "6 tokens and k has 5"),
    (ShapeError, {"k": K[..., :7]}, "head dim 7"),
    (ShapeError, {"q": zeros(2, 6, 3, 8)}, "multiple"),
    (ShapeError, {"v": zeros(2, 6, 3, 12)}, "multiple"),
    (ShapeError, {"k": zeros(2, 6, 0, 8)}, "multiple"),
    (ShapeError, {"q": zeros(2, 6, 4, 257), "k": zeros(2, 6, 2, 257)}, "1 to 256"),
    (ShapeError, {"v": zeros(2, 6, 2, 0)}, "1 to 256"),
    (ShapeError, {"decay": zeros(3)}, "decay has shape"),
    (ShapeError, {"decay": zeros(2, 6, 3)}, "decay has shape"),
    (ShapeError, {"decay": zeros(2, 6, 2, 12)}, "decay has shape"),
    (ShapeError, {"decay": np.array(-1.0)}, "decay has shape"),
    (ShapeError, {"initial_state": (STATE.s[:1], STATE.z)}, "initial_state.s"),
    (ShapeError, {"initial_state": (STATE.s, STATE.z[:, :1])}, "initial_state.z"),
    (ShapeError, {"state_out": (STATE.s.swapaxes(2, 3), STATE.z)}, "state_out.s"),
    (ShapeError, {"out": zeros(2, 6, 2, 12)}, "out has shape"),
    # dtypes
    (DTypeError, {"q": Q.astype(F16)}, "k has dtype float32"),
    (DTypeError, {"q": Q.astype(int), "k": K.astype(int), "v": V.astype(int)}, "int64"),
    (DTypeError, {"decay": zeros(2, 6, 2, dtype=int)}, "decay has dtype"),
    (DTypeError, {"decay": zeros(2, dtype=complex)}, "decay has dtype"),
    (DTypeError, {"initial_state": (STATE.s.astype(F64), STATE.z)}, "initial_state.s"),
    (DTypeError, {"out": zeros(2, 6, 4, 12, dtype=F64)}, "out has dtype"),
    # values
    (ArgumentError, {"feature_map": "elu"}, "None, 'elu1', 'relu' and 'square'"),
    (ArgumentError, {"feature_map": 1}, "feature_map"),
    (ArgumentError, {"causal": 1.0}, "causal"),
    (ArgumentError, {"normalize": None}, "normalize"),
    (ArgumentError, {"return_state": "yes"}, "return_state"),
    (ArgumentError, {"causal": False, "decay": [-1.0, -1.0]}, "causal=True"),
    (ArgumentError, {"chunk": 48}, "chunk"),
    (ArgumentError, {"chunk": "64"}, "chunk"),
    (ArgumentError, {"scale": "1"}, "scale"),
    (ArgumentError, {"initial_state": STATE.s}, "LinearState"),
    (ArgumentError, {"initial_state": (STATE.s, None)}, "no z"),
    (ArgumentError, {"state_out": (STATE.s, None)}, "no z"),
    (NonFiniteError, {"scale": INF}, "scale"),
    (NonFiniteError, {"eps": NAN}, "eps"),
    (NonFiniteError, {"decay": [NAN, 0.0]}, "decay"),
    (NonFiniteError, {"decay": [INF, 0.0]}, "decay"),
    # kinds and places
    (ArrayTypeError, {"q": "q"}, "q"),
    (ArrayTypeError, {"initial_state": ("s", "z")}, "initial_state.s"),
    (OverlapError, {"q": zeros(2, 6, 2, 12), "k": zeros(2, 6, 2, 12), "out": V}, "v"),
    (OverlapError, {"state_out": (STATE.s, STATE.s[..., 0])}, "state_out"),
]


@pytest.mark.parametrize(("error", "wrong", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(error, wrong, message):
    arguments = {"q": Q, "k": K, "v": V} | wrong
    before = {name: x.copy() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error, match=message):
        cuattn.linear_attention(**arguments)
    for name, x in before.items():
        np.testing.assert_array_equal(arguments[name], x)


def test_a_state_out_of_parts_of_the_initial_state():
    memory = zeros(2 * STATE.s.size)
    halves = memory[: STATE.s.size].reshape(STATE.s.shape), memory[1 : STATE.s.size + 1].reshape(STATE.s.shape)
    z = zeros(*STATE.z.shape)
    with pytest.raises(OverlapError, match="initial_state"):
        cuattn.linear_attention(Q, K, V, initial_state=(halves[0], z), state_out=(halves[1], z))


@pytest.mark.parametrize(
    ("error", "cu_seqlens", "message"),
    [
        (ArgumentError, [1, 6], "begins at 0"),
        (ArgumentError, [0, 4, 3, 6], "descends"),
        (ArgumentError, [0, 4], "span all 6"),
        (ShapeError, [], "batch"),
        (ShapeError, [[0, 6]], "batch"),
        (DTypeError, [0.0, 6.0], "integers"),
    ],
)
def test_lists_of_sequences(error, cu_seqlens, message):
    with pytest.raises(error, match=message):
        cuattn.linear_attention_varlen(Q[0], K[0], V[0], cu_seqlens)


def test_packed_shapes():
    for wrong in ({"q": Q}, {"q": Q[0, :5], "causal": False}, {"decay": zeros(2, 6, 2)}, {"initial_state": STATE}):
        arguments = {"q": Q[0], "k": K[0], "v": V[0]} | wrong
        with pytest.raises(ShapeError):
            cuattn.linear_attention_varlen(*(arguments.pop(name) for name in "qkv"), [0, 6], **arguments)


def test_summaries_are_checked_alike():
    with pytest.raises(ShapeError, match="same tokens"):
        cuattn.linear_attention_summary(K, V[:, :5])
    with pytest.raises(NonFiniteError, match="decay"):
        cuattn.linear_attention_summary(K, V, decay=[NAN, 0.0])


def test_signatures():
    """Names, their order and defaults."""
    common = {
        "causal": True,
        "feature_map": "elu1",
        "normalize": True,
        "eps": 0.0,
        "scale": None,
        "decay": None,
        "initial_state": None,
        "return_state": False,
        "chunk": None,
        "out": None,
        "state_out": None,
    }
    for function, arrays in (
        (cuattn.linear_attention, ["q", "k", "v"]),
        (cuattn.linear_attention_varlen, ["q", "k", "v", "cu_seqlens"]),
    ):
        parameters = inspect.signature(function).parameters
        assert [name for name, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD] == arrays
        keywords = {name: x.default for name, x in parameters.items() if x.kind is x.KEYWORD_ONLY}
        assert keywords == common
    assert cuattn.LinearState._fields == ("s", "z")
