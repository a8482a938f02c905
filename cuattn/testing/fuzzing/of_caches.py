"""Attention to cached keys, and what writes them, as the fuzzer draws both."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cuattn
from cuattn import reference
from cuattn.formats import KV_FORMATS, numpy_dtype
from cuattn.testing.arrays import Guarded, Layout, allocate
from cuattn.testing.decode_problems import GARBAGE, SCALE_KINDS, CachedProblem, cached_problem
from cuattn.testing.decode_strategies import AWKWARD_LENGTHS, GROUPS, PAGE_SIZES
from cuattn.testing.decode_tolerance import assert_decode_close, assert_paged_close, assert_paged_varlen_close
from cuattn.testing.executors import ExecutorUnderTest
from cuattn.testing.fuzzing.arrays import ELEMENT_KINDS, dtype_of, values
from cuattn.testing.fuzzing.of_attention import draw_options, head_dims
from cuattn.testing.fuzzing.operation import Drawing, Operation, Problem, Results, Skeleton
from cuattn.testing.option_strategies import names_on
from cuattn.testing.strategies import layouts
from cuattn.testing.tolerance import ToleranceError

__all__ = ["OPERATIONS"]

_QUANTIZED = tuple(name for name, row in KV_FORMATS.items() if row.quantized)
_OPTIONS = (*names_on("decode"), "num_splits", "rope")
_CHECKS = {"decode": assert_decode_close, "paged": assert_paged_close, "varlen": assert_paged_varlen_close}


def _skeleton(rng: random.Random) -> Skeleton:
    dtype = rng.choice(("float16", "bfloat16", "float32", "float64"))
    aligned = rng.random() < 0.5
    head_dim, head_dim_v = head_dims(rng, most=192)
    kv_format = rng.choice(_QUANTIZED) if dtype != "float64" and rng.random() < 0.5 else None
    step = 8 if aligned else 2 if kv_format in ("nvfp4", "mxfp4") else 1
    options = [name for name in names_on("decode") if rng.random() < 0.3]
    options += [name for name in ("num_splits", "rope") if rng.random() < 0.4]
    return {
        "dtype": dtype,
        "head_dim": -(-head_dim // step) * step,
        "head_dim_v": -(-head_dim_v // step) * step,
        "aligned": aligned,
        "kv_format": kv_format,
        "options": options,
    }


def _layout(of: Drawing, ndim: int, aligned: bool) -> tuple[Any, ...]:
    if aligned:
        return (None, (), 0)
    layout = of.draw(layouts(ndim))
    return layout.order, layout.pad, layout.offset


def _drawing(kind: str) -> Any:
    def drawn(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
        of, dtype = Drawing(draw), of_kernel["dtype"]
        lengths = tuple(of.one(*AWKWARD_LENGTHS) for _ in range(of.one(1, 2, 3, 5)))
        heads = of.one(*GROUPS)
        queries = tuple(of.one(1, 2, 0, 5, 17) for _ in lengths) if kind == "varlen" else of.one(1, 2, 5, 9, 0, 17)
        named = {
            "dtype": dtype,
            "lengths": lengths,
            "seqlens_q": queries,
            "heads": heads,
            "head_dims": (of_kernel["head_dim"], of_kernel["head_dim_v"]),
            "kv_format": of_kernel["kv_format"],
            "scales": of.one(*SCALE_KINDS),
            "page_size": None if kind == "decode" else of.one(*PAGE_SIZES),
            "layouts": tuple(
                _layout(of, 3 if kind == "varlen" and i == 0 else 4, of_kernel["aligned"]) for i in range(3)
            ),
            "room": of.one(1, 0, 40),
            "kind": of.one(*ELEMENT_KINDS),
            "seed": of.seed(),
        }
        names = [name for name in of_kernel["options"] if name not in ("rope", "causal")]
        shape = len(lengths), heads[0], 0, max(lengths)
        options = draw_options(of, names, shape, heads[1])
        if "causal" in of_kernel["options"]:
            options["causal"] = of.one(False, "bottom_right", "top_left")
        if "rope" in of_kernel["options"]:
            turned = of.one(*{min(n, of_kernel["head_dim"]) // 2 * 2 for n in (2, 16, of_kernel["head_dim"])})
            if turned:
                base, interleaved = of.one(1e4, 100.0), of.one(False, True)
                options["rope"] = {"base": base, "interleaved": interleaved, "rotary_dim": turned}
                options["rotate_keys"] = of.one(False, True)
        return named | options

    return drawn


_OF_PROBLEM = (
    *("dtype", "lengths", "seqlens_q", "heads", "head_dims", "kv_format", "scales", "page_size", "layouts", "room"),
    *("kind", "seed"),
)


def _made(problem: Problem) -> CachedProblem:
    """Make the cache that a case says, with poison wherever no key is."""
    named = {name: problem[name] for name in _OF_PROBLEM}
    kind, seed = named.pop("kind"), named.pop("seed")
    rng = np.random.default_rng(seed)
    given = [Layout(*layout) for layout in named.pop("layouts")]
    options = problem.given(*(name for name in problem.arguments if name not in _OF_PROBLEM))
    if "rope" in options:
        options["rope"] = cuattn.Rotary(**options["rope"])
    queries = named.pop("seqlens_q")

    def fill(shape: Any, dtype: Any, of: np.random.Generator) -> NDArray[Any]:
        return values(tuple(shape), np.dtype(dtype).name, kind, int(of.integers(2**31)))

    return cached_problem(
        rng,
        seqlens_q=queries if isinstance(queries, int) else list(queries),
        dtype=dtype_of(named.pop("dtype")),
        layouts=given,
        fill=fill,
        **named,
        **options,
    )


def _on(executor: ExecutorUnderTest, cached: CachedProblem) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments and options with the cache and its scales where the executor computes, narrow ones as bytes."""
    heads = [cached.q, cached.k, cached.v]
    options = dict(cached.options)
    if executor.name != "host":
        heads = [_as_bytes(x) for x in heads]
    for name in ("k_scale", "v_scale", "k_block_scales", "v_block_scales"):
        x: Any = options.get(name, 0)
        if np.ndim(x) >= 3:
            options[name] = executor.array(x if executor.name == "host" or x.itemsize > 1 else x.view(np.uint8))
    return [*map(executor.array, heads), *cached.arrays[3:]], options


