"""Linear, sparse, differential and dual-chunk attention as the fuzzer draws them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import cuattn
from cuattn import BlockMask, reference
from cuattn.testing.differential_gradient_tolerance import assert_differential_gradients_close
from cuattn.testing.differential_tolerance import assert_differential_close
from cuattn.testing.dual_chunk_tolerance import assert_dual_chunk_close, assert_dual_chunk_gradients_close
from cuattn.testing.fuzzing.arrays import ELEMENT_KINDS
from cuattn.testing.fuzzing.of_attention import HEADS, draw_options, skeleton
from cuattn.testing.fuzzing.operation import Drawing, Operation, Problem, Results, Skeleton
from cuattn.testing.gradient_tolerance import assert_gradients_close
from cuattn.testing.option_strategies import names_on
from cuattn.testing.tolerance import assert_attention_close

__all__ = ["OPERATIONS"]

#: Values that those tolerance rules are made for whose terms are not as fine as those of attention.
_TAME = ("normal", "constant_rows", "denormal")


def _qkv(
    of: Drawing, of_kernel: Skeleton, shape: tuple[int, int, int], heads: tuple[int, int, int], *kinds: str
) -> dict[str, Any]:
    """Draw q, k and v for [B, N, M] = `shape` and heads of each."""
    batch, seqlen_q, seqlen_k = shape
    extents = zip(
        "qkv",
        (seqlen_q, seqlen_k, seqlen_k),
        heads,
        (of_kernel["head_dim"], of_kernel["head_dim"], of_kernel["head_dim_v"]),
        strict=True,
    )
    aligned = of_kernel["aligned"]
    return {
        name: of.array(
            (batch, n, h, d), of_kernel["dtype"], *kinds, aligned=aligned if name == "q" else aligned or None
        )
        for name, n, h, d in extents
    }


# --- block-sparse ----------------------------------------------------------------------------------------------------

_SPARSE = tuple(name for name in names_on("gradients") if name != "precision")
_BLOCK_SIZES = ((64, 64), (128, 128), (16, 16), (128, 64), (32, 96), (1, 7), (100, 100))


def _draw_sparse(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of = Drawing(draw)
    batch, (heads, groups) = of.one(1, 2), of.one(*HEADS)
    n, m = of.length(150, empty=False), of.length(150, empty=False)
    block = of.one(*_BLOCK_SIZES)
    leading = of.one((), (heads,), (batch, 1), (batch, heads))
    grid = (*leading, -(-n // block[0]), -(-m // block[1]))
    return {
        **_qkv(of, of_kernel, (batch, n, m), (heads, groups, groups), *ELEMENT_KINDS),
        "blocks": of.array(grid, "bool", "mask_random", "mask_sparse", "mask_everything", "mask_nothing", lies=False),
        "block_size": block,
        **draw_options(of, of_kernel["options"], (batch, heads, n, m), groups),
    }


def _draw_sparse_gradients(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    arguments, of = _draw_sparse(draw, of_kernel), Drawing(draw)
    q = arguments["q"]
    return arguments | {"dout": of.array((*q.shape[:3], of_kernel["head_dim_v"]), q.dtype, *_TAME)}


_OF_SPARSE = ("q", "k", "v", "blocks", "block_size", "dout")


def _block_mask(problem: Problem) -> tuple[BlockMask, dict[str, Any]]:
    """Return the mask, and the options of dense attention that see the same keys."""
    n, m = problem["q"].shape[1], problem["k"].shape[1]
    mask = BlockMask.from_blocks(problem["blocks"], n, m, problem["block_size"])
    visible = reference.expand_blocks(problem["blocks"], n, m, problem["block_size"])
    options = problem.given(*(name for name in problem.arguments if name not in _OF_SPARSE))
    given = options.get("mask")
    return mask, {**options, "mask": visible if given is None else visible & np.asarray(given)}


def _call_sparse(problem: Problem) -> Results:
    mask, _ = _block_mask(problem)
    arrays = [problem.there(name) for name in "qkv"]
    options = problem.given_there(*(name for name in problem.arguments if name not in _OF_SPARSE))
    out, lse = cuattn.block_sparse_attention(*arrays, mask, return_lse=True, **options)
    found = problem.numpy(out=out, lse=lse)
    if "dout" in problem:
        grads = cuattn.block_sparse_attention_backward(problem.there("dout"), *arrays, out, lse, mask, **options)
        of_inputs = problem.numpy(**grads._asdict())
        problem.saved["grads"] = type(grads)(*(of_inputs.get(name) for name in grads._fields))
        found |= of_inputs
    return found


def _check_sparse(problem: Problem, results: Results) -> None:
    _, options = _block_mask(problem)
    arrays = [problem[name] for name in "qkv"]
    if "dout" in problem:
        saved = results["out"], results["lse"]
        assert_gradients_close(problem.saved["grads"], problem["dout"], *arrays, *saved, **options)
    else:
        assert_attention_close(results["out"], *arrays, lse=results["lse"], **options)


# --- strided ---------------------------------------------------------------------------------------------------------

_STRIDED = ("scale", "softcap", "precision")


def _draw_strided(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of = Drawing(draw)
    batch, (heads, groups) = of.one(1, 2), of.one(*HEADS)
    n, m = of.length(100), of.length(100)
    pattern = {
        "stride": of.one(1, 2, 3, 8, 16, 63, 2**31 - 1),
        "local": of.one(None, 0, 1, 7, 33, 500),
        "causal": of.one(True, False, "top_left"),
    }
    options = draw_options(of, of_kernel["options"], (batch, heads, n, m), groups)
    return {**_qkv(of, of_kernel, (batch, n, m), (heads, groups, groups), *_TAME), "pattern": pattern, **options}


def _call_strided(problem: Problem) -> Results:
    arrays = [problem.there(name) for name in "qkv"]
    options = problem.given(*_STRIDED)
    out, lse = cuattn.strided_attention(*arrays, **problem["pattern"], return_lse=True, **options)
    return problem.numpy(out=out, lse=lse)


def _check_strided(problem: Problem, results: Results) -> None:
    q, k, v = (problem[name] for name in "qkv")
    mask = reference.strided_visible(q.shape[1], k.shape[1], **problem["pattern"])
    assert_attention_close(results["out"], q, k, v, lse=results["lse"], mask=mask, **problem.given(*_STRIDED))


# --- differential ----------------------------------------------------------------------------------------------------

_DIFFERENTIAL = (*names_on("differential"), "shared", "norm")


def _draw_differential(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of, names = Drawing(draw), of_kernel["options"]
    batch, (heads, groups) = of.one(1, 2), of.one(*HEADS)
    n, m = of.length(100, empty=False), of.length(100, empty=False)
    streams = groups if "shared" in names else 2 * groups
    arguments = _qkv(of, of_kernel, (batch, n, m), (2 * heads, streams, groups), *_TAME)
    arguments["lambda_"] = of.array(of.one((), (heads,), (batch, n, heads)), "float32", "unit", lies=False)
    of_attention = [name for name in names if name not in ("shared", "norm")]
    arguments |= draw_options(of, of_attention, (batch, of.one(heads, 2 * heads), n, m), groups)
    if "norm" in names:
        arguments |= {"norm": True, "output_scale": of.one(1.0, 0.2), "eps": of.one(1e-5, 1e-3)}
        if of.one(False, True):
            arguments["norm_weight"] = of.array((of_kernel["head_dim_v"],), "float32", "normal", lies=False)
    return arguments


def _draw_differential_gradients(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    arguments, of = _draw_differential(draw, of_kernel), Drawing(draw)
    batch, n, heads, _ = arguments["q"].shape
    dout = of.array((batch, n, heads // 2, of_kernel["head_dim_v"]), arguments["q"].dtype, "normal", "constant_rows")
    return arguments | {"dout": dout}


def _call_differential(problem: Problem) -> Results:
    arrays = [problem.there(name) for name in ("q", "k", "v", "lambda_")]
    names = [name for name in problem.arguments if name not in ("q", "k", "v", "lambda_", "dout")]
    options = problem.given_there(*names)
    out, state = cuattn.differential_attention(*arrays, return_state=True, **options)
    saved = problem.numpy(**state._asdict())
    problem.saved["state"] = type(state)(**saved)
    found = {**problem.numpy(out=out), **saved}
    if "dout" in problem:
        grads = cuattn.differential_attention_backward(problem.there("dout"), *arrays, state, **options)
        of_inputs = problem.numpy(**grads._asdict())
        problem.saved["grads"] = type(grads)(*(of_inputs.get(name) for name in grads._fields))
        found |= of_inputs
    return found


def _check_differential(problem: Problem, results: Results) -> None:
    arrays = [problem[name] for name in ("q", "k", "v", "lambda_")]
    names = [name for name in problem.arguments if name not in ("q", "k", "v", "lambda_", "dout")]
    options, state = problem.given(*names), problem.saved["state"]
    if "dout" in problem:
        grads = problem.saved["grads"]
        assert_differential_gradients_close(grads, problem["dout"], *arrays, state, **options)
    else:
        assert_differential_close(results["out"], *arrays, state=state, **options)


# --- dual chunk ------------------------------------------------------------------------------------------------------

_DUAL_CHUNK = ("scale", "softcap", "keys_rotated", "logit_factor")


def _draw_dual_chunk(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of, names = Drawing(draw), of_kernel["options"]
    batch, (heads, groups) = of.one(1, 2), of.one(*HEADS)
    n, m = of.length(130, empty=False), of.length(200, empty=False)
    if n > m:
        n, m = m, n
    chunk, local = of.one((8, 7), (2, 1), (20, 3), (45, 8), (72, 8), (64, 1), (90, 70))
    head_dim = of_kernel["head_dim"]
    arguments = _qkv(of, of_kernel, (batch, n, m), (heads, groups, groups), *_TAME)
    arguments |= {"chunk_size": chunk, "local_size": local}
    turned = of.one(*dict.fromkeys((head_dim // 2 * 2, 2, min(16, head_dim // 2 * 2))))
    arguments["rope"] = {"base": of.one(1e4, 100.0), "rotary_dim": min(turned, head_dim // 2 * 2)}
    if "scale" in names:
        arguments["scale"] = of.one(0.3, -0.1)
    if "softcap" in names:
        arguments["softcap"] = of.one(2.0, 15.0)
    if "keys_rotated" in names:
        arguments["keys_rotated"] = True
    if "logit_factor" in names:
        arguments["logit_factor"] = of.one(1.3, (1.0, 1.7)[:batch])
    return arguments


def _draw_dual_chunk_gradients(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    arguments, of = _draw_dual_chunk(draw, of_kernel), Drawing(draw)
    q = arguments["q"]
    return arguments | {"dout": of.array((*q.shape[:3], of_kernel["head_dim_v"]), q.dtype, "normal")}


def _of_dual_chunk(problem: Problem) -> dict[str, Any]:
    options = problem.given("chunk_size", "local_size", *_DUAL_CHUNK)
    if isinstance(options.get("logit_factor"), tuple):
        options["logit_factor"] = list(options["logit_factor"])
    return options | {"rope": cuattn.Rotary(**problem["rope"])}


def _call_dual_chunk(problem: Problem) -> Results:
    arrays, options = [problem.there(name) for name in "qkv"], _of_dual_chunk(problem)
    out, lse = cuattn.dual_chunk_attention(*arrays, return_lse=True, **options)
    found = problem.numpy(out=out, lse=lse)
    if "dout" in problem:
        grads = cuattn.dual_chunk_attention_backward(problem.there("dout"), *arrays, out, lse, **options)
        found |= problem.numpy(**grads._asdict())
    return found


def _check_dual_chunk(problem: Problem, results: Results) -> None:
    arrays, options = [problem[name] for name in "qkv"], _of_dual_chunk(problem)
    if "dout" in problem:
        grads = [results[name] for name in ("dq", "dk", "dv")]
        assert_dual_chunk_gradients_close(grads, problem["dout"], *arrays, **options)
    else:
        assert_dual_chunk_close(results["out"], *arrays, lse=results["lse"], **options)


def _even(drawn: Any) -> Any:
    """Return what draws skeletons with a head dim of 2 or more."""

    def more(rng: random.Random) -> Skeleton:
        of_kernel: Skeleton = drawn(rng)
        return of_kernel | {"head_dim": max(2, of_kernel["head_dim"])}

    return more


OPERATIONS = (
    Operation(
        "block_sparse_attention",
        ("block_sparse_attention",),
        _SPARSE,
        skeleton(_SPARSE, most=128),
        _draw_sparse,
        _call_sparse,
        _check_sparse,
    ),
    Operation(
        "block_sparse_attention_backward",
        ("block_sparse_attention_backward",),
        _SPARSE,
        skeleton(_SPARSE, most=128),
        _draw_sparse_gradients,
        _call_sparse,
        _check_sparse,
    ),
    Operation(
        "strided_attention",
        ("strided_attention",),
        _STRIDED,
        skeleton(_STRIDED),
        _draw_strided,
        _call_strided,
        _check_strided,
    ),
    Operation(
        "differential_attention",
        ("differential_attention",),
        _DIFFERENTIAL,
        skeleton(_DIFFERENTIAL),
        _draw_differential,
        _call_differential,
        _check_differential,
    ),
    Operation(
        "differential_attention_backward",
        ("differential_attention_backward",),
        _DIFFERENTIAL,
        skeleton(_DIFFERENTIAL, most=128),
        _draw_differential_gradients,
        _call_differential,
        _check_differential,
    ),
    Operation(
        "dual_chunk_attention",
        ("dual_chunk_attention",),
        _DUAL_CHUNK,
        _even(skeleton(_DUAL_CHUNK)),
        _draw_dual_chunk,
        _call_dual_chunk,
        _check_dual_chunk,
    ),
    Operation(
        "dual_chunk_attention_backward",
        ("dual_chunk_attention_backward",),
        _DUAL_CHUNK,
        _even(skeleton(_DUAL_CHUNK, most=128)),
        _draw_dual_chunk_gradients,
        _call_dual_chunk,
        _check_dual_chunk,
    ),
)
