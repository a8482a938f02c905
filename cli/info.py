"""`info`: the executors, the compiler, the kernels and the cache of this machine."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from cuattn import compile, environment
from cuattn.benchmark import machine
from cuattn.compile import cache
from cuattn.errors import CuattnError
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.softmax.config import variants


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what result files say of a machine.")
def info(as_json: bool) -> None:
    """Say what is here: executors, GPU, NVRTC, CuPy, kernels, cache.

    \b
    Examples:
      cuattn-bench info
      cuattn-bench info --json
    """
    if as_json:
        click.echo(json.dumps(machine.describe(), indent=1, ensure_ascii=False))
    else:
        show()


def show() -> None:
    """Print the table."""
    table = Table(title="cuattn", title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    console = Console()
    with console.status("looking; the first time, the host executor may have to be compiled"):
        found = lines()
    for name, text in found.items():
        table.add_row(name, text)
    console.print(table)


def lines() -> dict[str, str]:
    """What is here on this machine, by name."""
    versions = machine.versions()
    return {
        "version": str(versions["cuattn"]),
        "GPU": gpu(),
        "host executor": host(),
        "processor": f"{machine.cpu_model()}, {environment.host_threads()} threads",
        "NVRTC": str(versions["nvrtc"] or "none: kernels that are not in the cache cannot be compiled"),
        "CuPy": str(versions["cupy"] or "none: NumPy arrays only"),
        "torch": str(versions["torch"] or "none: no peers to compare with on a GPU"),
        "Python, NumPy": f"{versions['python']}, {versions['numpy']}",
        "kernels": f"{', '.join(compile.kernel_names())}; {len(FLASH_FWD_CONFIGS)} attention rows, "
        f"{sum(1 for _ in variants())} softmax variants",
        "cache": contents(),
    }


def gpu() -> str:
    found = machine.gpu()
    if found["gpu"] is None:
        return "none"
    return f"{found['gpu']}, compute capability {found['compute_capability']}, driver {found['driver']}"


def host() -> str:
    """Whether NumPy arrays work here, and if not, why."""
    from cuattn.host import library

    try:
        return f"available ({library.load().isa}), kernels for {environment.host_arch()}"
    except CuattnError as error:
        return f"not available: {error}"


def contents() -> str:
    """What the kernel cache holds; or why it cannot be used."""
    try:
        return f"{len(cache.ls())} entries, {cache.size_bytes() / 2**20:.1f} MiB"
    except CuattnError as error:
        return f"not usable: {error}"
