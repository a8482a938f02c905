"""Everything that the decode functions refuse: a typed error that names the argument, before anything is launched or
written; and what they accept at the edges."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from decode_calls import FUNCTIONS, call, quantized, refused

import cuattn
from cuattn import Rotary
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, ShapeError

DENSE, PAGED, VARLEN = FUNCTIONS
BOTH = PAGED, VARLEN
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("nothing_is_launched")


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"q": (3, 4, 32)}, r"q has shape \(3, 4, 32\), rank 3; rank 4 is needed: \[batch, seqlen_q"),
        ({"k_cache": (8, 2, 32)}, "k_cache has shape .* rank 3; rank 4 is needed: .batch, capacity"),
        ({"v_cache": (3, 8, 2, 16, 1)}, "v_cache has shape .* rank 5"),
        ({"k_cache": (2, 8, 2, 32), "v_cache": (2, 8, 2, 16)}, "k_cache has batch 2 .* q has batch 3"),
        ({"v_cache": (3, 7, 2, 16)}, r"v_cache has shape \(3, 7, 2, 16\) and k_cache has shape \(3, 8, 2, 32\)"),
        ({"v_cache": (3, 8, 1, 16)}, "v_cache has shape .* and k_cache has shape"),
        ({"k_cache": (3, 8, 2, 31)}, "k_cache has head dim 31 and q has head dim 32"),
        ({"q": (3, 2, 4, 513), "k_cache": (3, 8, 2, 513)}, "q has head dim 513; allowed are 1 to 512"),
        ({"q": (3, 2, 4, 0), "k_cache": (3, 8, 2, 0)}, "q has head dim 0"),
        ({"v_cache": (3, 8, 2, 513)}, "v_cache has head dim 513"),
        ({"v_cache": (3, 8, 2, 0)}, "v_cache has head dim 0"),
        ({"q": (3, 2, 5, 32)}, "q has 5 heads and k_cache has 2"),
        ({"k_cache": (3, 8, 0, 32), "v_cache": (3, 8, 0, 16)}, "q has 4 heads and k_cache has 0"),
    ),
)
def test_shapes(changes, message):
    refused(DENSE, ShapeError, message, **{name: np.ones(shape, np.float32) for name, shape in changes.items()})


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    (
        (PAGED, {"q": (6, 4, 32)}, "q has shape .* rank 3; rank 4"),
        (VARLEN, {"q": (3, 2, 4, 32)}, r"q has shape .* rank 4; rank 3 is needed: \[tokens, heads"),
        *((f, {"k_pages": (4, 2, 32)}, r"k_pages has shape .* rank 3; .* \[num_pages, page_size") for f in BOTH),
        *((f, {"v_pages": (5, 4, 2, 16)}, "v_pages has shape .* and k_pages has shape") for f in BOTH),
        *((f, {"v_pages": (6, 5, 2, 16)}, "v_pages has shape .* and k_pages has shape") for f in BOTH),
        *((f, {"k_pages": (6, 4, 2, 30)}, "k_pages has head dim 30 and q has head dim 32") for f in BOTH),
        *((f, {"k_pages": (6, 4, 3, 32), "v_pages": (6, 4, 3, 16)}, "q has 4 heads and k_pages has 3") for f in BOTH),
        *((f, {"k_pages": (6, 0, 2, 32), "v_pages": (6, 0, 2, 16)}, "k_pages has page size 0") for f in BOTH),
    ),
)
def test_shapes_of_pages(function, changes, message):
    refused(function, ShapeError, message, **{name: np.ones(shape, np.float32) for name, shape in changes.items()})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_extents_of_two_to_the_31(function):
    long = np.broadcast_to(np.float32(1), (6, 2**31, 2, 32))
    name = "k_cache" if function is DENSE else "k_pages"
    refused(function, ShapeError, f"{name} has shape .* at most {2**31 - 1}", arguments=call(function) | {name: long})


@pytest.mark.parametrize("function", BOTH)
def test_a_table_for_more_keys_than_an_index_can_count(function):
    tables = np.broadcast_to(np.int32(0), (3, 2**29))
    arguments = call(function) | {"block_tables": tables}
    refused(function, ShapeError, "block_tables has 536870912 columns of pages of 4 slots", arguments=arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "dtype", (np.int32, np.bool_, np.uint8, ml_dtypes.float8_e4m3fn, ">f4", np.longdouble), ids=str
)
def test_dtypes_of_q(function, dtype):
    q = call(function)["q"].astype(dtype)
    refused(function, DTypeError, "q has dtype .* allowed are float16, bfloat16, float32, float64", q=q)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_of_the_cache(function):
    arguments = call(function)
    k, v = (name for name in arguments if name[:2] in ("k_", "v_"))
    refused(function, DTypeError, f"{k} has dtype float16 and q has dtype float32", **{k: arguments[k].astype("f2")})
    refused(function, DTypeError, f"{v} has dtype float16 and {k} has dtype", **{v: arguments[v].astype("f2")})
    refused(function, DTypeError, f"{k} has dtype int32", **{k: arguments[k].astype("i4")})
    refused(function, DTypeError, rf"{k} has dtype >f4", **{k: arguments[k].astype(">f4")})
    refused(function, DTypeError, f"{k} has dtype uint8; .* with kv_format", **{k: np.zeros(arguments[k].shape, "u1")})
    refused(function, DTypeError, f"{k} has dtype float32; kv_format int8 is stored in int8", kv_format="int8")
    refused(function, DTypeError, f"{k} has dtype float32; kv_format float16 is", kv_format="float16")
    refused(function, ArgumentError, "kv_format is 'fp8'; .*e4m3fn", kv_format="fp8")
    refused(function, ArgumentError, "kv_format is 8", kv_format=8)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_quantized_caches_and_float64(function):
    arguments = quantized(function, "int8")
    arguments["q"] = arguments["q"].astype(np.float64)
    refused(function, DTypeError, "q has dtype float64; int8 caches go with float16, bfloat16 and float32", arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_codes_of_four_bits_have_half_of_the_extent(function):
    arguments = quantized(function, "nvfp4")
    name = next(name for name in arguments if name.startswith("k_"))
    arguments[name] = np.zeros((*arguments[name].shape[:3], 32), np.uint8)
    refused(function, ShapeError, rf"{name} has head dim 64 \(2 numbers an item\) and q has head dim 32", arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("thing", ([[[[1.0]]]], None, 3.0, "q", np.float16(1)), ids=repr)
def test_no_arrays(function, thing):
    for name in call(function):
        if name[:2] in ("q", "k_", "v_"):
            refused(function, ArrayTypeError, f"{name}: .* is no array", **{name: thing})


class OnDevice:
    """An array on CUDA device 0, as far as anyone can see from outside."""

    shape, dtype, ndim = (6, 4, 2), np.dtype(np.float32), 3

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arrays_of_two_kinds(function):
    """Also those that may be lists: metadata on a device does not go with queries on the CPU."""
    given = [*call(function), "k_scale", "v_scale", "k_block_scales", "out", "workspace", "alibi_slopes", "sinks"]
    for name in given[1:]:
        arguments = quantized(function, "int8") if name.endswith("_scale") else call(function)
        refused(function, ArrayTypeError, f"{name} is .*OnDevice on CUDA device 0", arguments, **{name: OnDevice()})
    refused(function, ArrayTypeError, "cos is .*OnDevice", rope=Rotary(cos=OnDevice(), sin=OnDevice()))


# --- lengths and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", (np.int32, np.int64, ">i4", np.int16, list))
def test_lengths_out_of_range(function, dtype):
    for values, message in (
        ([7, -1, 0], r"seqlens_k\[1\] is -1; the cache holds 0 to 8 keys a sequence"),
        ([7, 4, 9], r"seqlens_k\[2\] is 9"),
        ([-(2**15), 4, 0], r"seqlens_k\[0\] is -32768"),
    ):
        lengths = values if dtype is list else np.array(values, dtype)
        refused(function, ArgumentError, message, seqlens_k=lengths)
    if dtype in (np.int64, list):
        refused(function, ArgumentError, r"seqlens_k\[0\] is 4294967303", seqlens_k=dtype([2**32 + 7, 4, 0]))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    (
        ([7, 4], ShapeError, r"seqlens_k has shape \[2\]; \[batch\] is needed, with batch 3"),
        ([[7, 4, 0]], ShapeError, r"seqlens_k has shape \[1, 3\]"),
        (np.int32(4), ArrayTypeError, "seqlens_k"),
        (4, ArrayTypeError, "seqlens_k"),
        (None, ArrayTypeError, "seqlens_k"),
        ([7.0, 4.0, 0.0], DTypeError, "seqlens_k has dtype float64; integers are needed"),
        ([True, True, False], DTypeError, "seqlens_k has dtype bool"),
        ([[7], [4, 0]], ArrayTypeError, "seqlens_k cannot be read as an array"),
    ),
)
def test_lengths_that_are_none(function, lengths, error, message):
    refused(function, error, message, seqlens_k=lengths)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", (np.int32, np.int64, np.uint32, np.int8, ">i8", list))
def test_pages_that_do_not_exist(function, dtype):
    unsigned = dtype is np.uint32
    for b, i, page in ((0, 0, -1), (0, 1, 6), (1, 0, 127), (0, 1, -128)):
        if unsigned and page < 0:
            continue
        tables = call(function)["block_tables"]
        tables[b, i] = page
        tables = tables.tolist() if dtype is list else tables.astype(dtype)
        message = rf"block_tables\[{b}, {i}\] is {page}, a page that the {(7, 4)[b]} keys .* pages 0 to 5"
        refused(function, ArgumentError, message, block_tables=tables)


@pytest.mark.parametrize("function", BOTH)
def test_pages_beyond_32_bits(function):
    """A conversion to int32 would make page 5 of it."""
    tables = call(function)["block_tables"].astype(np.int64)
    tables[0, 1] = 2**32 + 5
    refused(function, ArgumentError, r"block_tables\[0, 1\] is 4294967301", block_tables=tables)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("tables", "error", "message"),
    (
        ([[5, 1]], ShapeError, r"block_tables has shape \[1, 2\]; \[batch, max_pages\] is needed, with batch 3"),
        ([5, 1, 2], ShapeError, r"block_tables has shape \[3\]"),
        (np.zeros((3, 2, 1), np.int32), ShapeError, "block_tables has shape"),
        (np.zeros((3, 2)), DTypeError, "block_tables has dtype float64"),
        ([[5, 1], [5], []], ArrayTypeError, "block_tables cannot be read as an array"),
        (None, ArrayTypeError, "block_tables"),
        ([[5], [5], [5]], ArgumentError, r"seqlens_k\[0\] is 7; the cache holds 0 to 4 keys"),
        (np.zeros((3, 0), int), ArgumentError, r"seqlens_k\[0\] is 7; the cache holds 0 to 0 keys"),
    ),
)
def test_tables_that_are_none(function, tables, error, message):
    refused(function, error, message, block_tables=tables)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    (
        ([1, 2, 4, 6], ArgumentError, r"cu_seqlens_q\[0\] is 1; the first sequence begins at 0"),
        ([0, 4, 2, 6], ArgumentError, "cu_seqlens_q descends from 4 to 2 at index 2"),
        ([0, 2, 4, 5], ArgumentError, "cu_seqlens_q ends at 5; it must span all 6 tokens"),
        ([0, 2, 4, 7], ArgumentError, "cu_seqlens_q ends at 7"),
        (np.array([0, 2**63 - 1, -(2**63), 6]), ArgumentError, "cu_seqlens_q descends"),
        ([0, 6], ShapeError, "block_tables has shape .* with batch 1"),
        ([], ShapeError, r"cu_seqlens_q has shape \[0\]"),
        ([[0, 2, 4, 6]], ShapeError, "cu_seqlens_q has shape"),
        ([0.0, 2.0, 4.0, 6.0], DTypeError, "cu_seqlens_q has dtype float64"),
        (None, ArrayTypeError, "cu_seqlens_q"),
    ),
)
def test_packed_queries(cu_seqlens, error, message):
    refused(VARLEN, error, message, cu_seqlens_q=cu_seqlens)


@pytest.mark.parametrize("value", (-1, 1.0, "2", True, 2**31))
def test_max_seqlen_q(value):
    refused(VARLEN, ArgumentError, "max_seqlen_q is", max_seqlen_q=value)


def test_max_seqlen_q_that_is_too_small():
    refused(VARLEN, ArgumentError, "max_seqlen_q is 1, but a sequence of cu_seqlens_q has 2 tokens", max_seqlen_q=1)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        *(
            ({"num_splits": n}, ArgumentError, "num_splits is .* integer from 1")
            for n in (0, -1, 1.0, True, 2**17, "2")
        ),
        *(({"scale": x}, NonFiniteError, "scale is") for x in (NAN, INF, 1e39)),
        ({"scale": "1"}, ArgumentError, "scale is '1'"),
        *(({"causal": x}, ArgumentError, "causal is") for x in (None, 1, "left")),
        *(({"window": x}, ArgumentError, "window is") for x in ((-1, 0), 3, (1,), (1.0, 0))),
        *(({"softcap": x}, ArgumentError, "softcap is") for x in (0.0, -1.0, NAN, "1")),
        *(({"alibi_slopes": x}, ShapeError, "alibi_slopes has shape") for x in ([1.0] * 3, np.ones((2, 4)))),
        ({"alibi_slopes": [NAN] * 4}, NonFiniteError, "alibi_slopes holds nan"),
        ({"sinks": [1.0] * 2}, ShapeError, "sinks has shape"),
        ({"sinks": [INF] * 4}, NonFiniteError, "sinks holds inf"),
        *(({"return_lse": x}, ArgumentError, "return_lse is") for x in (None, 1, "yes")),
        *(({"rotate_keys": x, "rope": Rotary()}, ArgumentError, "rotate_keys is") for x in (None, 1, "yes")),
        ({"rotate_keys": True}, ArgumentError, "rotate_keys is True and rope is None"),
        *(({"rope": x}, ArgumentError, "rope is") for x in (True, 10000.0, {"base": 1.0}, Rotary)),
        ({"rope": Rotary(rotary_dim=34)}, ArgumentError, "rotary_dim is 34"),
        ({"rope": Rotary(base=0.5)}, ArgumentError, "base is 0.5"),
        ({"rope": Rotary(cos=np.ones((9, 16), np.float32))}, ArgumentError, "cos is given without sin"),
        ({"plan": "fast"}, ArgumentError, "plan is 'fast'"),
        ({"plan": 3}, ArgumentError, "plan is 3"),
    ),
)
def test_options(function, changes, error, message):
    refused(function, error, message, **changes)


def tables(num_positions):
    cos, sin = cuattn.rope_frequencies(32, num_positions)
    return Rotary(cos=cos, sin=sin)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_positions_that_the_tables_do_not_hold(function):
    message = r"cos and sin hold the positions 0 to 5; seqlens_k\[0\] is 7"
    refused(function, ArgumentError, message, rope=tables(6))
    # One key and two queries: the first one is at position -1, and sees the key if there is no causal mask.
    message = "sequence 1 has 1 keys and 2 queries, whose first position is -1"
    refused(function, ArgumentError, message, rope=tables(8), seqlens_k=[7, 1, 0], causal=False)
    refused(function, ArgumentError, message, rope=tables(8), seqlens_k=[7, 1, 0], causal="top_left")


# --- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ("k_scale", "v_scale"))
@pytest.mark.parametrize(
    ("value", "error", "message"),
    (
        (NAN, NonFiniteError, "{} holds nan"),
        (INF, NonFiniteError, "{} holds inf"),
        (1e39, NonFiniteError, "{} holds 1e.39"),
        (10**400, NonFiniteError, "{} holds inf"),
        ([1.0, INF], NonFiniteError, "{} holds inf"),
        (True, ArgumentError, "{} is True"),
        ("1", ArgumentError, "{} is '1'"),
        (1j, ArrayTypeError, "{}: .*complex is no array"),
        ([True, True], DTypeError, "{} has dtype bool"),
        ([1.0] * 3, ShapeError, r"{} has shape \[3\]; allowed is \[\] or \[2\]"),
        (np.ones((1, 2), np.float32), ShapeError, r"{} has shape \[1, 2\]"),
        (np.ones((6, 4, 3), np.float32), ShapeError, r"{} has shape \[6, 4, 3\]; allowed is \[\] or \[2\] or"),
        (np.ones((1, 1, 1), np.float32), ShapeError, r"{} has shape \[1, 1, 1\]"),
        (np.ones((6, 4, 2), np.float16), DTypeError, "{} has dtype float16"),
        (np.ones((6, 4, 2), ">f4"), DTypeError, r"{} has dtype .*>f4"),
    ),
)
def test_scales(function, name, value, error, message):
    refused(function, error, message.format(name), quantized(function, "int8"), **{name: value})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_scales_of_formats_that_have_none(function):
    refused(function, ArgumentError, "k_scale is given, but float32 is not a quantized format", k_scale=1.0)
    refused(
        function, ArgumentError, "v_block_scales is given, but float32 has no block scales", v_block_scales=np.ones(1)
    )
    arguments = quantized(function, "e4m3fn") | {"k_block_scales": np.ones((6, 4, 2, 2), np.uint8)}
    refused(function, ArgumentError, "k_block_scales is given, but e4m3fn has no block scales", arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kv_format", ("nvfp4", "mxfp4"))
def test_block_scales(function, kv_format):
    arguments = quantized(function, kv_format)
    scales = arguments["k_block_scales"]
    refused(function, ArgumentError, f"k_block_scales is None; {kv_format} needs", arguments, k_block_scales=None)
    other = scales.view(ml_dtypes.float8_e5m2)
    refused(function, DTypeError, "k_block_scales has dtype float8_e5m2", arguments, k_block_scales=other)
    refused(function, ShapeError, "k_block_scales has shape", arguments, k_block_scales=scales[..., :0])
    refused(function, ShapeError, "v_block_scales has shape", arguments, v_block_scales=scales[:2])
    refused(function, ShapeError, r"k_scale has shape \[2\]; allowed is \[\]", arguments, k_scale=[1.0, 1.0])
    per_slot = np.ones(scales.shape[:3], np.float32)
    refused(function, ShapeError, "has one factor per tensor", arguments, v_scale=per_slot)


# --- out and workspace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masked_arrays(function):
    arguments = call(function)
    for name in arguments:
        refused(function, ArrayTypeError, f"{name} is a masked array", **{name: np.ma.masked_array(arguments[name])})
