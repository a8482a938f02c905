"""Kernel shapes that `cuattn.tune` has found to be the fastest, kept in the user's cache.

One entry of the cache holds them all: for each kind of device, the row of each class of calls. A process reads it once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from functools import cache
from typing import Any

from cuattn.compile import cache as disk
from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, FlashFwdConfig
from cuattn.ops.attention.forward.hopper_config import HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.forward.hopper_select import longest_seqlen_q, why_not
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.runtime.executor import Executor
from cuattn.version import __version__

__all__ = ["Row", "call_class", "device_name", "keep", "tuned_row"]

Row = FlashFwdConfig | HopperFwdConfig

#: The tables that rows come from; the name says which one.
_TABLES: dict[str, tuple[Row, ...]] = {
    "portable": FLASH_FWD_CONFIGS,
    "hopper": HOPPER_FWD_CONFIGS + HOPPER_ALTERNATIVES,
}
_SUFFIX = ".json"


def tuned_row(problem: Problem, packed: PackedSequences | None) -> Row | None:
    """Return the row that was measured to be the fastest for calls like this one; None where nothing was measured."""
    executor = problem.executor
    if executor.name == "host":
        return None
    rows = _rows(os.environ.get("CUATTN_CACHE_DIR"))
    if not rows:
        return None
    row = rows.get((device_name(executor), call_class(problem, packed)))
    if isinstance(row, HopperFwdConfig) and why_not(problem, executor.arch) is not None:
        return None  # of the same class, but for its strides
    return row


def call_class(problem: Problem, packed: PackedSequences | None) -> str:
    """Name what a row was measured for: calls that differ by less than a factor of two in any length are alike."""
    extents, options = problem.extents, problem.options
    seqlen_k = extents.seqlen_k
    if packed is not None and packed.max_seqlen_k is not None:
        seqlen_k = packed.max_seqlen_k
    parts = (
        problem.dtype.name + "_tf32" * options.tf32 + "_fp8" * options.fp8,
        f"d{BUCKETS[extents.head_dim]}",
        f"e{math.prod(COLUMNS[extents.head_dim_v])}",
        options.kernel_options.label + "_chunk" * options.variant.chunk,
        f"n{_power_of_2(longest_seqlen_q(problem, packed))}",
        f"m{_power_of_2(seqlen_k)}",
        f"heads{_power_of_2(extents.batch * extents.num_heads)}",
        f"group{extents.heads_per_kv_head}",
        "dense" if packed is None else "packed",
    )
    return "/".join(parts)


def _power_of_2(number: int) -> int:
    """Return the least power of two that is not below."""
    return 1 << max(number - 1, 0).bit_length()


def keep(executor: Executor, name: str, row: Row) -> None:
    """Keep a row for a class of calls on this kind of device, in this process and in the cache."""
    rows = _rows(os.environ.get("CUATTN_CACHE_DIR"))
    rows.update(_read())  # what other processes have added meanwhile
    rows[device_name(executor), name] = row
    entries = [
        {"device": device, "class": of, "table": _table_of(kept), "row": dataclasses.asdict(kept)}
        for (device, of), kept in sorted(rows.items(), key=lambda item: item[0])
    ]
    disk.write(_key(), _SUFFIX, json.dumps(entries, indent=1).encode())


@cache
def _rows(directory: str | None) -> dict[tuple[str, str], Row]:
    """Read the rows of the cache in ``directory``, by device and class. Changed in place by `keep`."""
    return _read()


def _read() -> dict[tuple[str, str], Row]:
    data = disk.read(_key(), _SUFFIX)
    rows: dict[tuple[str, str], Row] = {}
    try:
        for entry in () if data is None else json.loads(data):
            known = [row for row in _TABLES[entry["table"]] if dataclasses.asdict(row) == entry["row"]]
            if known:  # else the tables have changed since
                rows[str(entry["device"]), str(entry["class"])] = known[0]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}  # nothing that `keep` has written
    return rows


def _key() -> str:
    return f"tuned_rows-{__version__}"


def _table_of(row: Row) -> str:
    return "hopper" if isinstance(row, HopperFwdConfig) else "portable"


@cache
def device_name(executor: Executor) -> str:
    """Name the GPU that an executor runs on, and what its kernels are compiled for."""
    with executor.on_device():
        runtime = sys.modules["cupy"].cuda.runtime
        properties: dict[str, Any] = runtime.getDeviceProperties(runtime.getDevice())
    return f"{properties['name'].decode()}, {executor.arch}"
