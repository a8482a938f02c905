"""Calls of append_kv on problems of NumPy arrays, and what the pages must hold afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import cuattn
from cuattn import reference
from cuattn.formats import KV_FORMATS, KVFormat, numpy_dtype
from cuattn.testing import kernels
from cuattn.testing.arrays import Guarded, Layout, allocate, place


@dataclass
class Problem:
    """New keys and values, guarded pages and scales full of poison, and the slots; all NumPy arrays."""

    k: Guarded
    v: Guarded
    slots: np.ndarray
    row: KVFormat
    written: dict[str, Guarded]  # k_pages, v_pages, and scales that the kernel makes
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Problem({self.row.name}, {self.k}, {self.v}, {self.written}, {self.slots}, {sorted(self.options)})"


def make(
    name: str,
    new: tuple[np.ndarray, np.ndarray],
    slots: Any,
    num_pages: int,
    page_size: int,
    *,
    per_slot: bool = False,
    layouts: Any = lambda ndim: Layout(),
    **options: Any,
) -> Problem:
    """`layouts` gives the layout of the next array of that rank."""
    row = KV_FORMATS[name]
    k, v = (place(x, layouts(3)) for x in new)
    written = {}
    for side, x in zip("kv", new, strict=True):
        shape = (num_pages, page_size, x.shape[1])
        written[f"{side}_pages"] = allocate((*shape, row.items(x.shape[2])), numpy_dtype(row.dtypes[0]), layouts(4))
        if per_slot:
            written[f"{side}_scale"] = allocate(shape, np.float32, layouts(3))
        if row.block_size:
            written[f"{side}_block_scales"] = allocate((*shape, row.blocks(x.shape[2])), np.uint8, layouts(4))
    return Problem(k, v, np.asarray(slots, np.int64), row, written, {"kv_format": name, **options})


def run(executor: Any, problem: Problem, *, look: bool = True, **more: Any) -> dict[str, np.ndarray]:
    """Append, check the guard bands, and return everything that may have been written."""
    moved = {}
    for name, guarded in problem.written.items():
        array = guarded.array
        if executor.name != "host" and array.dtype.name.startswith("float8"):
            array = array.view(np.uint8)  # CuPy has no narrow dtypes
        moved[name] = Guarded(guarded.root, array, guarded.byte_offset).to(executor.xp)
    arrays = {name: guarded.array for name, guarded in moved.items()}
    pages = [arrays.pop(f"{side}_pages") for side in "kv"]
    kernels.append_kv(
        *(executor.array(problem.k), executor.array(problem.v), *pages, problem.slots),
        look=look,
        **{**problem.options, **arrays, **more},
    )
    for guarded in moved.values():
        guarded.check()
    return {name: executor.numpy(guarded.array) for name, guarded in moved.items()}


def expected(problem: Problem, k: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What `run` must return, from the reference; `k` instead of the problem's, where a rotation went before."""
    arrays = {name: guarded.array.copy() for name, guarded in problem.written.items()}
    num_slots = np.prod(problem.written["k_pages"].array.shape[:2])
    there = (problem.slots >= 0) & (problem.slots < num_slots)
    for side, new in zip("kv", (problem.k.array if k is None else k, problem.v.array), strict=True):
        name = f"{side}_scale"
        if problem.row.quantized:
            parts = reference.quantize(
                new, problem.row.name, scale=problem.options.get(name), per_slot=name in problem.written
            )
        else:
            parts = reference.Quantized(new, None, None)
        for key, values in zip((f"{side}_pages", name, f"{side}_block_scales"), parts, strict=True):
            if values is not None and values.ndim:
                target = arrays[key]
                pages, slots = np.divmod(problem.slots[there], target.shape[1])
                target[pages, slots] = values[there].view(target.dtype)
    return arrays


def assert_same_bits(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Every byte, those of slots that were not listed included; one NaN is as good as another."""
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        values, others = np.ascontiguousarray(x), np.ascontiguousarray(wanted[name])
        different = values.view(np.uint8) != others.view(np.uint8)
        different = different.reshape(*values.shape, values.dtype.itemsize).any(axis=-1)
        if values.dtype.kind not in "iu":
            different &= ~(np.isnan(values) & np.isnan(others.view(values.dtype)))
        where = np.argwhere(different)
        assert not len(where), f"{name}: {len(where)} numbers differ, first at {where[0]}"


def assert_right(executor: Any, problem: Problem, **more: Any) -> dict[str, np.ndarray]:
    """The call writes what the reference says and nothing else; keys turned as `cuattn.rope` turns them."""
    k = None
    if problem.options.get("rope") is not None:
        rope = problem.options["rope"]
        words = {name: getattr(rope, name) for name in ("base", "interleaved", "rotary_dim", "cos", "sin")}
        k = executor.numpy(cuattn.rope(executor.array(problem.k), problem.options["positions"], **words))
    found = run(executor, problem, **more)
    assert_same_bits(found, expected(problem, k))
    return found
