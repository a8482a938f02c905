"""What arguments are replaced by: things that no argument takes, and relatives of the value that belongs there."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import scipy.sparse

from bench.stress.bad_inputs.objects import BROKEN, ArrayOnly, DLPackOnly

__all__ = ["MISSING", "Value", "draw"]

MISSING = object()


class Value(NamedTuple):
    """A replacement.

    ``plain`` is what means the same, written as the documentation does: the result must be that of it. ``never``: no
    argument takes it. ``wrong``: the fault is in this argument itself, whatever the others are.
    """

    kind: str
    value: Any
    plain: Any = MISSING
    never: bool = False
    wrong: bool = True


def draw(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    """A replacement for an argument with the valid value ``base`` (`MISSING` if none is known).

    ``others`` are the values of the other arguments; ``written``: the call writes to this one.
    """
    if base is MISSING or rng.random() < 0.4:
        kind, make = rng.choice(_ANYTHING)
        return make(rng, kind)
    if isinstance(base, np.ndarray):
        return rng.choice(_OF_ARRAYS)(rng, base, others, written)
    if isinstance(base, bool | str):
        return rng.choice(_OF_FLAGS if isinstance(base, bool) else _OF_NAMES)(base)
    if isinstance(base, int | float):
        return rng.choice(_OF_INTEGERS if isinstance(base, int) else _OF_FLOATS)(base)
    if isinstance(base, list | tuple):
        return rng.choice(_OF_LISTS)(base)
    kind, make = rng.choice(_ANYTHING)
    return make(rng, kind)


# --- anything ---------------------------------------------------------------------------------------------------------


def _one_of(values: Callable[[], list[Any]], never: bool = True) -> Callable[[Random, str], Value]:
    return lambda rng, kind: Value(kind, rng.choice(values()), never=never)


def _recursive() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def _masked() -> list[Any]:
    return [np.ma.masked, np.ma.masked_array(np.ones(4, np.float32), [1, 0, 0, 0]), np.ma.array(3)]


def _odd_arrays() -> list[Any]:
    dtypes = (complex, "V4", "U1", "S2", "M8[s]", "m8[s]", ml_dtypes.int4, object)
    return [*(np.ones(4, dtype) for dtype in dtypes), np.zeros(4, [("a", "f4")]), np.array([1, None, "a", {}], object)]


def _odd_scalars() -> list[Any]:
    return [np.timedelta64(3), np.datetime64("2020"), np.complex64(1), np.str_("ab"), np.bytes_(b"a"), np.void(b"abcd")]


def _huge() -> list[Any]:
    """Metadata with an extent of 2^31 and more, in no memory at all."""
    zeros = np.zeros(4, np.int32)
    shapes = ((2**31,), (3, 2**31), (2**31, 2), (2**40,), (1, 2**31, 1))
    return [np.lib.stride_tricks.as_strided(zeros, shape, (0,) * len(shape)) for shape in shapes]


_ANYTHING: list[tuple[str, Callable[[Random, str], Value]]] = [
    ("None", lambda rng, kind: Value(kind, None, wrong=False)),
    ("text", _one_of(lambda: ["no such thing", "", "1", "\N{SNOWMAN}", "x" * 10000])),
    ("bytes", _one_of(lambda: [b"ab", bytearray(b"ab"), memoryview(b"abcd")])),
    ("container", _one_of(lambda: [{}, {"a": 1}, {1.5, 2.5}, frozenset({0.5}), deque([0.5, 2]), {}.items()])),
    ("iterator", _one_of(lambda: [(x for x in "ab"), iter([0.5]), map(str, [1]), zip("a", "b", strict=True)])),
    ("ragged list", _one_of(lambda: [[[1], [1, 2]], [[1, 2], 3], ((1,), 2, 3)])),
    (
        "list of no numbers",
        _one_of(lambda: [[None], ["a"], [1j], [object()], [{}], [[None]], [b"a", b"b"], _recursive()]),
    ),
    ("object", _one_of(lambda: [object(), len, int, ..., slice(1), NotImplemented, sys, Exception("x"), lambda: 1])),
    ("broken protocol", lambda rng, kind: Value(kind, BROKEN[rng.choice(list(BROKEN))], never=True)),
    ("masked array", _one_of(_masked)),
    ("odd array", _one_of(_odd_arrays)),
    ("odd scalar", _one_of(_odd_scalars)),
    ("extent of 2^31", _one_of(_huge)),
    ("not finite", _one_of(lambda: [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")])),
    ("complex number", _one_of(lambda: [1j, complex(1, 0), np.array(1j)])),
    ("number", _one_of(lambda: [Decimal("0.5"), Fraction(10**400), 10**400, -(10**5000)], never=False)),
    (
        "edge of a range",
        _one_of(lambda: [s * 2**n + d for n in (31, 32, 62, 63, 64) for s in (1, -1) for d in (-1, 0, 1)], False),
    ),
    ("small number", _one_of(lambda: [0, 1, -1, 0.5, -0.5, 1e300, 1e-300, np.int8(1), np.float16(0.5)], False)),
    ("small array", _one_of(lambda: [np.zeros(1), np.empty(0), np.arange(3), np.array([2]), np.ones((1, 1))], False)),
    ("sparse matrix", _one_of(lambda: [scipy.sparse.csr_matrix(np.eye(3)), scipy.sparse.coo_array(np.eye(2))])),
]


# --- relatives of arrays ----------------------------------------------------------------------------------------------

_Of = Callable[[Random, Any, Mapping[str, Any], bool], Value]


def _same(kind: str, change: Callable[[Any], Any], *, in_place: bool = False, narrow: bool = True) -> _Of:
    """Another form of the same numbers. Where the call writes, only one that leads to the same memory will do."""

    def make(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
        if base.dtype.kind == "V" and not narrow:
            return Value("itself", base, base)
        return Value(kind, change(base), MISSING if written and not in_place else base)

    return make


def _strided(x: Any) -> Any:
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _misaligned(x: Any) -> Any:
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _read_only(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    copy = base.copy()
    copy.flags.writeable = False
    return Value("read-only", copy, MISSING if written else base, never=written)


def _cast(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    """The value in a dtype of another kind."""
    dtypes = [
        np.float16,
        np.float32,
        np.float64,
        np.int32,
        np.int64,
        np.uint8,
        bool,
        complex,
        object,
        np.longdouble,
        "U8",
    ]
    dtype = np.dtype(rng.choice(dtypes))
    kinds = {"f": "iufb", "V": "iufb", "i": "iu", "u": "iu", "b": "iufb"}[base.dtype.kind]
    with np.errstate(all="ignore"):
        cast = base.astype(np.float32 if base.dtype.kind == "V" else base.dtype).astype(dtype)
    return Value(f"cast to {dtype}", cast, never=dtype.kind not in kinds, wrong=dtype.kind not in kinds)


def _integers(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    """Integer metadata in another integer type, of any byte order."""
    if base.dtype.kind not in "iu" or written:
        return Value("itself", base.copy(), base)
    dtype = np.dtype(rng.choice(["i1", ">i2", "<i4", ">i4", "i8", ">i8", "u8", ">u4", "u2"]))
    cast = base.astype(dtype)
    return Value(
        "integers of another dtype", cast, base if (cast.astype(np.int64) == base).all() else MISSING, wrong=False
    )


def _extent(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    if not base.ndim:
        return Value("another rank", base[None], wrong=False)
    axis, more = rng.randrange(base.ndim), rng.choice((-1, 1))
    shape = list(base.shape)
    shape[axis] += more
    changed = np.zeros(shape, base.dtype)
    common = tuple(slice(0, min(a, b)) for a, b in zip(shape, base.shape, strict=True))
    changed[common] = base[common]
    return Value(f"an extent {'longer' if more > 0 else 'shorter'} by one", changed, wrong=False)


def _rank(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    forms = [
        base[None],
        base[..., None],
        base.ravel(),
        base.T,
        base[:0] if base.ndim else base,
        np.array(0, base.dtype),
    ]
    return Value("another rank", rng.choice(forms).copy(), wrong=False)


def _stretched(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    if not base.ndim:
        return Value("another rank", base[None], wrong=False)
    axis = rng.randrange(base.ndim)
    shape, strides = list(base.shape), list(base.strides)
    shape[axis], strides[axis] = 2**31, 0
    return Value("extent of 2^31", np.lib.stride_tricks.as_strided(base, shape, strides), never=True, wrong=False)


def _numbers(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    """The value with one entry out of range."""
    changed = base.copy()
    if not base.size:
        return Value("itself", changed, base)
    at = np.unravel_index(rng.randrange(base.size), base.shape)
    if base.dtype.kind == "f":
        changed[at] = rng.choice((np.nan, np.inf, -np.inf))
        return Value("an entry that is not finite", changed, wrong=False)
    if base.dtype.kind in "iu" and base.ndim < 3:
        changed = changed.astype(np.uint64 if rng.random() < 0.3 else np.int64)
        number = rng.choice((2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**31) - 1, -(2**63)))
        if np.iinfo(changed.dtype).min <= number <= np.iinfo(changed.dtype).max:
            changed[at] = number
        return Value("an entry out of range", changed, wrong=False)
    return Value("itself", changed, base)


def _overlapping(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    """An array in the memory of another argument, or one whose elements share memory."""
    if not written:
        return Value("itself", base.copy(), base)
    arrays = [
        x for x in others.values() if isinstance(x, np.ndarray) and x.nbytes >= base.nbytes and x.flags.c_contiguous
    ]
    if arrays and rng.random() < 0.7:
        shared = rng.choice(arrays).reshape(-1).view(np.uint8)[: base.nbytes].view(base.dtype).reshape(base.shape)
        return Value("memory of another argument", shared, never=False, wrong=False)
    return Value("elements that share memory", np.broadcast_to(base[:1], base.shape).view(), never=True)


def _torch(rng: Random, base: Any, others: Mapping[str, Any], written: bool) -> Value:
    torch = sys.modules.get("torch")
    if torch is None or base.dtype.kind == "V" or (base.dtype.kind == "u" and base.dtype.itemsize > 1):
        return Value("__array__ alone", ArrayOnly(base), MISSING if written else base)
    tensor = torch.from_numpy(base.copy())
    if base.dtype.kind == "f" and rng.random() < 0.5:
        return Value("tensor that requires a gradient", tensor.requires_grad_(), never=True)
    return Value("tensor", tensor, MISSING if written else base)


def _garbage(kind: str, change: Callable[[Any], Any]) -> _Of:
    return lambda rng, base, others, written: Value(kind, change(base), never=True)


_OF_ARRAYS: list[_Of] = [
    *(_cast, _cast, _integers, _integers, _extent, _extent, _rank, _rank, _stretched, _numbers, _numbers, _overlapping),
    *(_torch, _read_only),
    _same("every second element", _strided),
    _same("Fortran order", np.asfortranarray),
    _same("misaligned", _misaligned),
    _same("__array__ alone", ArrayOnly),
    _same("DLPack alone", DLPackOnly, narrow=False),
    _same("subclass", lambda x: x.view(type("Sub", (np.ndarray,), {})), in_place=True),
    lambda rng, base, others, written: Value(
        "list", base.tolist(), MISSING if base.ndim > 1 or written else base, wrong=False
    ),
    lambda rng, base, others, written: Value(
        "big-endian", base.astype(base.dtype.newbyteorder(">")), MISSING, wrong=False
    ),
    _garbage("masked array", lambda x: np.ma.masked_array(x, np.zeros(x.shape, bool))),
    _garbage("object array", lambda x: x.astype(object) if x.size else np.array([None])),
    _garbage("structured array", lambda x: np.zeros(x.shape, [("a", "f4"), ("b", "i4")])),
    _garbage("dates", lambda x: np.zeros(x.shape, "M8[s]")),
]


# --- relatives of numbers, flags, names and lists ---------------------------------------------------------------------


def _exactly(kind: str, change: Callable[[Any], Any]) -> Callable[[Any], Value]:
    return lambda base: Value(kind, change(base), base)


def _refused(kind: str, change: Callable[[Any], Any]) -> Callable[[Any], Value]:
    return lambda base: Value(kind, change(base), never=True)


_OF_ANY_NUMBER = [
    _refused("complex number", complex),
    _refused("text", str),
    _refused("array of one number", lambda x: np.array([x])),
    _refused("list of a list of one number", lambda x: [[[[[x]]]]]),
    _refused("masked array", np.ma.array),
]
_OF_INTEGERS = [
    *_OF_ANY_NUMBER,
    *(_exactly("NumPy integer", dtype) for dtype in (np.int16, np.uint16, np.int32, np.uint64)),
    *(_exactly("array of rank 0", lambda x, dtype=dtype: np.array(x, dtype)) for dtype in ("i2", ">i4", "u8")),
    _refused("float for an integer", float),
    _refused("float for an integer", np.float32),
    _refused("float for an integer", lambda x: np.array(float(x))),
    _refused("bool for an integer", bool),
    _refused("bool for an integer", np.bool_),
    _refused("bool for an integer", lambda x: np.array(True)),
    _refused("duration", np.timedelta64),
    lambda base: Value("edge of a range", -1, wrong=False),
    lambda base: Value("one more", base + 1, wrong=False),
    lambda base: Value("edge of a range", base + 2**32, wrong=False),
    lambda base: Value("edge of a range", base + 2**64),
]
_OF_FLOATS = [
    *_OF_ANY_NUMBER,
    *(_exactly("NumPy float", dtype) for dtype in (np.float64,)),
    _exactly("array of rank 0", np.array),
    _exactly("big-endian array of rank 0", lambda x: np.array(x, ">f8")),
    *(
        lambda base, dtype=dtype: Value("NumPy float", dtype(base), float(dtype(base)))
        for dtype in (np.float16, np.float32, ml_dtypes.bfloat16, np.longdouble)
    ),
    lambda base: Value("fraction", Fraction(base), base),
    _refused("bool for a float", bool),
    _refused("bool for a float", np.bool_),
    _refused("not finite", lambda x: float("nan")),
    _refused("not finite", lambda x: np.array(np.inf)),
    lambda base: Value("edge of a range", -base),
    lambda base: Value("edge of a range", 10**400),
]
_OF_FLAGS = [
    _exactly("NumPy bool", np.bool_),
    _exactly("array of rank 0", np.array),
    *(
        _refused("number for a bool", kind)
        for kind in (int, float, np.int64, np.uint8, str, lambda x: np.array(int(x)))
    ),
    *(_refused("array for a bool", lambda x, shape=shape: np.full(shape, x)) for shape in (1, 0, (2, 2))),
    _refused("list", lambda x: [x]),
]
_OF_NAMES = [
    _exactly("NumPy text", np.str_),
    *(_refused("another text", change) for change in (str.upper, lambda x: x + "?", lambda x: x * 2)),
    *(
        _refused("no text", change)
        for change in (str.encode, list, lambda x: [x], lambda x: {x}, lambda x: np.array([x]))
    ),
]
_OF_LISTS = [
    lambda base: Value("shorter", base[:-1], wrong=False),
    lambda base: Value("longer", [*base, *base[:1]], wrong=False),
    _refused("list of no numbers", lambda x: [object() for _ in x]),
    _refused("list of no numbers", lambda x: ["a", *x]),
    _refused("iterator", iter),
    _refused("container", lambda x: dict(enumerate(x))),
]
