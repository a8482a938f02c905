"""What `append_kv` accepts: every check that is made before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds, on_elements, overlaps_itself, share_elements
from cuattn.dtypes import DTYPES
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OverlapError, ShapeError
from cuattn.formats import KVFormat, resolve
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.kv.scales import Scale, check_block_scales, check_scale
from cuattn.ops.decode.scales import is_per_slot
from cuattn.ops.operand import operand
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.ops.rotary.arguments import MAX_EXTENT, Angles, Positions, Rotary
from cuattn.runtime.executor import Executor, executor_for

__all__ = ["AppendProblem", "Side", "check", "check_apart"]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Keys or values: what is appended, the pages, and their scales."""

    new: Any  # [tokens, kv_heads, head_dim], last axis contiguous
    pages: Any  # [num_pages, page_size, kv_heads, items]
    head_dim: int
    scale: Scale
    blocks: Any  # [num_pages, page_size, kv_heads, blocks], or None


@dataclass(frozen=True, slots=True, eq=False)
class AppendProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    dtype: np.dtype[Any]  # of what is appended
    kv_format: KVFormat
    k: Side
    v: Side
    slots: Any  # int32 or int64 [tokens]
    angles: Angles | None
    positions: Positions | None


def check(
    k: Any,
    v: Any,
    k_pages: Any,
    v_pages: Any,
    slot_mapping: Any,
    *,
    positions: Any = None,
    rope: Any = None,
    kv_format: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
    look: bool = True,
) -> AppendProblem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.append_kv`."""
    _check_kinds(rope, positions)
    arrays = {"k": k, "v": v, "k_pages": k_pages, "v_pages": v_pages} | ({} if rope is None else rope.arrays)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    arrays |= {name: x for name, x in scales.items() if is_per_slot(x)}
    blocks = {"k_block_scales": k_block_scales, "v_block_scales": v_block_scales}
    arrays |= {name: x for name, x in blocks.items() if x is not None}
    lists = {"slot_mapping": slot_mapping, "positions": positions}
    arrays |= {name: x for name, x in lists.items() if x is not None and rotary_arguments.on_device(name, x)}
    executor = executor_for(**arrays)

    k, v, k_pages, v_pages = (executor.asarray(name, arrays[name]) for name in ("k", "v", "k_pages", "v_pages"))
    row = _check_formats(k, v, k_pages, v_pages, kv_format)
    _check_shapes(k, v, k_pages, v_pages, row)
    slots, seen = rotary_arguments.integers(executor, "slot_mapping", slot_mapping)
    _check_slots(slots, seen if look else None, k.shape[0], k_pages.shape[0] * k_pages.shape[1])
    sides = []
    for name, new, pages in (("k", k, k_pages), ("v", v, v_pages)):
        shape = tuple(pages.shape[:3])
        scale = check_scale(executor, f"{name}_scale", scales[f"{name}_scale"], shape, row)
        own = check_block_scales(
            executor, f"{name}_block_scales", blocks[f"{name}_block_scales"], shape, int(new.shape[2]), row
        )
        sides.append(Side(operand(executor, new).array, pages, int(new.shape[2]), scale, own))
    angles = places = None
    if rope is not None:
        angles = rotary_arguments.resolve(executor, rope, sides[0].head_dim, k.dtype)
        places = rotary_arguments.check_positions(executor, positions, (int(k.shape[0]),), angles, look=look)
    problem = AppendProblem(executor, k.dtype, row, sides[0], sides[1], slots, angles, places)
    _check_memory(problem, k, v)
    return problem


def _check_kinds(rope: Any, positions: Any) -> None:
    if rope is not None and not isinstance(rope, Rotary):
        raise ArrayTypeError(f"rope is a {type(rope).__name__}; a cuattn.Rotary or None is needed")
    if rope is None and positions is not None:
        raise ArgumentError("positions is given without rope, and only that uses it")
    if rope is not None and positions is None:
        raise ArgumentError("rope is given without positions; the position of every token is needed")


def _check_formats(k: Any, v: Any, k_pages: Any, v_pages: Any, kv_format: Any) -> KVFormat:
    for name, x in (("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise DTypeError(
                f"{name} has dtype {x.dtype} ({x.dtype.str}); float16, bfloat16, float32, float64 are allowed"
            )
    if v.dtype != k.dtype:
        raise DTypeError(f"v has dtype {v.dtype} and k has dtype {k.dtype}; they must be the same")
    row = resolve("k_pages", k_pages.dtype, kv_format)
    of_values = resolve("v_pages", v_pages.dtype, kv_format)
    if of_values is not row:
        raise DTypeError(f"v_pages has dtype {v_pages.dtype} and k_pages {k_pages.dtype}; one format is needed")
    if not row.quantized and k.dtype.name != row.name:
        raise DTypeError(f"k has dtype {k.dtype} and k_pages {k_pages.dtype}; they must be the same")
    if row.quantized and k.dtype == np.float64:
        raise DTypeError(f"k has dtype float64; float16, bfloat16 or float32 can become {row.name}")
    return row


def _check_shapes(k: Any, v: Any, k_pages: Any, v_pages: Any, row: KVFormat) -> None:
    for name, x, axes in (
        ("k", k, "[tokens, kv_heads, head_dim]"),
        ("v", v, "[tokens, kv_heads, head_dim_v]"),
        ("k_pages", k_pages, "[num_pages, page_size, kv_heads, head_dim]"),
        ("v_pages", v_pages, "[num_pages, page_size, kv_heads, head_dim_v]"),
    ):
        if x.ndim != axes.count(",") + 1:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; {axes} is needed")
        if max(x.shape) > MAX_EXTENT:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; an extent may be at most {MAX_EXTENT}")
    for name, x in (("k", k), ("v", v)):
        head_dim = int(x.shape[2])
        if not 1 <= head_dim <= MAX_HEAD_DIM or head_dim % row.elements_per_item:
            allowed = f"1 to {MAX_HEAD_DIM}" if row.elements_per_item == 1 else f"even numbers from 2 to {MAX_HEAD_DIM}"
            raise ShapeError(f"{name} has head dim {head_dim}; allowed for {row.name} are {allowed}")
    if tuple(v.shape[:2]) != tuple(k.shape[:2]):
        raise ShapeError(f"v has shape {tuple(v.shape)} and k {tuple(k.shape)}; as many tokens and heads are needed")
    if tuple(v_pages.shape[:3]) != tuple(k_pages.shape[:3]):
        raise ShapeError(
            f"v_pages has shape {tuple(v_pages.shape)} and k_pages {tuple(k_pages.shape)}; as many pages, slots and "
            "heads are needed"
        )
    for name, x, pages in (("k", k, k_pages), ("v", v, v_pages)):
        needed = (int(k.shape[1]), row.items(int(x.shape[2])))
        if tuple(pages.shape[2:]) != needed:
            raise ShapeError(
                f"{name}_pages has shape {tuple(pages.shape)} and {name} {tuple(x.shape)}; [num_pages, page_size, "
                f"{needed[0]}, {needed[1]}] is needed for {row.name}"
            )
    if k_pages.shape[1] < 1:
        raise ShapeError(f"k_pages has shape {tuple(k_pages.shape)}; a page has at least one slot")


def _check_slots(slots: Any, seen: np.ndarray[Any, Any] | None, num_tokens: int, num_slots: int) -> None:
    if tuple(slots.shape) != (num_tokens,):
        raise ShapeError(f"slot_mapping has shape {tuple(slots.shape)}; [{num_tokens}] is needed, one slot a token")
    if seen is None or not seen.size:
        return
    last = int(seen.max())
    if last >= num_slots:
        raise ArgumentError(
            f"slot_mapping[{int(seen.argmax())}] is {last}; slots 0 to {num_slots - 1} exist (negative: skipped)"
        )
    used = np.sort(seen[seen >= 0])
    twice = used[1:][used[1:] == used[:-1]]
    if twice.size:
        raise ArgumentError(f"slot_mapping holds slot {int(twice[0])} twice; each token needs a slot of its own")


def _check_memory(problem: AppendProblem, k: Any, v: Any) -> None:
    """Raise unless everything that is written can be, and lies apart from everything else."""
    written = {"k_pages": problem.k.pages, "v_pages": problem.v.pages}
    read = {"k": k, "v": v, "slot_mapping": problem.slots}
    for name, side in (("k", problem.k), ("v", problem.v)):
        if side.scale.array is not None:
            (written if side.scale.per_slot else read)[f"{name}_scale"] = side.scale.array
        if side.blocks is not None:
            written[f"{name}_block_scales"] = side.blocks
    if problem.angles is not None and problem.positions is not None:
        read["positions"] = problem.positions.array
        read |= {name: x for name, x in (("cos", problem.angles.cos), ("sin", problem.angles.sin)) if x is not None}
    for name, x in written.items():
        check_writable(name, x)
    check_apart(written, read)


def check_apart(written: dict[str, Any], read: dict[str, Any]) -> None:
    """Raise `OverlapError` if an array that is written shares an element with another one, or with one that is read."""
    pairs = [*combinations(written.items(), 2), *((a, b) for a in written.items() for b in read.items())]
    bounds = {id(x): byte_bounds(x) for x in (*written.values(), *read.values())}
    for (name, x), (other, y) in pairs:
        (low, high), (other_low, other_high) = bounds[id(x)], bounds[id(y)]
        if low < other_high and other_low < high and share_elements(x, y):
            raise OverlapError(f"{name} shares memory with {other}; what is written must lie apart")


def check_writable(name: str, x: Any) -> None:
    """Raise unless a kernel can write the elements of ``x`` where they lie."""
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ArrayTypeError(f"{name} is read-only; a writable array is needed")
    if overlaps_itself(x):
        raise OverlapError(f"{name} has strides {x.strides} for shape {tuple(x.shape)}: its elements share memory")
    if not on_elements(x):
        raise ArgumentError(
            f"{name} has elements at addresses that are no multiples of their size; it is written there"
        )
