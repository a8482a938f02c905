"""Attention, dense and packed, fused and not, and its gradients, as the fuzzer draws them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

import cuattn
from cuattn.testing.fuzzing.arrays import ELEMENT_KINDS, Array, dtype_of
from cuattn.testing.fuzzing.operation import Drawing, Operation, Problem, Results, Skeleton
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.option_strategies import STRATEGIES, Drawn, names_on
from cuattn.testing.options import BIAS_KINDS, MASK_KINDS, broadcast_shapes
from cuattn.testing.strategies import sequence_lengths
from cuattn.testing.tolerance import assert_attention_close, assert_varlen_close

__all__ = ["DROPOUT", "HEADS", "OPERATIONS", "draw_options", "head_dims", "skeleton", "spread"]

#: (query heads, key/value heads): groups of one, of powers of two, of three and five.
HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 1), (6, 2))
DROPOUT = ("dropout_p", "dropout_seed", "dropout_offset")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_AWKWARD_DIMS = (32, 64, 8, 16, 31, 33, 40, 63, 1, 7, 96, 100, 128, 65)
_LARGE_DIMS = (129, 160, 192, 255, 256)


def head_dims(rng: random.Random, *, most: int = 256) -> tuple[int, int]:
    """Draw D and E: equal half of the time, small ones mostly, for kernels with large ones take long to compile."""
    large = [n for n in _LARGE_DIMS if n <= most]
    one = rng.choice(large) if large and rng.random() < 0.1 else rng.choice(_AWKWARD_DIMS)
    return one, one if rng.random() < 0.5 else rng.choice(_AWKWARD_DIMS)


def skeleton(options: Sequence[str], *, dtypes: Sequence[str] = _FLOATS, most: int = 256, few: float = 0.3) -> Any:
    """Return what draws a skeleton: a dtype, head dims, whether rows are aligned, and each option or not."""

    def drawn(rng: random.Random) -> Skeleton:
        dtype = rng.choice(list(dtypes))
        head_dim, head_dim_v = head_dims(rng, most=most)
        aligned = rng.random() < 0.5
        if aligned:
            align = 16 // dtype_of(dtype).itemsize
            head_dim, head_dim_v = (-(-n // align) * align for n in (head_dim, head_dim_v))
        share = rng.choice((0.1, few, 0.6, 1.0))
        chosen = [name for name in options if rng.random() < share and _fits(name, dtype)]
        return {
            "dtype": dtype,
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
            "aligned": aligned,
            "options": chosen,
        }

    return drawn


def _fits(option: str, dtype: str) -> bool:
    if option.endswith("_descale"):
        return dtype.startswith("float8")
    return option != "precision" or dtype == "float32"


def spread(value: Any) -> Any:
    """Return a drawn option as plain values, arrays of NumPy as tuples."""
    return tuple(value.tolist()) if isinstance(value, np.ndarray) else value


def draw_options(
    of: Drawing, names: Sequence[str], shape: tuple[int, int, int, int], num_kv_heads: int
) -> dict[str, Any]:
    """Draw those options for a call with [B, H, N, M] = `shape`; arrays as what they are made from."""
    batch, heads, seqlen_q, seqlen_k = shape
    chosen: dict[str, Any] = {}
    for name in names:
        if name == "bias":
            dtype, kinds = of.one("float32", "float16", "bfloat16", "float64"), [f"bias_{kind}" for kind in BIAS_KINDS]
            chosen[name] = of.array(of.one(*_small_first(shape)), dtype, *kinds)
        elif name == "mask":
            chosen[name] = of.array(of.one(*_small_first(shape)), "bool", *(f"mask_{kind}" for kind in MASK_KINDS))
        elif name == "alibi_slopes":
            chosen[name] = of.array(of.one((heads,), (batch, heads)), "float32", "slopes", lies=False)
        elif name == "sinks":
            chosen[name] = of.array((heads,), "float32", "sinks", lies=False)
        elif name.endswith("_descale"):
            chosen[name] = of.array((batch, num_kv_heads), "float32", "descale", lies=False)
        else:
            drawn = Drawn(np.random.default_rng(0), batch, heads, num_kv_heads, seqlen_q, seqlen_k)
            value = of.draw(STRATEGIES[name](drawn))
            chosen |= value if name == "dropout" else {name: spread(value)}
    return chosen


def _small_first(shape: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    return broadcast_shapes(shape)[::-1]


_ARRAYS = ("q", "k", "v", "dout", "dlse", "out", "cu_seqlens_q", "cu_seqlens_k")


def keywords(problem: Problem, *, there: bool) -> dict[str, Any]:
    """Return the options of a call of attention: those that are neither its arrays nor its gradients' alone."""
    names = [name for name in problem.arguments if name not in (*_ARRAYS, "deterministic", "return_dbias")]
    return problem.given_there(*names) if there else problem.given(*names)


