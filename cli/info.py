"""`info`: the executors, the compiler, the kernels and the cache of this machine."""

from __future__ import annotations

import os
from typing import Any

import click
from rich.console import Console

from cuattn import compile, environment
from cuattn.benchmark import machine
from cuattn.benchmark.grids import Grid, show
from cuattn.compile import cache
from cuattn.errors import CuattnError
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.softmax.config import variants

from .output import emit, format_option

#: What None means, where it is more than "not installed".
MISSING = {
    "gpu": "none",
    "driver": "none",
    "nvrtc": "none: kernels that are not in the cache cannot be compiled",
    "cupy": "none: NumPy arrays only",
    "torch": "none: no peers to compare with on a GPU",
    "commit": "not a checkout",
    "changed_since_commit": "not a checkout",
}
NAMES = {
    **{"gpu": "GPU", "nvrtc": "NVRTC", "cupy": "CuPy", "numpy": "NumPy", "python": "Python", "cpu": "processor"},
    **{"ml_dtypes": "ml_dtypes", "source_sha256": "SHA-256 of the source", "cache_bytes": "size of the cache"},
}


@click.command()
@format_option
def info(form: str) -> None:
    """Say what is here: executors, GPU, NVRTC, CuPy, kernels, cache.

    \b
    Examples:
      cuattn-bench info
      cuattn-bench info --json
    """
    found = looked()
    emit([grid(found)], form, found)


def show_here() -> None:
    """Print the table."""
    show(Console(), [grid(looked())])


def looked() -> dict[str, Any]:
    """Find `facts`, with a word on what takes long."""
    with Console(stderr=True).status("looking; the first time, the host executor may have to be compiled"):
        return facts()


def grid(found: dict[str, Any]) -> Grid:
    """A line for each fact: all that ``--json`` says."""
    rows = [(NAMES.get(name, name.replace("_", " ")), text(name, value)) for name, value in found.items()]
    return Grid("cuattn", ("what", "here"), rows)


def text(name: str, value: Any) -> str:
    """A fact in words."""
    if value is None:
        return MISSING.get(name, "none")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) else str(value)


def facts() -> dict[str, Any]:
    """What is here on this machine, by name; what result files say of it is part of that."""
    executor = host()  # before the machine is described, which does not load the library by itself
    described = machine.describe()
    return {
        "cuattn": described.pop("cuattn"),
        "host_executor": executor,
        **described,
        "kernels": list(compile.kernel_names()),
        "attention_rows": len(FLASH_FWD_CONFIGS),
        "softmax_variants": sum(1 for _ in variants()),
        **cached(),
    }


def host() -> str:
    """Whether NumPy arrays work here, and if not, why."""
    from cuattn.host import library

    try:
        return f"available ({library.load().isa}), kernels for {environment.host_arch()}"
    except CuattnError as error:
        return f"not available: {error}"


def cached() -> dict[str, Any]:
    """Where the kernel cache is, whether it can be written, and what it holds; or why it cannot be used."""
    try:
        root = cache.require_usable()
        entries = cache.ls()
    except CuattnError as error:
        return {"cache": f"not usable: {error}"}
    return {
        "cache": str(root),
        "cache_writable": os.access(root, os.W_OK | os.X_OK),
        "cache_entries": len(entries),
        "cache_bytes": sum(entry.size_bytes for entry in entries),
    }
