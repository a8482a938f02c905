"""`list`: suites, kernels, the rows of the tables, compiled variants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from cuattn import compile
from cuattn.benchmark import SUITES, variants
from cuattn.benchmark.grids import Grid
from cuattn.compile import cache
from cuattn.compile.expand import KERNELS
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.attention.variants import compiled_options
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS
from cuattn.ops.softmax import config as softmax_config

from .output import emit, format_option, progress

SOFTMAX_ROWS = (
    *softmax_config.ONCHIP,
    *softmax_config.ONCHIP_LANES,
    softmax_config.STREAM_SHORT,
    softmax_config.STREAM,
    softmax_config.STREAM_LANES,
    softmax_config.SPLIT,
    softmax_config.SPLIT_LANES,
)
TOPICS = ("suites", "kernels", "rows", "variants", "resources")
QUICK = TOPICS[:-1]  # what is listed where no topic is named


@click.command("list")
@click.argument("topics", nargs=-1, type=click.Choice(TOPICS), metavar=f"[{'|'.join(TOPICS)}]...")
@format_option
def list_(topics: tuple[str, ...], form: str) -> None:
    """List suites, kernels, rows of the configuration tables, and compiled variants.

    \b
    suites     what `run` takes
    kernels    kernel files
    rows       tile shapes of attention, the sets of options these are compiled with, thread layouts of softmax
    variants   kernels that have been compiled and are in the cache
    resources  registers, spills, shared memory and occupancy of every attention row: plain, causal, with every option;
               what is not in the cache is compiled, which takes minutes the first time

    \b
    Examples:
      cuattn-bench list
      cuattn-bench list rows
      cuattn-bench list resources
      cuattn-bench list variants --json
      cuattn-bench list rows --format csv
    """
    found = {title: make() for topic in topics or QUICK for title, make in LISTS[topic].items()}
    emit([table(topic, entries) for topic, entries in found.items()], form, found)


def table(title: str, entries: list[dict[str, Any]]) -> Grid:
    """Return a table with a row for each entry; its columns are the keys of all of them."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    columns = [name.replace("_", " ") for name in names]
    return Grid(f"{title} ({len(entries)})", columns, [[entry.get(name, "") for name in names] for entry in entries])


def suites() -> list[dict[str, Any]]:
    return [{"name": suite.name, "what": suite.summary} for suite in SUITES.values()]


def kernels() -> list[dict[str, Any]]:
    return [{"name": name, "entries": ", ".join(entries(name))} for name in compile.kernel_names()]


def entries(kernel: str) -> list[str]:
    """Names of the ``__global__`` functions of a kernel file."""
    return re.findall(r"__global__[^;{]*?\b(cuattn_\w+)\(", (KERNELS / f"{kernel}.cu").read_text(encoding="utf-8"))


def attention_rows() -> list[dict[str, Any]]:
    return [
        {
            "kernel": row.source.removeprefix("attention_"),
            "math": row.products,
            "bytes": row.itemsize,
            "D up to": row.max_head_dim,
            "block_m": row.block_m,
            "block_n": row.block_n,
            "warps": row.num_warps,
            "stages": row.num_stages,
            "queries up to": row.max_seqlen_q or "",
            "options on scores": "any" if row.score_options else "none",
        }
        for row in FLASH_FWD_CONFIGS
    ]


def backward_rows() -> list[dict[str, Any]]:
    return [
        {
            "kernel": row.source.removeprefix("attention_"),
            "math": row.products,
            "owns": row.own,
            "bytes": row.itemsize,
            "D up to": row.max_head_dim,
            "block_own": row.block_own,
            "block_other": row.block_other,
            "warps": row.num_warps,
            "stages": row.num_stages,
            "launches": len(row.launches()),
            "options on scores": "any" if row.score_options else "none",
        }
        for row in FLASH_BWD_CONFIGS
    ]


def decode_rows() -> list[dict[str, Any]]:
    return [
        {
            "kernel": row.source.removeprefix("attention_"),
            "math": row.products,
            "bytes": row.itemsize,
            "D up to": row.max_head_dim,
            "block_m": row.block_m,
            "block_n": row.block_n,
            "warps": f"{row.warps_m}x{row.warps_n}",
            "stages": row.num_stages,
            "rows up to": row.max_rows or "",
        }
        for row in FLASH_DECODE_CONFIGS
    ]


def resources() -> list[dict[str, Any]]:
    """A line for each attention kernel and architecture."""
    wanted = [
        (variant, arch)
        for variant in variants.all_attention()
        for arch in variants.ARCHS
        if variant.smem_bytes <= compile.smem_limit_bytes(arch)
    ]
    found = []
    with progress() as update:
        for done, (variant, arch) in enumerate(wanted):
            update(done, len(wanted), variant.label)
            binary = compile.build(variant.kernel, variant.constants, arch=arch, kind="cubin")
            for figures in binary.resources.values():
                found.append({"kernel": variant.label, "arch": arch, **variants.resources(variant, arch, figures)})
    return found


def attention_options() -> list[dict[str, Any]]:
    """The sets of options that each row may be compiled with, because some call needs a kernel for them."""
    return [
        {
            "options": options.label,
            "compiled in": " ".join(name for name, value in options.constants().items() if value is True),
            "bias": options.bias_dtype if options.bias else "",
        }
        for options in compiled_options()
    ]


def softmax_rows() -> list[dict[str, Any]]:
    return [
        {
            "path": config.path,
            "threads": config.num_threads,
            "threads a row": config.threads_per_row,
            "lanes span": "rows" if config.lanes_span_rows else "columns",
            "bytes a thread": config.packs_per_thread * softmax_config.PACK_BYTES,
        }
        for config in SOFTMAX_ROWS
    ]


def compiled() -> list[dict[str, Any]]:
    """Compiled kernels in the cache, newest first."""
    result = []
    for entry in cache.ls():
        name, _, kind = entry.name.rpartition(".")
        if kind in ("ptx", "cubin"):
            kernel, arch, key = name.rsplit("-", 2)
            about = {"kernel": kernel, "arch": arch, "kind": kind, "bytes": entry.size_bytes}
            result.append({**about, "constants": constants(entry.path.with_suffix(".cu")), "key": key})
    return result


def constants(source: Path) -> str:
    """The constants of a variant, from the source that lies beside it; empty where that is gone."""
    try:
        head = source.read_text(encoding="utf-8").split("\n#line", 2)[1]
    except (OSError, IndexError):
        return ""
    found = re.findall(r"^(?:constexpr \w+|using) (\w+) = ([^;]+);", head, re.MULTILINE)
    return " ".join(f"{name}={value}" for name, value in found)


#: Topic to its tables: title to what makes the entries.
LISTS = {
    "suites": {"suites": suites},
    "kernels": {"kernels": kernels},
    "rows": {
        "attention rows": attention_rows,
        "attention backward rows": backward_rows,
        "attention decode rows": decode_rows,
        "attention options": attention_options,
        "softmax rows": softmax_rows,
    },
    "variants": {"variants": compiled},
    "resources": {"resources": resources},
}
