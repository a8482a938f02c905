"""Softmax, rotations and merges as the fuzzer draws them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import cuattn
from cuattn.testing.fuzzing.arrays import ELEMENT_KINDS
from cuattn.testing.fuzzing.of_attention import HEADS, head_dims
from cuattn.testing.fuzzing.operation import Drawing, Operation, Problem, Results, Skeleton
from cuattn.testing.merging import assert_merge_close
from cuattn.testing.rotary_tolerance import assert_rope_close, assert_split_qkv_close
from cuattn.testing.tolerance import assert_softmax_close

__all__ = ["OPERATIONS"]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_COLUMNS = (1, 2, 31, 32, 33, 127, 128, 255, 257, 1000, 1023, 1024, 1025, 2049, 5000, 30_001, 150_001)


# --- softmax ---------------------------------------------------------------------------------------------------------


def _softmax_skeleton(rng: random.Random) -> Skeleton:
    algorithm = rng.choice(("online", "safe", "naive"))
    return {"dtype": rng.choice(_FLOATS), "algorithm": algorithm, "options": []}


def _draw_softmax(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of = Drawing(draw)
    columns, axis = of.one(*_COLUMNS), of.one(-1, 0, 1)
    rows = of.one(1, 2, 5) if columns <= 5000 else 1  # those that fit on no chip, and those that several CTAs share
    algorithm = of_kernel["algorithm"]
    shape = {-1: (rows, columns), 0: (columns, rows), 1: (2, columns, rows)}[axis]
    # Without the maximum taken off, numbers have to be such that exponentials of them are neither 0 nor infinite.
    kinds = ("normal", "constant_rows", "denormal") if algorithm == "naive" else (*ELEMENT_KINDS, "with_infinities")
    return {"x": of.array(shape, of_kernel["dtype"], *kinds), "axis": axis, "algorithm": algorithm}


def _softmax(kind: str) -> Operation:
    def call(problem: Problem) -> Results:
        function = getattr(cuattn, kind)
        out = function(problem.there("x"), axis=problem["axis"], algorithm=problem["algorithm"])
        return problem.numpy(out=out)

    def check(problem: Problem, results: Results) -> None:
        assert_softmax_close(results["out"], problem["x"], problem["axis"], kind)

    return Operation(kind, (kind,), (), _softmax_skeleton, _draw_softmax, call, check)


# --- rotations -------------------------------------------------------------------------------------------------------


def _rope_skeleton(rng: random.Random) -> Skeleton:
    head_dim, _ = head_dims(rng)
    options = [name for name in ("interleaved", "inverse") if rng.random() < 0.5]
    return {"dtype": rng.choice(_FLOATS), "head_dim": head_dim + head_dim % 2, "options": options}


def _draw_rope(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of, head_dim = Drawing(draw), of_kernel["head_dim"]
    tokens, heads = of.length(60), of.one(1, 2, 5)
    return {
        "x": of.array((tokens, heads, head_dim), of_kernel["dtype"], *ELEMENT_KINDS),
        "positions": of.array((tokens,), "int32", "positions", lies=False),
        "rotary_dim": of.one(*dict.fromkeys((head_dim, 2, head_dim // 4 * 2 or 2))),
        "base": of.one(1e4, 100.0, 5e5),
        **dict.fromkeys(of_kernel["options"], True),
    }


def _of_rope(problem: Problem) -> dict[str, Any]:
    return problem.given("rotary_dim", "base", "interleaved", "inverse")


def _call_rope(problem: Problem) -> Results:
    return problem.numpy(out=cuattn.rope(problem.there("x"), problem.there("positions"), **_of_rope(problem)))


def _check_rope(problem: Problem, results: Results) -> None:
    assert_rope_close(results["out"], problem["x"], problem["positions"], **_of_rope(problem))


def _split_skeleton(rng: random.Random) -> Skeleton:
    options = [name for name in ("bias", "rope") if rng.random() < 0.5]
    return {"dtype": rng.choice(_FLOATS), "head_dim": rng.choice((32, 64, 8, 40, 128, 34)), "options": options}


def _draw_split(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of, head_dim, dtype = Drawing(draw), of_kernel["head_dim"], of_kernel["dtype"]
    heads, groups = of.one(*HEADS)
    tokens, width = of.length(60), (heads + 2 * groups) * head_dim
    arguments: dict[str, Any] = {"qkv": of.array((tokens, width), dtype, *ELEMENT_KINDS), "heads": (heads, groups)}
    if "bias" in of_kernel["options"]:
        arguments["bias"] = of.array((width,), dtype, "normal", "wide", lies=False)
    if "rope" in of_kernel["options"]:
        arguments["rope"] = {"base": of.one(1e4, 100.0), "interleaved": of.one(False, True)}
        arguments["positions"] = of.array((tokens,), "int32", "positions", lies=False)
    return arguments


def _call_split(problem: Problem) -> Results:
    heads, groups = problem["heads"]
    more = problem.given_there("positions")
    if "rope" in problem:
        more["rope"] = cuattn.Rotary(**problem["rope"])
    bias = problem.there("bias") if "bias" in problem else None
    q, k, v = cuattn.split_qkv(problem.there("qkv"), bias, num_heads=heads, num_kv_heads=groups, **more)
    return problem.numpy(q=q, k=k, v=v)


def _check_split(problem: Problem, results: Results) -> None:
    heads, groups = problem["heads"]
    more = problem.given("positions", "rope")
    outs = tuple(results[name] for name in "qkv")
    bias = problem.get("bias")
    assert_split_qkv_close(outs, problem["qkv"], bias, num_heads=heads, num_kv_heads=groups, **more)


# --- merges ----------------------------------------------------------------------------------------------------------


def _merge_skeleton(rng: random.Random) -> Skeleton:
    options = ["sinks"] if rng.random() < 0.5 else []
    return {"dtype": rng.choice(_FLOATS), "head_dim": head_dims(rng)[0], "options": options}


def _draw_merge(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of, dtype = Drawing(draw), of_kernel["dtype"]
    parts, batch, seqlen, heads = of.one(2, 1, 3, 7), of.one(1, 2), of.length(40), of.one(1, 2, 3)
    shape = (parts, batch, seqlen, heads, of_kernel["head_dim"])
    real = "float64" if dtype == "float64" else "float32"
    arguments = {
        "outs": of.array(shape, dtype, *ELEMENT_KINDS, lies=False),
        "lses": of.array((parts, batch, heads, seqlen), real, "logs", lies=False),
    }
    if "sinks" in of_kernel["options"]:
        arguments["sinks"] = of.array((heads,), "float32", "sinks", lies=False)
    return arguments


def _call_merge(problem: Problem) -> Results:
    more = problem.given_there("sinks")
    out, lse = cuattn.merge_states(problem.there("outs"), problem.there("lses"), **more)
    return problem.numpy(out=out, lse=lse)


def _check_merge(problem: Problem, results: Results) -> None:
    more = problem.given("sinks")
    assert_merge_close((results["out"], results["lse"]), problem["outs"], problem["lses"], **more)


# --- padding ---------------------------------------------------------------------------------------------------------


def _padding_skeleton(rng: random.Random) -> Skeleton:
    return {"dtype": rng.choice((*_FLOATS, "int32", "uint8")), "options": []}


def _draw_padding(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of = Drawing(draw)
    batch, seqlen, width = of.one(1, 2, 5, 0), of.length(140), of.one(1, 8, 3, 64)
    return {
        "mask": of.array((batch, seqlen), "bool", "mask_random", "mask_nothing", "mask_everything", "mask_sparse"),
        "x": of.array((batch, seqlen, width), of_kernel["dtype"], "normal" if "t" in of_kernel["dtype"] else "unit"),
    }


def _call_padding(problem: Problem) -> Results:
    plan = cuattn.padding_plan(problem.there("mask"))
    rows = cuattn.remove_padding(problem.there("x"), plan)
    return problem.numpy(rows=rows, again=cuattn.restore_padding(rows, plan), cu_seqlens=plan.cu_seqlens)


def _check_padding(problem: Problem, results: Results) -> None:
    mask, x = problem["mask"], problem["x"]
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
    np.testing.assert_array_equal(results["cu_seqlens"], starts)
    np.testing.assert_array_equal(results["rows"].view(np.uint8), np.ascontiguousarray(x[mask]).view(np.uint8))
    expected = np.where(mask[..., None], x, np.zeros((), x.dtype))
    np.testing.assert_array_equal(results["again"].view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


OPERATIONS = (
    *(_softmax(kind) for kind in ("softmax", "log_softmax", "logsumexp")),
    Operation("rope", ("rope",), ("interleaved", "inverse"), _rope_skeleton, _draw_rope, _call_rope, _check_rope),
    Operation("split_qkv", ("split_qkv",), ("bias", "rope"), _split_skeleton, _draw_split, _call_split, _check_split),
    Operation("merge_states", ("merge_states",), ("sinks",), _merge_skeleton, _draw_merge, _call_merge, _check_merge),
    Operation(
        "padding",
        ("padding_plan", "remove_padding", "restore_padding"),
        (),
        _padding_skeleton,
        _draw_padding,
        _call_padding,
        _check_padding,
    ),
)
