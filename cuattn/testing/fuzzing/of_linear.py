"""Linear attention and its gradients as the fuzzer draws them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import cuattn
from cuattn.testing.fuzzing.arrays import Array
from cuattn.testing.fuzzing.of_attention import skeleton
from cuattn.testing.fuzzing.operation import Drawing, Operation, Problem, Results, Skeleton
from cuattn.testing.linear_gradients import assert_linear_gradients_close
from cuattn.testing.linear_tolerance import assert_linear_close, assert_linear_varlen_close
from cuattn.testing.strategies import sequence_lengths

__all__ = ["OPERATIONS"]

_OPTIONS = ("unnormalized", "decay", "initial_state", "scale", "eps", "not_causal", "chunk")
_MAPS = ("elu1", "relu", "square", None)
#: (heads of q, k, v): as many; grouped; multi-query; more values than keys, more keys; fewer queries than states.
_HEADS = ((1, 1, 1), (2, 2, 2), (6, 2, 2), (5, 1, 1), (2, 2, 6), (12, 4, 1), (1, 3, 1))


def _skeleton(rng: random.Random) -> Skeleton:
    of_attention: Skeleton = skeleton(_OPTIONS, most=192)(rng)
    return of_attention | {"feature_map": rng.choice(_MAPS)}


def _draw(draw: Any, of_kernel: Skeleton, *, packed: bool = False, gradients: bool = False) -> dict[str, Any]:
    of, names, dtype = Drawing(draw), of_kernel["options"], of_kernel["dtype"]
    heads = of.one(*_HEADS)
    arguments: dict[str, Any] = {}
    leading_q: tuple[int, ...]
    leading_k: tuple[int, ...]
    if packed:
        lengths = [n for n, _ in of.draw(sequence_lengths(100))]
        arguments["cu_seqlens"] = tuple(int(n) for n in np.concatenate([[0], np.cumsum(lengths)]))
        batch, causal = len(lengths), True
        leading_q = leading_k = (sum(lengths),)
    else:
        batch, causal = of.one(1, 2), "not_causal" not in names
        n = of.length(150, empty=not gradients)
        m = n if causal else of.length(150, empty=not gradients)
        leading_q, leading_k = (batch, n), (batch, m)
    d, e, aligned = of_kernel["head_dim"], of_kernel["head_dim_v"], of_kernel["aligned"]
    kinds = ("normal", "constant_rows")
    for name, leading, h, dim in zip("qkv", (leading_q, leading_k, leading_k), heads, (d, d, e), strict=True):
        own = aligned if name == "q" else aligned or None
        arguments[name] = of.array((*leading, h, dim), dtype, *kinds, aligned=own)
    states, real = max(heads[1:]), "float64" if dtype == "float64" else "float32"
    normalize = "unnormalized" not in names
    # Without a map that is positive, a denominator may be anything: divided by, rounding has no bound.
    normalize &= of_kernel["feature_map"] is not None
    if of_kernel["feature_map"] != "elu1":
        arguments["feature_map"] = of_kernel["feature_map"]
    if not normalize:
        arguments["normalize"] = False
    if not causal:
        arguments["causal"] = False
    elif "decay" in names:
        shape = of.one((states,), (*leading_k, states), (*leading_k, states, d))
        arguments["decay"] = of.array(shape, "float32", "decay", "decay_strong", "decay_resets", lies=False)
    if "initial_state" in names:
        arguments |= _state(of, "state", (batch, states, d), e, real, normalize)
    if "scale" in names:
        arguments["scale"] = of.one(0.25, 2.0)
    if "eps" in names and normalize:
        arguments["eps"] = of.one(1e-6, 0.5)
    if "chunk" in names:
        arguments["chunk"] = of.one(16, 32, 64, 128)
    return arguments


def _state(of: Drawing, name: str, shape: tuple[int, ...], e: int, real: str, normalize: bool) -> dict[str, Array]:
    found = {f"{name}_s": of.array((*shape, e), real, "normal", lies=False)}
    if normalize:
        found[f"{name}_z"] = of.array(shape, real, "positive", lies=False)
    return found


def _draw_dense(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    return _draw(draw, of_kernel)


def _draw_packed(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    return _draw(draw, of_kernel, packed=True)


def _draw_gradients(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    arguments, of = _draw(draw, of_kernel, gradients=True), Drawing(draw)
    q, k, v = (arguments[name] for name in "qkv")
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    arguments["dout"] = of.array((*q.shape[:2], heads, v.shape[3]), q.dtype, "normal", "constant_rows")
    return arguments


_PLAIN = ("feature_map", "normalize", "eps", "scale", "causal", "chunk")


def _options(problem: Problem, *, there: bool) -> dict[str, Any]:
    given = problem.given_there if there else problem.given
    options = given(*_PLAIN, "decay")
    if "state_s" in problem:
        parts = given("state_s", "state_z")
        options["initial_state"] = cuattn.LinearState(parts["state_s"], parts.get("state_z"))
    return options


def _call(problem: Problem) -> Results:
    arrays, options = [problem.there(name) for name in "qkv"], _options(problem, there=True)
    if "dout" in problem:
        grads = cuattn.linear_attention_backward(problem.there("dout"), *arrays, **options)
        state = grads.dinitial_state
        found = {name: x for name, x in grads._asdict().items() if name not in ("dinitial_state", "dbeta")}
        results = problem.numpy(**found)
        parts: Any = None
        if state is not None:
            of_state = problem.numpy(ds=state.s, dz=state.z)
            results |= of_state
            parts = cuattn.LinearState(of_state["ds"], of_state.get("dz"))
        named = {name: results.get(name) for name in found}
        problem.saved["grads"] = grads._replace(**named, dinitial_state=parts)
        return results
    if "cu_seqlens" in problem:
        starts = np.asarray(problem["cu_seqlens"], np.int32)
        out, state = cuattn.linear_attention_varlen(*arrays, starts, return_state=True, **options)
    else:
        out, state = cuattn.linear_attention(*arrays, return_state=True, **options)
    return problem.numpy(out=out, s=state.s, z=state.z)


def _check(problem: Problem, results: Results) -> None:
    arrays, options = [problem[name] for name in "qkv"], _options(problem, there=False)
    options.pop("chunk", None)
    if "dout" in problem:
        assert_linear_gradients_close(problem.saved["grads"], problem["dout"], *arrays, **options)
        return
    state = cuattn.LinearState(results["s"], results.get("z"))
    if "cu_seqlens" in problem:
        assert_linear_varlen_close(results["out"], state, *arrays, problem["cu_seqlens"], **options)
    else:
        assert_linear_close(results["out"], state, *arrays, **options)


OPERATIONS = tuple(
    Operation(name, (name,), _OPTIONS, _skeleton, drawn, _call, _check)
    for name, drawn in (
        ("linear_attention", _draw_dense),
        ("linear_attention_varlen", _draw_packed),
        ("linear_attention_backward", _draw_gradients),
    )
)
