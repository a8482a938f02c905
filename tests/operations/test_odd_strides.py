"""Each stride alone is odd, and each array alone begins at an odd place: no kernel takes it for one in whole words.

A kernel may move 16 bytes, or pairs of numbers, where all addresses allow it. Every stride of every array has a part in
that decision, and a contiguous array hides it: there, one stride is odd only if the next ones are. The layouts here are
transposed so that all strides but one are multiples of 16 bytes.
"""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import Rotary
from cuattn.testing.arrays import Layout, allocate, place

F16, F32, I8 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int8)
ANGLES = np.arange(9)[:, None] * np.linspace(1.0, 0.05, 16)


def odd_layouts(shape):
    """Layouts in which one stride that counts is odd and all others are multiples of 16 elements; or the place of the
    first element is.
    """
    last = len(shape) - 1
    for axis in range(last):
        if shape[axis] > 1:
            others = [other for other in range(last) if other != axis]
            pad = [-extent % 16 for extent in shape]
            pad[last] += 1
            yield f"stride {axis}", Layout((*others, axis, last), tuple(pad))
    yield "offset", Layout(pad=tuple(-extent % 16 for extent in shape), offset=1)


def normal(*shape, dtype=F16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def attention(dtype, head_dim):
    inputs = {name: normal(2, 5, 2, head_dim, dtype=dtype, seed=i) for i, name in enumerate("qkv")}

    def call(x, out):
        cuattn.attention(x["q"], x["k"], x["v"], out=out["out"])

    return inputs, {"out": ((2, 5, 2, head_dim), dtype)}, call


def masked():
    inputs = {name: normal(1, n, 2, 32, seed=i) for i, (name, n) in enumerate((("q", 20), ("k", 48), ("v", 48)))}
    inputs["mask"] = np.arange(20)[:, None] // 9 % 2 == np.arange(48) // 5 % 3 + np.zeros((1, 2, 1, 1), int)

    def call(x, out):
        cuattn.attention(x["q"], x["k"], x["v"], mask=x["mask"], out=out["out"])

    return inputs, {"out": ((1, 20, 2, 32), F16)}, call


def decode(dtype, num_splits, head_dim_v=32):
    dims = {"k": 32, "v": head_dim_v}
    inputs = {"q": normal(2, 3, 2, 32, dtype=dtype)}
    inputs |= {name: normal(2, 40, 2, dims[name], dtype=dtype, seed=i) for i, name in enumerate("kv", 1)}

    def call(x, out):
        lengths = [40, 33]
        cuattn.decode_attention(x["q"], x["k"], x["v"], lengths, num_splits=num_splits, out=out["out"])

    return inputs, {"out": ((2, 3, 2, head_dim_v), dtype)}, call


def paged(dtype):
    inputs = {"q": normal(2, 3, 2, 32, dtype=dtype)}
    inputs |= {name: normal(5, 8, 2, 32, dtype=dtype, seed=i) for i, name in enumerate("kv", 1)}

    def call(x, out):
        tables = [[4, 1, 0], [2, 3, -1]]
        options = {"rope": Rotary(), "rotate_keys": True, "num_splits": 1}
        cuattn.paged_attention(x["q"], x["k"], x["v"], tables, [20, 16], out=out["out"], **options)

    return inputs, {"out": ((2, 3, 2, 32), dtype)}, call


def append(dtype, stored):
    inputs = {name: normal(4, 2, 32, dtype=dtype, seed=i) for i, name in enumerate("kv")}
    outs = {f"{side}_pages": ((3, 8, 2, 32), stored) for side in "kv"}
    if stored != dtype:
        outs |= {f"{side}_scale": ((3, 8, 2), F32) for side in "kv"}

    def call(x, out):
        cuattn.append_kv(x["k"], x["v"], slot_mapping=[9, 0, 17, 23], **out)

    return inputs, outs, call


def rope(tables):
    inputs = {"x": normal(2, 4, 2, 32)}
    if tables:
        inputs |= {"cos": np.cos(ANGLES).astype(F32), "sin": np.sin(ANGLES).astype(F32)}

    def call(x, out):
        given = {name: x[name] for name in ("cos", "sin") if name in x}
        cuattn.rope(x["x"], [[3, 1, 8, 0], [5, 7, 2, 4]], out=out["out"], **given)

    return inputs, {"out": ((2, 4, 2, 32), F16)}, call


def split(rotate):
    inputs = {"qkv": normal(6, 256), "bias": normal(256, seed=1)}

    def call(x, out):
        options = {"rope": Rotary(), "positions": np.arange(6)} if rotate else {}
        given = tuple(out[name] for name in "qkv")
        cuattn.split_qkv(x["qkv"], x["bias"], num_heads=4, num_kv_heads=2, out=given, **options)

    return inputs, {name: ((6, heads, 32), F16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}, call


def merge(stacked):
    inputs = {"outs": normal(3, 2, 4, 2, 32), "lses": normal(3, 2, 2, 4, dtype=F32, seed=1)}
    if not stacked:
        inputs = {f"{name}{i}": x[i] for name, x in inputs.items() for i in range(2)}

    def call(x, out):
        names = ("outs", "lses") if stacked else ("outs0", "lses0", "outs1", "lses1")
        cuattn.merge_states(*(x[name] for name in names), out=(out["out"], out["lse"]))

    return inputs, {"out": ((2, 4, 2, 32), F16), "lse": ((2, 2, 4), F32)}, call


def copies():
    def call(x, out):
        out["pages"][...] = x["pages"]
        cuattn.copy_pages(out["pages"], [0, 3], [2, 1])

    return {"pages": normal(4, 3, 2, 32)}, {"pages": ((4, 3, 2, 32), F16)}, call


CASES = {
    "attention float16": attention(F16, 32),
    "attention float32": attention(F32, 64),  # 16 bytes a lane
    "masked": masked(),
    "decode float16": decode(F16, 1),
    "decode float16 in splits": decode(F16, 2),
    "decode float16 of odd values": decode(F16, 1, 25),  # with two heads, only the stride of heads is odd
    "decode float16 of odd values in splits": decode(F16, 2, 25),
    "decode float32": decode(F32, 1),
    "paged float16": paged(F16),
    "paged float32": paged(F32),
    "append float16": append(F16, F16),
    "append int8": append(F16, I8),
    "rope": rope(False),
    "rope of tables": rope(True),
    "split": split(False),
    "split and rope": split(True),
    "merge stacked": merge(True),
    "merge two": merge(False),
    "copy": copies(),
}


@pytest.mark.parametrize("case", CASES)
def test_each_stride_alone(executor, case):
    inputs, outs, call = CASES[case]

    def run(changed=None, layout=None):
        """The results with one array in another layout."""
        here = {name: place(x, layout if changed == ("in", name) else Layout()) for name, x in inputs.items()}
        there = {
            name: allocate(shape, dtype, layout if changed == ("out", name) else Layout()).to(executor.xp)
            for name, (shape, dtype) in outs.items()
        }
        call({name: executor.array(x) for name, x in here.items()}, {name: x.array for name, x in there.items()})
        for guarded in there.values():
            guarded.check()
        return {name: executor.numpy(guarded.array) for name, guarded in there.items()}

    expected = run()
    shapes = {("in", name): x.shape for name, x in inputs.items()} | {("out", n): s for n, (s, _) in outs.items()}
    for changed, shape in shapes.items():
        for what, layout in odd_layouts(shape):
            found = run(changed, layout)
            for name, x in found.items():
                message = f"{what} of {changed[1]}: {name}"
                np.testing.assert_allclose(x.astype(F32), expected[name].astype(F32), 2e-3, 1e-5, err_msg=message)


def apart(values):
    """The same list as an array of two types of integers, and as every third entry of an array, between wrong ones."""
    for dtype in (np.int32, np.int64):
        wide = np.full((*np.shape(values), 3), 10**6, dtype)
        wide[..., 1] = values
        yield wide[..., 1].copy()
        yield wide[..., 1]


LISTS = {
    "append: slots": [9, 0, -1, 23],
    "append: positions": [3, 8, 1, 5],
    "rope: positions": [[3, 1], [5, 7]],
    "split: positions": [3, 8, 1, 5],
    "copy: src": [0, 3],
    "copy: dst": [2, 1],
    "slots: tables": [[4, 1, 0], [2, 3, 0]],
    "slots: lengths": [3, 9],
    "paged: tables": [[3, 1], [2, 0]],
    "paged: lengths": [11, 16],
}


def of_list(executor, case, values):
    """The result of a call with a list of integers in some form."""
    new = [executor.array(normal(4, 2, 32, seed=seed)) for seed in range(2)]
    x = executor.array(normal(2, 2, 2, 32))
    operation, name = case.split(": ")
    if operation == "append":
        pages = [executor.array(np.zeros((4, 8, 2, 32), F16)) for _ in range(2)]
        given = {"slots": [9, 0, 17, 23], "positions": [0, 0, 0, 0], name: values}
        cuattn.append_kv(*new, *pages, given["slots"], positions=given["positions"], rope=Rotary())
        return pages[0]
    if operation == "rope":
        return cuattn.rope(x, values)
    if operation == "split":
        qkv = executor.array(normal(4, 192))
        return cuattn.split_qkv(qkv, num_heads=2, num_kv_heads=2, rope=Rotary(), positions=values)[1]
    if operation == "copy":
        pages = executor.array(normal(4, 3))
        cuattn.copy_pages(pages, **{"src": [0, 3], "dst": [2, 1], name: values})
        return pages
    if operation == "slots":
        given = {"tables": [[4, 1, 0], [2, 3, 0]], "lengths": [3, 9], name: values}
        return cuattn.slot_mapping(given["tables"], given["lengths"], [5, 2], 4)
    given = {"tables": [[3, 1], [2, 0]], "lengths": [11, 16], name: values}
    pages = [executor.array(normal(4, 8, 2, 32, seed=seed)) for seed in range(2)]
    return cuattn.paged_attention(x, *pages, given["tables"], given["lengths"])


@pytest.mark.parametrize("case", LISTS)
def test_lists_apart(executor, case):
    """Integers of 32 and of 64 bits, contiguous or with others between them."""
    expected = executor.numpy(of_list(executor, case, LISTS[case]))
    for values in apart(LISTS[case]):
        np.testing.assert_array_equal(executor.numpy(of_list(executor, case, values)), expected)
