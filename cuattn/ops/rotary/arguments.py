"""What `rope` and `split_qkv` share: the checks of rotations and positions, and how the kernels want them packed."""

from __future__ import annotations

import decimal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from cuattn import environment
from cuattn.addresses import address, byte_bounds, on_elements
from cuattn.compile import Constant
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.messages import shown
from cuattn.runtime.arrays import contiguous
from cuattn.runtime.checks import check_apart, check_dtype, check_out
from cuattn.runtime.executor import Executor, executor_for
from cuattn.scalars import MAX_EXTENT, as_integer, check_flag, real

NUM_THREADS = 256
HEADS_PER_THREAD = 4  # that share one thread's cosines and sines
MAX_GROUPS = 2**20  # of heads: the kernels count the threads of a token in 32 bits
DEFAULT_BASE = 10000.0

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")

#: Arguments of a kernel that turns nothing.
NO_ANGLES: dict[str, Any] = {"g_turns": None, "g_cos": None, "g_sin": None}


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Which pairs of a head are turned, and how fast: what `rope` takes as keywords, for functions that fuse it.

    Attributes
    ----------
    base : float, at least 1
        Pair i turns by position * base ** (-2i / rotary_dim) radians.
    interleaved : bool
        Pairs are elements (2i, 2i + 1); by default they are (i, i + rotary_dim / 2).
    rotary_dim : int, even, optional
        Elements of a head that are turned, the first ones; all by default, or as many as the tables are for.
    cos, sin : arrays [max_position, rotary_dim / 2], float32 (or float64 for float64 heads), optional
        Rotations to look up instead of computing them from ``base``: see `rope_frequencies`.

    Examples
    --------
    >>> import cuattn
    >>> cuattn.Rotary(base=500000.0).interleaved
    False
    """

    base: float = DEFAULT_BASE
    interleaved: bool = False
    rotary_dim: int | None = None
    cos: Any = None
    sin: Any = None

    @property
    def arrays(self) -> dict[str, Any]:
        """The tables that were given, by name: their executor is that of the call."""
        return {name: x for name, x in (("cos", self.cos), ("sin", self.sin)) if x is not None}


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """A `Rotary` that has passed every check, as kernels take it: either ``turns``, or ``cos`` and ``sin``."""

    num_pairs: int
    interleaved: bool
    turns: Any = None
    cos: Any = None
    sin: Any = None

    @property
    def arrays(self) -> dict[str, Any]:
        """Return the arguments of a kernel; None is a null pointer."""
        return {"g_turns": self.turns, "g_cos": self.cos, "g_sin": self.sin}

    @property
    def table_layout(self) -> tuple[int, int, int]:
        """Return the fields of the struct TableLayout of kernels/rotary/rope.cuh: strides of the tables, positions."""
        if self.cos is None:
            return 0, 0, 0
        cos_stride, sin_stride = (table.strides[0] // table.dtype.itemsize for table in (self.cos, self.sin))
        return cos_stride, sin_stride, self.cos.shape[0]

    def constants(self, dtype: np.dtype[Any]) -> dict[str, Constant]:
        """Return the constants of rotary/rotary_units.cuh and of the kernels that include it."""
        table_dtype = None if self.cos is None else self.cos.dtype.name
        return kernel_constants(dtype.name, self.interleaved, table_dtype)

    def units(self, head_dim: int, itemsize: int, aligned: bool) -> tuple[bool, int, int]:
        """Whether 16-byte units fit, ``aligned`` heads given; how many are turned, and how many a head has."""
        pack = 16 // itemsize
        per_unit = pack // 2 if self.interleaved else pack
        copied = head_dim - 2 * self.num_pairs
        fits = self.num_pairs % per_unit == 0 and copied % pack == 0
        for table in (self.cos, self.sin):
            if table is not None:
                run_bytes = min(16, per_unit * table.dtype.itemsize)
                fits = fits and (address(table) | table.strides[0]) % run_bytes == 0
        if not (aligned and fits):
            return False, self.num_pairs, self.num_pairs + copied
        turned = self.num_pairs // per_unit
        return True, turned, turned + copied // pack


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Positions as a kernel takes them; strides in elements, of the axes batch and sequence."""

    array: Any
    batch_stride: int
    seq_stride: int

    @property
    def are_64_bit(self) -> bool:
        return bool(self.array.dtype.itemsize == 8)


def kernel_constants(dtype_name: str, interleaved: bool, table_dtype: str | None) -> dict[str, Constant]:
    """Return the constants of both kernels; ``table_dtype`` is None where rotations are computed."""
    if table_dtype is None:
        table_type = "double" if dtype_name == "float64" else "float"
    else:
        table_type = ELEMENT_TYPES[table_dtype]
    return {
        "Element": ELEMENT_TYPES[dtype_name],
        "INTERLEAVED": interleaved,
        "NUM_THREADS": NUM_THREADS,
        "TABLES": table_dtype is not None,
        "Table": table_type,
    }


