"""Numbers, flags, names and small arrays in every form that means the same; and what means something else."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import errors, host, scalars
from cuattn.runtime.executor import HostExecutor, executor_for, executor_of_module
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import small_array

INTEGERS = (5, np.int8(5), np.uint64(5), np.array(5), np.array(5, ">i2"), np.array(5, np.uint8))
REALS = (0.5, np.float16(0.5), np.float64(0.5), np.longdouble(0.5), ml_dtypes.bfloat16(0.5), Fraction(1, 2))
REALS = (*REALS, *(np.array(0.5, dtype) for dtype in (np.float32, ">f8", np.float16, ml_dtypes.bfloat16)))
NO_NUMBERS = (None, "5", b"5", [5], (5,), np.array([5]), {5}, 1j, np.timedelta64(5), np.datetime64("2020"), object())
NO_NUMBERS = (*NO_NUMBERS, True, np.True_, np.array(True), np.ma.masked, np.ma.array(5), np.str_("5"), np.array("5"))


@pytest.mark.parametrize("value", INTEGERS)
def test_integers(value):
    number = scalars.integer("n", value, 0, 5)
    assert type(number) is int and number == 5
    assert scalars.real("x", value) == 5.0


@pytest.mark.parametrize("value", REALS)
def test_reals(value):
    number = scalars.real("x", value)
    assert type(number) is float and number == 0.5
    with pytest.raises(errors.ArgumentError, match=r"^n is .*; an integer from 0 to 5 is allowed"):
        scalars.integer("n", value, 0, 5)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number(value):
    with pytest.raises(errors.ArgumentError, match=r"^n is .*; an integer from 0 to 9, or None, is allowed"):
        scalars.integer("n", value, 0, 9, optional=True)
    with pytest.raises(errors.ArgumentError, match=r"^x is .* of type .*; a number is allowed"):
        scalars.real("x", value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, np.float16("inf"), np.array(-np.inf), 10**400, Fraction(10**400)]
)
def test_what_is_not_finite(value):
    with pytest.raises(errors.NonFiniteError, match=r"^x is .*; a finite number is needed"):
        scalars.real("x", value)


def test_ranges_of_integers_are_exact():
    assert scalars.integer("n", np.uint64(2**64 - 1), 0, 2**64 - 1) == 2**64 - 1
    for value in (2**64, -1, np.int64(-1), np.array(-(2**63)), -(10**5000)):
        with pytest.raises(errors.ArgumentError, match=r"^n is"):
            scalars.integer("n", value, 0, 2**64 - 1)


def test_flags_and_choices():
    for value in (True, np.True_, np.array(True)):
        assert scalars.check_flag("f", value) is True
    for value in (1, 0, None, "True", [True], np.array([True]), np.uint8(1), np.ma.array(True)):
        with pytest.raises(errors.ArgumentError, match=r"^f is .*; allowed are False and True"):
            scalars.check_flag("f", value)
    assert type(scalars.choice("c", np.str_("a"), ("a", "b"))) is str
    for value in ("c", None, b"a", ["a"], {"a"}, np.array("a")):
        with pytest.raises(errors.ArgumentError, match=r"^c is .*; allowed are None, 'a' and 'b'"):
            scalars.choice("c", value, ("a", "b"), optional=True)


def test_dtypes():
    for value in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert scalars.check_dtype("dtype", value, ("bfloat16",)) == ml_dtypes.bfloat16
    for value in (None, "no such", 5, np.float32(1), [], {}, "", ">f4", np.zeros(3), object()):
        with pytest.raises(errors.DTypeError, match=r"^dtype is"):
            scalars.check_dtype("dtype", value, ("float32", "float64"))
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    with pytest.raises(errors.DTypeError, match=r"^dtype is None"):
        cuattn.plan_decode([3], dtype=None, **sizes)


def test_values_that_cannot_be_shown():
    class Silent:
        def __repr__(self):
            raise KeyError("nothing to show")

    assert scalars.shown(Silent()) == "an object of type Silent"
    assert scalars.shown(10**5000) == "an object of type int"
    assert scalars.shown(np.zeros((4, 4))) == "an array [4, 4] of float64"


SMALL = ([1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], ">u2"), np.array([1.0, 2.0], ">f4"), [1.0, np.array(2)])
SMALL = (*SMALL, np.array([1, 2], np.longdouble), np.array([1, 2], ml_dtypes.bfloat16), [np.float16(1), np.int8(2)])


@pytest.mark.parametrize("value", SMALL)
def test_small_arrays_of_numbers(value):
    executor = executor_for()
    read = small_array(executor, "alibi_slopes", value, ((2,),), np.dtype(np.float32))
    assert read.dtype == np.float32 and read.dtype.isnative and read.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "value", [[True, False], ["1", "2"], [1j, 2], [None, 1], np.zeros(2, "m8[s]"), {1, 2}, iter([1, 2])]
)
def test_small_arrays_of_no_numbers(value):
    with pytest.raises((errors.DTypeError, errors.ArrayTypeError), match=r"^alibi_slopes"):
        small_array(executor_for(), "alibi_slopes", value, ((2,),), np.dtype(np.float32))


def test_public_calls_take_them(monkeypatch):
    """Launches apart: what they get is what plain values give."""
    launched = []

    def start(self, kernel, grid, block, args, smem):
        launched.append(next(value for value in args if isinstance(value, np.void)))

    monkeypatch.setattr(HostExecutor, "_start", start)
    q = np.zeros((1, 4, 2, 32), np.float32)
    plain = {"scale": 0.5, "softcap": 2.0, "window": (3, 0), "causal": True, "diagonal_offset": 1}
    odd = {"scale": np.array(0.5, ">f4"), "softcap": np.float16(2), "window": [np.array(3), np.uint8(0)]}
    odd |= {"causal": np.array(True), "diagonal_offset": np.array(1, ">i8")}
    cuattn.attention(q, q, q, alibi_slopes=[1.0, 2.0], sinks=[0.0, 0.0], **plain)
    cuattn.attention(q, q, q, alibi_slopes=[1, 2], sinks=np.zeros(2, np.int8), **odd)
    assert launched[0].tobytes() == launched[1].tobytes()


CLAIMS = {
    "__cuda_array_interface__": {"shape": (1,), "typestr": "<f4", "data": (4096, False), "version": 3},
    "__dlpack_device__": lambda self: (2, 0),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_devices_that_are_not_there(claim):
    """No driver, or no CuPy: an error that names the argument and says why, whatever CuPy raises."""
    x = type("Claims", (), {claim: CLAIMS[claim], "__dlpack__": None})()
    q = np.zeros((1, 4, 2, 32), np.float32)
    for given in ({"k": x}, {"sinks": x}, {"bias": x}, {"out": x}):
        with pytest.raises(errors.CuattnError, match=rf"\b{next(iter(given))}\b"):
            cuattn.attention(**{"q": q, "k": q, "v": q} | given)
    with pytest.raises(errors.ArrayTypeError, match=r"\bx\b") as raised:
        cuattn.softmax(x)
    assert raised.value.__cause__ is not None
    with pytest.raises(errors.ArrayTypeError, match="array_module is <module 'math'"):
        executor_of_module(math)


def test_extents_that_no_memory_has():
    q, pages = np.zeros((1, 1, 1, 32), np.float32), np.zeros((2, 4, 1, 32), np.float32)
    endless = np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (2**31,), (0,))
    calls = {
        "seqlens_k": lambda x: cuattn.paged_attention(q, pages, pages, [[0]], x),
        "cu_seqlens_q": lambda x: cuattn.paged_attention_varlen(q[0], pages, pages, [[0]], x, [1]),
        "block_tables": lambda x: cuattn.paged_attention(q, pages, pages, x[None], [1]),
        "positions": lambda x: cuattn.rope(q, x),
        "indices": lambda x: cuattn.block_tables_from_csr([0, 1], x, [1], 4),
        "counts": lambda x: cuattn.slot_mapping([[0]], [0], x, 4),
    }
    for name, call in calls.items():
        with pytest.raises(errors.ShapeError, match=rf"^{name} has shape .*2147483648"):
            call(endless)


def test_allocations_that_the_machine_cannot_serve():
    sizes = {"num_layers": 64, "num_kv_heads": 64, "head_dim": 128, "dtype": np.float32}
    for call in (
        lambda: cuattn.PagedKVCache(2**31 - 1, 64, **sizes),
        lambda: cuattn.KVCache(2**20, 2**11 - 1, **sizes),
        lambda: cuattn.dropout_mask(2**20, 2**10, 2**10, 2**10, dropout_p=0.5),
        lambda: cuattn.rope_frequencies(256, 2**31 - 1),
        lambda: host.empty((2**40, 2**10), np.float32),
    ):
        with pytest.raises(errors.OutOfMemoryError, match="this machine has"):
            call()


def test_arrays_on_the_host_executor():
    for shape in (5, np.int64(5), np.array(5), [np.uint8(5)], (5,)):
        assert host.empty(shape, np.float32).shape == (5,)
    for shape in (-1, 2.0, True, "5", None, {5}, (5, -1), [2.5]):
        with pytest.raises(errors.ArgumentError, match=r"^shape(\[\d\])? is"):
            host.empty(shape, np.float32)
    for dtype in (None, object, "O", "U", "no such", np.float32(1)):
        with pytest.raises(errors.DTypeError, match=r"^dtype is"):
            host.empty(5, dtype)


def test_errors_in_the_words_of_the_caller():
    with (
        pytest.raises(errors.ShapeError, match=r"^q is like seqlen_k, not 'k' \(q is query\)$"),
        renamed({"q": "query", "k": "key"}),
    ):
        raise errors.ShapeError("q is like seqlen_k, not 'k'")