def _as_bytes(guarded: Guarded) -> Guarded:
    if guarded.array.dtype.itemsize > 1 or guarded.array.dtype.kind in "iu":
        return guarded
    return Guarded(guarded.root, guarded.array.view(np.uint8), guarded.byte_offset)


def _call(problem: Problem) -> Results:
    cached = problem.saved.setdefault("cached", _made(problem))
    arrays, options = _on(problem.executor, cached)
    functions: dict[str, Any] = {
        "decode": cuattn.decode_attention,
        "paged": cuattn.paged_attention,
        "varlen": cuattn.paged_attention_varlen,
    }
    out, lse = functions[cached.kind](*arrays, return_lse=True, **options)
    return problem.numpy(out=out, lse=lse)


def _check(problem: Problem, results: Results) -> None:
    cached = problem.saved["cached"]
    check: Any = _CHECKS[cached.kind]
    check(results["out"], *cached.arrays, lse=results["lse"], **cached.options)


# --- append_kv -------------------------------------------------------------------------------------------------------


def _append_skeleton(rng: random.Random) -> Skeleton:
    return {**_skeleton(rng), "options": []}


def _draw_append(draw: Any, of_kernel: Skeleton) -> dict[str, Any]:
    of, row = Drawing(draw), KV_FORMATS[of_kernel["kv_format"] or of_kernel["dtype"]]
    tokens, heads = of.length(40), of.one(1, 2, 3)
    pages, page_size = of.one(1, 3, 7), of.one(16, 1, 3)
    arrays = {
        name: of.array((tokens, heads, of_kernel[dim]), of_kernel["dtype"], "normal", "wide", "denormal")
        for name, dim in (("k", "head_dim"), ("v", "head_dim_v"))
    }
    # Slots of pages that exist, each once, with such among them as are no slots.
    rng = np.random.default_rng(of.seed())
    slots = rng.permutation(pages * page_size + tokens)[:tokens]
    slots = np.where(slots < pages * page_size, slots, rng.choice(GARBAGE[:1], tokens))
    layout = [_layout(of, 4, of_kernel["aligned"]) for _ in "kv"]
    named: dict[str, Any] = {"pages": (pages, page_size), "slots": tuple(slots.tolist()), "layouts": tuple(layout)}
    if row.quantized and not row.block_size:
        named["scale"] = of.one(0.05, "slot")
    return {**arrays, **named, "kv_format": row.name}