def variants() -> Iterator[tuple[str, dict[str, Constant]]]:
    """Return every kernel that a call of `rope` or `split_qkv` can ask for: the source, and its constants."""
    for dtype_name in ELEMENT_TYPES:
        tables = ("float32", "float64") if dtype_name == "float64" else ("float32",)
        for interleaved in (False, True):
            for table_dtype in (None, *tables):
                constants = kernel_constants(dtype_name, interleaved, table_dtype)
                yield "rope", constants
                yield "split_qkv", {**constants, "ROTATE": True}
        yield "split_qkv", {**kernel_constants(dtype_name, False, None), "ROTATE": False}


def num_groups(num_heads: int) -> int:
    """Return the number of groups of heads with threads of their own."""
    return min(-(-num_heads // HEADS_PER_THREAD), MAX_GROUPS)


def check_heads(name: str, x: Any, head_dim: int) -> None:
    """Raise unless the kernels take heads of this dtype and size."""
    check_dtype(name, x.dtype)
    if max(x.shape) > MAX_EXTENT:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; an extent may be at most {MAX_EXTENT}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ShapeError(f"{name} has head dim {head_dim}; allowed are 1 to {MAX_HEAD_DIM}")


# --- rotations -------------------------------------------------------------------------------------------------------


def resolve(executor: Executor, rotary: Rotary, head_dim: int, dtype: np.dtype[Any]) -> Angles:
    """Resolve the rotations of heads of ``head_dim`` elements; raises as documented at `cuattn.rope`."""
    interleaved = check_flag("interleaved", rotary.interleaved)
    base = check_base(rotary.base)
    tables = rotary.arrays
    if len(tables) == 1:
        (given,) = tables
        raise ArgumentError(f"{given} is given without {'sin' if given == 'cos' else 'cos'}; both or neither")
    if not tables:
        rotary_dim = head_dim if rotary.rotary_dim is None else rotary.rotary_dim
        num_pairs = check_rotary_dim(rotary_dim, head_dim) // 2
        words = turn_words(executor, base, num_pairs, dtype == np.float64)
        return Angles(num_pairs, interleaved, words)
    if base != DEFAULT_BASE:
        raise ArgumentError(f"base is {shown(rotary.base)} beside cos and sin, which say it all; leave the default")
    cos, sin = (_check_table(executor, name, table, dtype) for name, table in tables.items())
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ShapeError(
            f"cos is {cos.dtype} of shape {tuple(cos.shape)} and sin {sin.dtype} of shape {tuple(sin.shape)}; "
            "they must be alike"
        )
    rotary_dim = 2 * cos.shape[1] if rotary.rotary_dim is None else rotary.rotary_dim
    num_pairs = check_rotary_dim(rotary_dim, head_dim) // 2
    if num_pairs != cos.shape[1]:
        raise ShapeError(
            f"cos and sin have {cos.shape[1]} columns and rotary_dim is {rotary_dim}; rotary_dim / 2 are needed"
        )
    return Angles(num_pairs, interleaved, None, cos, sin)


def check_base(base: Any) -> float:
    """Return ``base`` as a float."""
    return real("base", base, "a finite number of at least 1 is allowed", lambda base: base >= 1)


def check_rotary_dim(rotary_dim: Any, head_dim: int = MAX_HEAD_DIM) -> int:
    """Return ``rotary_dim`` as an int: even, and no larger than a head."""
    dim = as_integer(rotary_dim)
    if dim is None:
        raise ArgumentError(f"rotary_dim is {shown(rotary_dim)}; an even integer is allowed")
    if dim % 2 or not 2 <= dim <= head_dim:
        raise ArgumentError(f"rotary_dim is {shown(dim)}; even numbers from 2 to the head dim, {head_dim}, are allowed")
    return dim


def _check_table(executor: Executor, name: str, table: Any, dtype: np.dtype[Any]) -> Any:
    table = executor.asarray(name, table)
    allowed = ("float32", "float64") if dtype == np.float64 else ("float32",)
    if table.dtype.name not in allowed or not table.dtype.isnative:
        raise DTypeError(
            f"{name} has dtype {table.dtype} ({table.dtype.str}); {' or '.join(allowed)} for {dtype} heads"
        )
    if table.ndim != 2 or max(table.shape) > MAX_EXTENT:
        raise ShapeError(f"{name} has shape {tuple(table.shape)}; [max_position, rotary_dim / 2] is needed")
    if (table.shape[1] > 1 and table.strides[1] != table.dtype.itemsize) or not on_elements(table):
        return contiguous(executor, table)
    return table


def turns(base: float, num_pairs: int) -> list[int]:
    """Return base ** (-i / num_pairs) / 2 pi for every pair i: turns a position, as multiples of 2^-128, modulo 1.

    >>> [round(turn / 2**128, 6) for turn in turns(10000.0, 2)]
    [0.159155, 0.001592]
    """
    with decimal.localcontext() as context:
        context.prec = 60  # 2^-128 is 3e-39
        step = Decimal(base) ** (Decimal(-1) / num_pairs)
        frequency, result = 1 / (2 * _PI), []
        for _ in range(num_pairs):
            result.append(int((frequency * 2**128).to_integral_value()) % 2**128)
            frequency *= step
        return result


@cache  # never dropped: a captured graph may hold the address
def turn_words(executor: Executor, base: float, num_pairs: int, wide: bool) -> Any:
    """Return turns of all pairs as kernels read them, uint64: 64 bits of each, or 128 (high words first) if ``wide``.

    Copied to a device once, like a kernel that is loaded; later calls on other streams find it there.
    """
    exact = turns(base, num_pairs)
    if wide:
        words = np.array([[turn >> 64 for turn in exact], [turn % 2**64 for turn in exact]], np.uint64)
    else:
        words = np.array([(turn + 2**63 >> 64) % 2**64 for turn in exact], np.uint64)
    result = executor.put(words, np.uint64)
    if executor.name == "cuda":
        with executor.on_device():
            sys.modules["cupy"].cuda.get_current_stream().synchronize()
    return result


# --- positions -------------------------------------------------------------------------------------------------------


def on_device(name: str, x: Any) -> bool:
    """Whether ``x`` is an array that lives on a GPU; lists and arrays on the CPU are data that the host can look at."""
    if isinstance(x, np.ndarray | list | tuple):
        return False
    return executor_for(**{name: x}).name == "cuda"


def integers(executor: Executor, name: str, x: Any) -> tuple[Any, np.ndarray[Any, Any] | None]:
    """Return integer metadata as int32 or int64 where the kernels run, and what the host can see of it.

    What is on the device already stays there, unseen unless ``CUATTN_CHECK`` is set.
    """
    x = executor.metadata(name, x)
    if not isinstance(x, np.ndarray):
        if x.dtype not in (np.int32, np.int64):
            raise DTypeError(f"{name} has dtype {x.dtype}; int32 and int64 are allowed on a device")
        return (x if on_elements(x) else contiguous(executor, x)), (x.get() if environment.check() else None)
    if x.size == 0 and x.dtype == np.float64:  # a list without elements
        x = x.astype(np.int32)
    if x.dtype.kind not in "iu":
        raise DTypeError(f"{name} has dtype {x.dtype}; integers are allowed")
    if x.dtype.kind == "u" and x.size and int(x.max()) > np.iinfo(np.int64).max:
        raise ArgumentError(f"{name} holds {int(x.max())}; at most {np.iinfo(np.int64).max} is allowed")
    kept = x.dtype.isnative and x.dtype in (np.int32, np.int64) and on_elements(x)
    if kept and executor.name == "host":
        return x, x
    return executor.put(x, x.dtype if kept else np.int64), x


def check_positions(
    executor: Executor, positions: Any, shape: tuple[int, ...], angles: Angles, *, look: bool = True
) -> Positions:
    """Check ``positions`` for tokens of ``shape``, [batch, seqlen] or [tokens]; a missing batch axis is broadcast.

    Those that the host can see must be in the tables, if there are tables.
    """
    array, seen = integers(executor, "positions", positions)
    if tuple(array.shape) not in (shape, shape[-1:]):
        raise ShapeError(f"positions has shape {tuple(array.shape)}; {' or '.join(map(str, {shape, shape[-1:]}))} fit")
    limit = None if angles.cos is None else int(angles.cos.shape[0])
    if look and seen is not None and limit is not None and seen.size:
        low, high = int(seen.min()), int(seen.max())
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            where = tuple(int(i) for i in np.argwhere(seen == wrong)[0])
            raise ArgumentError(f"positions{list(where)} is {wrong}; cos and sin hold the positions 0 to {limit - 1}")
    strides = [stride // array.dtype.itemsize for stride in array.strides]
    return Positions(array, strides[0] if array.ndim == 2 else 0, strides[-1])


def check_output(name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], **inputs: Any) -> None:
    """Raise unless ``out`` can take such a result and lies apart from the inputs; those that are None do not count."""
    check_out(name, out, shape, dtype)
    check_apart(name, byte_bounds(out), {other: byte_bounds(x) for other, x in inputs.items() if x is not None})


def same_memory(x: Any, y: Any) -> bool:
    """Whether the elements of two arrays of one shape and dtype are the same ones."""
    return address(x) == address(y) and x.strides == y.strides
