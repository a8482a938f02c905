"""What append_kv refuses, before a bit is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import Rotary, errors


def arrays(name="int8", tokens=3, heads=2, dim=32, num_pages=4, page_size=2, dtype=np.float32):
    """Arguments by name, everything right."""
    row = cuattn.formats.KV_FORMATS[name]
    shape = (num_pages, page_size, heads)
    found = {
        "k": np.ones((tokens, heads, dim), dtype),
        "v": np.ones((tokens, heads, dim), dtype),
        "k_pages": np.full((*shape, row.items(dim)), 5, cuattn.formats.numpy_dtype(row.dtypes[0])),
        "v_pages": np.full((*shape, row.items(dim)), 5, cuattn.formats.numpy_dtype(row.dtypes[0])),
        "slot_mapping": np.arange(tokens),
        "kv_format": name,
    }
    if row.block_size:
        found |= {f"{side}_block_scales": np.full((*shape, row.blocks(dim)), 5, np.uint8) for side in "kv"}
    return found


def refused(error, match, given, **changes):
    """The call raises, and everything that it was given is as it was."""
    given = {**given, **changes}
    before = {name: x.copy() for name, x in given.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error, match=match):
        cuattn.append_kv(**given)
    for name, x in before.items():
        np.testing.assert_array_equal(given[name], x, err_msg=name)


SHAPES = [
    ({"k": np.ones((3, 32), np.float32)}, "k has shape .*; .tokens, kv_heads, head_dim. is needed"),
    ({"v": np.ones((4, 2, 32), np.float32)}, "v has shape .*; as many tokens and heads are needed"),
    ({"v": np.ones((3, 1, 32), np.float32)}, "v has shape .*; as many tokens and heads are needed"),
    ({"k": np.ones((3, 2, 31), np.float32)}, "k_pages has shape .* is needed for int8"),
    ({"v": np.ones((3, 2, 33), np.float32)}, "v_pages has shape .* is needed for int8"),
    ({"k": np.ones((3, 2, 513), np.float32)}, "k has head dim 513; allowed for int8 are 1 to 512"),
    ({"k": np.ones((3, 2, 0), np.float32)}, "k has head dim 0"),
    ({"v_pages": np.zeros((5, 2, 2, 32), np.int8)}, "v_pages has shape .*; as many pages, slots and heads"),
    ({"k_pages": np.zeros((8, 2, 32), np.int8)}, "k_pages has shape .*num_pages, page_size, kv_heads, head_dim"),
    ({"slot_mapping": np.arange(4)}, r"slot_mapping has shape \(4,\); \[3\] is needed"),
    ({"slot_mapping": np.zeros((3, 1), int)}, "slot_mapping has shape"),
    ({"k_scale": np.ones((4, 2, 1), np.float32)}, "k_scale has shape .*; one number, .* is needed"),
    ({"v_scale": np.ones(3, np.float32)}, "v_scale has shape"),
]


@pytest.mark.parametrize(("changes", "match"), SHAPES)
def test_shapes(changes, match):
    refused(errors.ShapeError, match, arrays(), **changes)


def test_odd_head_dims_in_four_bits():
    given = arrays("nvfp4", dim=34)
    refused(errors.ShapeError, "k has head dim 33; allowed for nvfp4 are even numbers", given, k=given["k"][..., :33])


def test_pages_without_slots():
    refused(errors.ShapeError, "a page has at least one slot", arrays(tokens=0, page_size=0))


DTYPES = [
    ({"k": np.ones((3, 2, 32), np.int32)}, "k has dtype int32"),
    ({"k": np.ones((3, 2, 32), ">f4")}, "k has dtype >f4"),
    ({"v": np.ones((3, 2, 32), np.float16)}, "v has dtype float16 and k has dtype float32"),
    ({"k": np.ones((3, 2, 32)), "v": np.ones((3, 2, 32))}, "k has dtype float64; .* can become int8"),
    ({"k_pages": np.zeros((4, 2, 2, 32), np.uint8)}, "k_pages has dtype uint8; kv_format int8 is stored in int8"),
    ({"slot_mapping": [0.0, 1.0, 2.0]}, "slot_mapping has dtype float64; integers"),
    ({"k_scale": np.ones((4, 2, 2))}, "k_scale has dtype float64; scales of slots are written as float32"),
    ({"k_scale": np.ones(2, np.bool_)}, "k_scale has dtype bool"),
]


@pytest.mark.parametrize(("changes", "match"), DTYPES)
def test_dtypes(changes, match):
    refused(errors.DTypeError, match, arrays(), **changes)


def test_pages_of_two_formats():
    given = arrays("e4m3fn")
    refused(errors.DTypeError, "v_pages", given, kv_format=None, v_pages=given["v_pages"].view(ml_dtypes.float8_e5m2))
    refused(errors.DTypeError, "k has dtype float32 and k_pages float16", arrays("float16"))


VALUES = [
    ({"slot_mapping": [0, 1, 8]}, r"slot_mapping\[2\] is 8; slots 0 to 7 exist"),
    ({"slot_mapping": [5, 1, 5]}, "slot_mapping holds slot 5 twice"),
    ({"slot_mapping": np.array([0, 1, 2**63], np.uint64)}, "slot_mapping holds 9223372036854775808"),
    ({"k_scale": 0.0}, "k_scale holds 0.0; numbers above 0"),
    ({"k_scale": -1}, "k_scale holds -1"),
    ({"v_scale": 1e-50}, "v_scale holds 1e-50"),
    ({"v_scale": [1.0, 0.0]}, "v_scale holds 0.0"),
    ({"k_scale": np.nan}, "k_scale is nan"),
    ({"k_scale": np.array([1, np.inf], np.float32)}, "k_scale holds inf"),
    ({"v_scale": 1e39}, r"v_scale is 1e\+39; a finite float32"),
    ({"kv_format": "int4"}, "kv_format is 'int4'"),
    ({"k_block_scales": np.zeros((4, 2, 2, 2), np.uint8)}, "k_block_scales is given, but int8 has no block scales"),
    ({"positions": [0, 1, 2]}, "positions is given without rope"),
    ({"rope": Rotary()}, "rope is given without positions"),
    ({"rope": Rotary(rotary_dim=34), "positions": [0, 1, 2]}, "rotary_dim is 34"),
]


@pytest.mark.parametrize(("changes", "match"), VALUES)
def test_values(changes, match):
    refused(errors.ArgumentError, match, arrays(), **changes)


def test_positions_beyond_the_tables():
    tables = np.ones((4, 16), np.float32)
    rope = Rotary(cos=tables, sin=tables)
    refused(errors.ArgumentError, r"positions\[1\] is 4", arrays(), rope=rope, positions=[0, 4, 2])
    refused(errors.ShapeError, "positions has shape", arrays(), rope=rope, positions=[0, 1])


def test_scales_that_a_format_has_not():
    refused(errors.ArgumentError, "k_scale is given, but pages of float32 hold", arrays("float32"), k_scale=1.0)
    nvfp4 = arrays("nvfp4")
    refused(errors.ArgumentError, "v_block_scales is None; nvfp4 needs an array", nvfp4, v_block_scales=None)
    refused(errors.ShapeError, "k_scale has shape", nvfp4, k_scale=np.ones((4, 2, 2), np.float32))
    refused(errors.ShapeError, "k_scale has shape", nvfp4, k_scale=np.ones(2, np.float32))
    wrong = np.zeros((4, 2, 2, 3), np.uint8)
    refused(errors.ShapeError, r"k_block_scales has shape .*; \[4, 2, 2, 2\] is needed", nvfp4, k_block_scales=wrong)
    wrong = nvfp4["k_block_scales"].view(ml_dtypes.float8_e8m0fnu)
    refused(errors.DTypeError, "k_block_scales has dtype float8_e8m0fnu", nvfp4, k_block_scales=wrong)


def test_kinds():
    refused(errors.ArrayTypeError, "rope is a dict", arrays(), rope={}, positions=[0, 1, 2])
    refused(errors.ArrayTypeError, "k_pages", arrays(), k_pages=None)
    refused(errors.ArrayTypeError, "slot_mapping: builtins.int is no array", arrays(), slot_mapping=5)


def test_memory_that_is_written_lies_apart():
    given = arrays("float32")
    pages = given["k_pages"]
    refused(errors.OverlapError, "k_pages shares memory with v_pages", given, v_pages=pages)
    refused(errors.OverlapError, "k_pages shares memory with k", given, k=pages[:3, 0])
    refused(errors.OverlapError, "v_pages shares memory with v", given, v=given["v_pages"][:3, 1])
    one = np.broadcast_to(np.zeros((1, 2, 2, 32), np.float32), (4, 2, 2, 32))
    refused(errors.ArrayTypeError, "v_pages is read-only", given, v_pages=one)
    one = np.lib.stride_tricks.as_strided(np.zeros((2, 2, 32), np.float32), (4, 2, 2, 32), (0, 256, 128, 4))
    refused(errors.OverlapError, "k_pages has strides", given, k_pages=one)
    odd = np.zeros(4 * 2 * 2 * 32 * 4 + 4, np.uint8)[1:-3].view(np.float32).reshape(4, 2, 2, 32)
    refused(errors.ArgumentError, "k_pages has elements at addresses", given, k_pages=odd)
    scales = np.ones((4, 2, 2), np.float32)
    refused(errors.OverlapError, "k_scale shares memory with v_scale", arrays(), k_scale=scales, v_scale=scales[::-1])
    tables = np.ones((4, 16), np.float32)
    rope = Rotary(cos=tables[:, :8], sin=tables[:, 8:])
    shared = {"k_scale": tables.reshape(4, 2, 8)[:, :, :2], "rope": rope, "positions": [0, 1, 2]}
    refused(errors.OverlapError, "k_scale shares memory with cos", arrays(), **shared)