# --- dense -----------------------------------------------------------------------------------------------------------


def _draw_dense(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of = Drawing(draw)
    batch, (heads, groups) = of.one(1, 2, 3, 0), of.one(*HEADS)
    seqlen_q, seqlen_k = of.length(), of.length()
    aligned, dtype = of_kernel["aligned"], of_kernel["dtype"]
    d, e = of_kernel["head_dim"], of_kernel["head_dim_v"]
    q = of.array((batch, seqlen_q, heads, d), dtype, *ELEMENT_KINDS, aligned=aligned)
    k, v = (of.array((batch, seqlen_k, groups, n), dtype, *ELEMENT_KINDS, aligned=aligned or None) for n in (d, e))
    shape = batch, heads, seqlen_q, seqlen_k
    return {"q": q, "k": k, "v": v, **draw_options(of, of_kernel["options"], shape, groups)}


def _with_out(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    arguments = _draw_dense(draw, of_kernel)
    of = Drawing(draw)
    dtype = "bfloat16" if of_kernel["dtype"].startswith("float8") else of_kernel["dtype"]
    if of.one(False, True):
        shape = *arguments["q"].shape[:3], of_kernel["head_dim_v"]
        arguments["out"] = of.array(shape, dtype, "zeros", aligned=of_kernel["aligned"] or None)
    return arguments


def _call_dense(problem: Problem) -> Results:
    arrays = (problem.there(name) for name in "qkv")
    options = keywords(problem, there=True)
    if "out" not in problem:
        out, lse = cuattn.attention(*arrays, return_lse=True, **options)
        return problem.numpy(out=out, lse=lse)
    spec: Array = problem.arguments["out"]
    target = problem.executor.guarded(spec.shape, problem.guarded["out"].array.dtype, spec.layout)
    out, lse = cuattn.attention(*arrays, return_lse=True, out=target.array, **options)
    target.check()
    return problem.numpy(out=target.array, lse=lse)


def _check_dense(problem: Problem, results: Results) -> None:
    arrays = (problem[name] for name in "qkv")
    assert_attention_close(results["out"], *arrays, lse=results.get("lse"), **keywords(problem, there=False))


def _call_unfused(problem: Problem) -> Results:
    arrays = (problem.there(name) for name in "qkv")
    out, lse = cuattn.standard_attention(*arrays, return_lse=True, **keywords(problem, there=True))
    return problem.numpy(out=out, lse=lse)


# --- packed ----------------------------------------------------------------------------------------------------------


def _draw_packed(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of = Drawing(draw)
    lengths = of.draw(sequence_lengths(100))
    starts = [tuple(int(n) for n in np.concatenate([[0], np.cumsum(own)])) for own in zip(*lengths, strict=True)]
    heads, groups = of.one(*HEADS)
    aligned, dtype = of_kernel["aligned"], of_kernel["dtype"]
    d, e = of_kernel["head_dim"], of_kernel["head_dim_v"]
    q = of.array((starts[0][-1], heads, d), dtype, *ELEMENT_KINDS, aligned=aligned)
    k, v = (of.array((starts[1][-1], groups, n), dtype, *ELEMENT_KINDS, aligned=aligned or None) for n in (d, e))
    shape = len(lengths), heads, max(n for n, _ in lengths), max(m for _, m in lengths)
    options = draw_options(of, of_kernel["options"], shape, groups)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], **options}


def _starts(problem: Problem) -> list[Any]:
    return [np.asarray(problem[f"cu_seqlens_{side}"], np.int32) for side in "qk"]


def _call_packed(problem: Problem) -> Results:
    arrays = (problem.there(name) for name in "qkv")
    options = keywords(problem, there=True)
    out, lse = cuattn.attention_varlen(*arrays, *_starts(problem), return_lse=True, **options)
    return problem.numpy(out=out, lse=lse)


def _check_packed(problem: Problem, results: Results) -> None:
    arrays = (problem[name] for name in "qkv")
    options = keywords(problem, there=False)
    assert_varlen_close(results["out"], *arrays, *_starts(problem), lse=results["lse"], **options)


# --- gradients -------------------------------------------------------------------------------------------------------


def _with_gradients(forward: Any) -> Any:
    def drawn(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
        arguments = forward(draw, of_kernel)
        of, q = Drawing(draw), arguments["q"]
        shape = *q.shape[:-1], of_kernel["head_dim_v"]
        # Beside huge inputs, a huge gradient says nothing: what is computed is infinite.
        arguments["dout"] = of.array(shape, q.dtype, "normal", "denormal", "constant_rows", aligned=None)
        if of.one(False, True):
            lse_shape = shape[:-1][::-1] if len(shape) == 3 else (shape[0], shape[2], shape[1])
            real = "float64" if q.dtype == "float64" else "float32"
            arguments["dlse"] = of.array(lse_shape, real, "normal")
        if "bias" in arguments:
            arguments["return_dbias"] = of.one(False, True)
        if of.one(True, True, False) is False:
            arguments["deterministic"] = False
        return arguments

    return drawn


def _call_gradients(problem: Problem) -> Results:
    """Make the forward call, then the backward one with what it gave."""
    arrays = [problem.there(name) for name in "qkv"]
    packed = "cu_seqlens_q" in problem
    options = keywords(problem, there=True)
    starts = _starts(problem) if packed else []
    forward = cuattn.attention_varlen if packed else cuattn.attention
    backward = cuattn.attention_varlen_backward if packed else cuattn.attention_backward
    out, lse = forward(*arrays, *starts, return_lse=True, **options)
    more = problem.given_there("dlse", "deterministic", "return_dbias")
    grads = backward(problem.there("dout"), *arrays, out, lse, *starts, **options, **more)
    found = problem.numpy(**grads._asdict())
    problem.saved = {"grads": type(grads)(*(found.get(name) for name in grads._fields))}
    return {**found, **problem.numpy(out=out, lse=lse)}


def _check_gradients(problem: Problem, results: Results) -> None:
    packed = "cu_seqlens_q" in problem
    check = assert_varlen_gradients_close if packed else assert_gradients_close
    arrays = [problem[name] for name in ("dout", "q", "k", "v")]
    options = keywords(problem, there=False) | problem.given("dlse")
    starts = _starts(problem) if packed else []
    check(problem.saved["grads"], *arrays, results["out"], results["lse"], *starts, **options)


_FORWARD = names_on("attention")
_GRADIENTS = names_on("gradients")

OPERATIONS = (
    Operation(
        "attention",
        ("attention",),
        _FORWARD,
        skeleton(_FORWARD, dtypes=(*_FLOATS, "float8_e4m3fn", "float8_e5m2")),
        _with_out,
        _call_dense,
        _check_dense,
    ),
    Operation(
        "attention_varlen",
        ("attention_varlen",),
        _FORWARD,
        skeleton(_FORWARD, dtypes=(*_FLOATS, "float8_e4m3fn", "float8_e5m2")),
        _draw_packed,
        _call_packed,
        _check_packed,
    ),
    Operation(
        "standard_attention",
        ("standard_attention",),
        _GRADIENTS,
        skeleton(_GRADIENTS),
        _draw_dense,
        _call_unfused,
        _check_dense,
    ),
    Operation(
        "attention_backward",
        ("attention_backward",),
        _GRADIENTS,
        skeleton(_GRADIENTS),
        _with_gradients(_draw_dense),
        _call_gradients,
        _check_gradients,
    ),
    Operation(
        "attention_varlen_backward",
        ("attention_varlen_backward",),
        _GRADIENTS,
        skeleton(_GRADIENTS),
        _with_gradients(_draw_packed),
        _call_gradients,
        _check_gradients,
    ),
)