def _written(problem: Problem) -> dict[str, Guarded]:
    """Return pages and scales full of poison."""
    row, heads = KV_FORMATS[problem["kv_format"]], problem["k"].shape[1]
    found = {}
    for side, layout in zip("kv", problem["layouts"], strict=True):
        shape = (*problem["pages"], heads)
        head_dim = problem[side].shape[2]
        code = numpy_dtype(row.dtypes[0])
        found[f"{side}_pages"] = allocate((*shape, row.items(head_dim)), code, Layout(*layout))
        if problem.arguments.get("scale") == "slot":
            found[f"{side}_scale"] = allocate(shape, np.float32)
        if row.block_size:
            found[f"{side}_block_scales"] = allocate((*shape, row.blocks(head_dim)), np.uint8)
    return found


def _call_append(problem: Problem) -> Results:
    moved = {}
    for name, guarded in _written(problem).items():
        narrow = problem.executor.name != "host" and guarded.array.dtype.name.startswith("float8")
        moved[name] = (_as_bytes(guarded) if narrow else guarded).to(problem.executor.xp)
    arrays = {name: guarded.array for name, guarded in moved.items()}
    pages = [arrays.pop(f"{side}_pages") for side in "kv"]
    slots = np.asarray(problem["slots"], np.int64)
    if isinstance(problem.arguments.get("scale"), float):
        arrays |= {"k_scale": problem["scale"], "v_scale": problem["scale"]}
    cuattn.append_kv(problem.there("k"), problem.there("v"), *pages, slots, kv_format=problem["kv_format"], **arrays)
    for guarded in moved.values():
        guarded.check()
    return problem.numpy(**{name: guarded.array for name, guarded in moved.items()})


def _check_append(problem: Problem, results: Results) -> None:
    """Assert that every byte is that of the reference, those of slots that were not written included."""
    row, slots = KV_FORMATS[problem["kv_format"]], np.asarray(problem["slots"], np.int64)
    there = slots >= 0
    page, slot = np.divmod(slots[there], problem["pages"][1])
    scale = problem.arguments.get("scale")
    for side in "kv":
        wanted = {f"{side}_{name}": None for name in ("pages", "scale", "block_scales")}
        parts: Any = (problem[side], None, None)
        if row.quantized:
            number = scale if isinstance(scale, float) else None
            parts = reference.quantize(problem[side], row.name, scale=number, per_slot=scale == "slot")
        for name, new in zip(wanted, parts, strict=True):
            if name not in results:
                continue
            expected = np.full(results[name].shape, 0xFF, np.uint8) if results[name].dtype.itemsize == 1 else None
            target = _poisoned(results[name]) if expected is None else expected.view(results[name].dtype)
            target[page, slot] = np.asarray(new)[there].view(target.dtype)
            got, want = (np.ascontiguousarray(x).view(np.uint8) for x in (results[name], target))
            if not np.array_equal(got, want):
                raise ToleranceError(f"{name}: {int((got != want).sum())} bytes are not those of the reference")


def _poisoned(like: NDArray[Any]) -> NDArray[Any]:
    return np.full((*like.shape, like.dtype.itemsize), 0xFF, np.uint8).view(like.dtype)[..., 0]


OPERATIONS = (
    *(
        Operation(name, (name,), _OPTIONS, _skeleton, _drawing(kind), _call, _check)
        for name, kind in (
            ("decode_attention", "decode"),
            ("paged_attention", "paged"),
            ("paged_attention_varlen", "varlen"),
        )
    ),
    Operation("append_kv", ("append_kv",), (), _append_skeleton, _draw_append, _call_append, _check_append),
)
