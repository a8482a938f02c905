"""`cache`: what has been compiled, deleting it, and compiling ahead of time."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from cuattn import compile, environment
from cuattn.benchmark import machine
from cuattn.benchmark.grids import Grid
from cuattn.compile import arch as archs
from cuattn.compile import cache as store
from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.forward import hopper_config as hopper
from cuattn.ops.attention.forward import hopper_select
from cuattn.ops.attention.forward.config import FEW_QUERIES, select
from cuattn.ops.attention.variants import PLAIN, ForwardOptions
from cuattn.ops.softmax.config import variants

from .options import problem_options
from .output import emit, format_option, progress

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 128)
Variant = tuple[str, dict[str, Any]]


@click.group()
def cache() -> None:
    """Look after the cache of compiled kernels.

    It is CUATTN_CACHE_DIR, or a folder in the user's cache directory.
    """


@cache.command()
@format_option
def ls(form: str) -> None:
    """List the entries, newest first.

    \b
    Examples:
      cuattn-bench cache ls
      cuattn-bench cache ls --json
    """
    entries = store.ls()
    rows = [{"name": e.name, "bytes": e.size_bytes, "modified": _date(e.modified)} for e in entries]
    total = sum(entry.size_bytes for entry in entries)
    title = f"{store.root()}: {len(entries)} entries, {total / 2**20:.1f} MiB"
    grid = Grid(title, ("entry", "bytes", "made"), [tuple(row.values()) for row in rows])
    emit([grid if entries else title], form, rows)


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", timespec="seconds")


@cache.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(yes: bool) -> None:
    """Delete every entry. What is needed again is compiled again.

    \b
    Examples:
      cuattn-bench cache clear --yes
    """
    count = len(store.ls())
    if count and not yes:
        click.confirm(f"delete {count} entries of {store.root()}?", abort=True)
    click.echo(f"{store.clear()} entries deleted")


@cache.command()
@click.option("--arch", "names", type=click.Choice(archs.names()), multiple=True, help="Compile CUBINs for this one.")
@problem_options
@click.option("--softmax", is_flag=True, help="The softmax kernels too: hundreds, so minutes.")
def warmup(
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    seqlens: tuple[int, ...],
    head_dims: tuple[int, ...],
    softmax: bool,
) -> None:
    """Compile kernels ahead of time, so that no call has to wait for it.

    Without --arch, for what is here: the GPU, if one answers, and the host executor. --seqlen matters only in that few
    queries may run in a kernel of their own; without it both are compiled.

    \b
    Examples:
      cuattn-bench cache warmup
      cuattn-bench cache warmup --dtype bfloat16 --head-dim 128
      cuattn-bench cache warmup --arch sm_80 --arch sm_90a
    """
    store.require_usable()  # a temporary folder would be gone with this program
    targets = [compile.Target(name, "cubin") for name in names] or here()
    work = []
    for target in targets:
        chosen = dict.fromkeys(_key(v) for v in wanted(target, dtypes, seqlens, head_dims, softmax))
        work += [(target, source, dict(constants)) for source, constants in chosen]
    began = time.perf_counter()
    with progress() as update:
        for index, (target, source, constants) in enumerate(work):
            update(index, len(work), f"{source} {target.arch}")
            build(target, source, constants)
    places = ", ".join(f"{target.arch} ({target.kind})" for target in targets)
    click.echo(f"{len(work)} kernels are ready for {places}, after {time.perf_counter() - began:.1f} s")


def here() -> list[compile.Target]:
    """What kernels are compiled for on this machine, as a `Target`."""
    targets = [compile.Target(environment.host_arch(), "ptx")]
    capability = machine.gpu().get("compute_capability")
    if capability is not None:
        targets.insert(0, compile.for_device(divmod(int(str(capability)), 10)))
    return targets


def wanted(
    target: compile.Target,
    dtypes: tuple[str, ...],
    seqlens: tuple[int, ...],
    head_dims: tuple[int, ...],
    softmax: bool,
) -> Iterator[Variant]:
    """Kernels with their constants, some of them more than once."""
    limit = compile.smem_limit_bytes(target.arch)
    for dtype in dtypes or DTYPES:
        for head_dim in head_dims or HEAD_DIMS:
            bucket, (columns, blocks) = BUCKETS[head_dim], COLUMNS[head_dim]
            for seqlen in seqlens or (1, 2**20):
                row = select(np.dtype(dtype), bucket, columns, seqlen_q=seqlen, smem_limit_bytes=limit)
                for options in (PLAIN, ForwardOptions(bound_right=True)):
                    yield row.source, row.constants(dtype, bucket, columns, options, column_blocks=blocks)
                    if target.arch == hopper.ARCH and dtype in hopper_select.DTYPES and bucket <= hopper.MAX_HEAD_DIM:
                        size = hopper.BUCKETS[head_dim]
                        large = hopper_select.select_row(size, size, min(seqlen, FEW_QUERIES + 1), options, limit)
                        yield large.source, large.constants(dtype, size, size, options)
    if softmax:
        yield from variants()


def _key(variant: Variant) -> tuple[str, tuple[tuple[str, Any], ...]]:
    source, constants = variant
    return source, tuple(constants.items())


def build(target: compile.Target, source: str, constants: dict[str, Any]) -> None:
    """Compile one kernel; on the host, translate it as well."""
    binary = compile.build(source, constants, arch=target.arch, kind=target.kind)
    if target == compile.Target(environment.host_arch(), "ptx"):
        from cuattn import host

        host.RawModule(code=binary.image.decode())
