"""Every kernel of the package by name, ``KERNEL/ROW``, with the constants it is compiled with: what `inspect` takes.

A kernel is a file of ``cuattn/kernels``. A row is one of the constants that calls compile it with: a shape of a table
with its options where there is a table, else what a call on 16-bit arrays would take.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cuattn.benchmark import variants
from cuattn.errors import ArgumentError
from cuattn.formats import KV_FORMATS
from cuattn.head_dims import COLUMNS
from cuattn.kv import append, copy
from cuattn.ops.attention.forward.config import PlainFwdConfig
from cuattn.ops.attention.forward.hopper_config import ARCH, HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions
from cuattn.ops.decode import reduce
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS, FlashDecodeConfig
from cuattn.ops.merge import launch as merge_launch
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.ops.softmax import config as softmax_config

#: Options that Hopper rows are shown with, and whether for packed sequences.
_HOPPER_OPTIONS = (
    (PLAIN, False),
    (variants.CAUSAL, False),
    (ForwardOptions(softcap=True), False),
    (ForwardOptions(bound_left=True, bound_right=True, softcap=True, alibi=True), True),
)

#: Kernels without a table: name to the constants of a call.
_SINGLE: Mapping[str, Mapping[str, Any]] = {
    "attention_backward_bias_sum": {"Real": "float", "BiasElement": "float", "NUM_THREADS": 256},
    "attention_backward_dq": {"Element": "__half", "NUM_WARPS": 4},
    "attention_backward_rows": {"Element": "__half", "Accumulator": "float", "NUM_WARPS": 4},
    "attention_backward_sinks": {"Real": "float", "Element": "__half", "NUM_WARPS": 32},
    "attention_mask_tiles": {
        **{name: True for name in ("SOFTCAP", "ALIBI", "BIAS", "MASK")},
        "BiasElement": "__half",
        "NUM_WARPS": 4,
    },
    "attention_plain": PlainFwdConfig().constants("float16", 0, 0),
    "attention_schedule": {"BLOCK_M": 128, "NUM_THREADS": 1024},
    "attention_standard": {
        **PlainFwdConfig().constants("float16", 0, 0),
        **dict.fromkeys(("Probability", "Element"), "__half"),
        "TILE": 16,
    },
    "copy_pages": copy.constants(16),
    "padding_plan": {"NUM_THREADS": 256},
    "padding_rows": {"NUM_THREADS": 256},
    "rope": rotary_arguments.kernel_constants("float16", False, None),
    "slot_mapping": {"NUM_THREADS": 128},
    "split_qkv": {**rotary_arguments.kernel_constants("float16", False, None), "ROTATE": True},
}


@dataclass(frozen=True, slots=True, eq=False)
class Inspected:
    """A kernel with its constants, and the one architecture that it is for; empty: any."""

    kernel: str
    row: str
    constants: Mapping[str, Any]
    arch: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.row}"


@cache
def everything() -> tuple[Inspected, ...]:
    """All of them, in the order of the kernels' names."""
    found = [*_attention(), *_hopper(), *_decode(), *_generated(), *_single()]
    return tuple(sorted(found, key=lambda one: one.kernel))


def choose(names: Sequence[str]) -> list[Inspected]:
    """Those that one of the names stands for: ``KERNEL``, all of its rows; ``KERNEL/ROW``; either with wildcards.

    Raises `ArgumentError` for a name that stands for none.
    """
    found: dict[str, Inspected] = {}
    for name in names:
        pattern = name if "/" in name else f"{name}/*"
        matching = [one for one in everything() if fnmatch.fnmatchcase(one.name, pattern)]
        if not matching:
            raise ArgumentError(f"no kernel is called {name!r}: {_nearest(name)}")
        found |= {one.name: one for one in matching}
    return list(found.values())


def _nearest(name: str) -> str:
    kernel = name.partition("/")[0]
    rows = [one.row for one in everything() if one.kernel == kernel]
    if rows:
        return f"the rows of {kernel} are {', '.join(rows[:8])}{', ...' if len(rows) > 8 else ''}"
    return f"kernels are {', '.join(dict.fromkeys(one.kernel for one in everything()))}"


def _attention() -> Iterator[Inspected]:
    for variant in variants.all_attention():
        yield Inspected(variant.source, variant.label.removeprefix(f"{variant.source}_"), variant.constants)


def _hopper() -> Iterator[Inspected]:
    for row in (*HOPPER_FWD_CONFIGS, *HOPPER_ALTERNATIVES):
        d, e = row.max_head_dim, row.max_head_dim_v
        dtype = "float8_e4m3fn" if row.itemsize == 1 else "bfloat16"
        shape = f"{dtype}_d{d}_e{e}_{row.block_m}x{row.block_n}_s{row.num_stages}"
        shape += "_pingpong" * row.ping_pong + "_few" * bool(row.max_seqlen_q)
        for options, packed in _HOPPER_OPTIONS:
            if row.serves(d, e, options, 1, row.itemsize):
                constants = row.constants(dtype, d, e, options, packed=packed)
                yield Inspected(row.source, f"{shape}_{options.label}{'_packed' * packed}", constants, ARCH)


def _decode() -> Iterator[Inspected]:
    for row in FLASH_DECODE_CONFIGS:
        dtype = variants.DTYPE[row.itemsize]
        for name in (dtype, *(("int8", "nvfp4") if row.itemsize < 8 else ())):
            for options in (PLAIN, EVERYTHING):
                label = (
                    f"{dtype}_{name}_d{row.max_head_dim}_{row.block_m}x{row.block_n}"
                    f"_w{row.warps_m}x{row.warps_n}_s{row.num_stages}_{'plain' if options is PLAIN else 'everything'}"
                )
                yield Inspected(row.source, label, _decode_constants(row, dtype, name, options is EVERYTHING))


def _decode_constants(row: FlashDecodeConfig, dtype: str, kv_format: str, everything: bool) -> dict[str, Any]:
    used = ("BOUND_LEFT", "BOUND_RIGHT", "ROTATE", "SOFTCAP", "ALIBI")
    unused = {"SLOT_SCALES": False, "INTERLEAVED": False, "TABLES": False, "BIAS": False, "MASK": False}
    flags = {"PAGED": True, "ALIGNED": True, "Table": "float", "BiasElement": "float"}
    flags |= unused | dict.fromkeys(used, everything)
    columns, blocks = COLUMNS[row.max_head_dim]
    return row.constants(dtype, KV_FORMATS[kv_format], row.max_head_dim, columns, flags, column_blocks=blocks)


def _generated() -> Iterator[Inspected]:
    """Kernels whose modules list what calls may ask for."""
    yield from _named("append_kv", append.variants())
    yield from _named("attention_decode_reduce", reduce.variants())
    yield from _named("merge_states", merge_launch.variants())
    for kernel, constants in softmax_config.variants():
        yield from _named(kernel, [constants])


def _named(kernel: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Inspected]:
    for constants in rows:
        words = (str(value).removeprefix("struct ").strip("_").lower() for value in constants.values())
        yield Inspected(kernel, "_".join(words), constants)


def _single() -> Iterator[Inspected]:
    for kernel, constants in _SINGLE.items():
        yield Inspected(kernel, "default", constants)
