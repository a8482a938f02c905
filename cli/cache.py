"""`cache`: what has been compiled, deleting it, and compiling ahead of time."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from cuattn import compile, environment
from cuattn.benchmark import machine, warm
from cuattn.benchmark.grids import Grid
from cuattn.compile import arch as archs
from cuattn.compile import cache as store
from cuattn.ops.softmax.config import variants

from .options import problem_options
from .output import emit, format_option, progress

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 128)
_SIZES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Size(click.ParamType):
    """Bytes: ``500MB``, ``2GiB``, ``1000000``."""

    name = "SIZE"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmg]i?)?b?", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is no size, such as 500MB or 2GiB", parameter, context)
        return int(float(match[1]) * _SIZES[match[2] or ""])


class Age(click.ParamType):
    """Seconds: ``30d``, ``12h``, ``2w``."""

    name = "AGE"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([smhdw])", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is no age, such as 30d, 12h or 2w", parameter, context)
        return float(match[1]) * _AGES[match[2]]


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
@click.option("--max-size", type=Size(), help="Delete the oldest entries until the rest takes no more.")
@click.option("--older-than", type=Age(), help="Delete entries that were made longer ago.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; delete nothing.")
def prune(max_size: int | None, older_than: float | None, dry_run: bool) -> None:
    """Delete old entries, the oldest first. What is needed again is compiled again.

    \b
    Examples:
      cuattn-bench cache prune --max-size 500MB
      cuattn-bench cache prune --older-than 30d --dry-run
    """
    if max_size is None and older_than is None:
        raise click.UsageError("say what to keep: --max-size, --older-than or both")
    found = store.prune(max_bytes=max_size, older_than_s=older_than, dry_run=dry_run)
    freed = sum(entry.size_bytes for entry in found)
    left = store.size_bytes() - (freed if dry_run else 0)
    what = "would be deleted" if dry_run else "deleted"
    click.echo(f"{len(found)} entries {what}, {freed / 2**20:.1f} MiB; {left / 2**20:.1f} MiB are left")


@cache.command()
@click.option("--arch", "names", type=click.Choice(archs.names()), multiple=True, help="Compile CUBINs for this one.")
@problem_options
@click.option(
    "--for",
    "parts",
    type=click.Choice(warm.PARTS),
    multiple=True,
    help="What to compile for, any number of times; else all of it.",
)
@click.option("--softmax", is_flag=True, help="The softmax kernels too: hundreds, so minutes.")
def warmup(
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    seqlens: tuple[int, ...],
    head_dims: tuple[int, ...],
    parts: tuple[str, ...],
    softmax: bool,
) -> None:
    """Compile kernels ahead of time, so that no call has to wait for it.

    Makes the calls, whose kernels are built and not launched: forward and backward with and without a causal mask, over
    packed sequences (varlen), decoding over pages and contiguous caches, and each option of `options` with these.
    Arrays are aligned, caches of the dtype of the queries. Without --arch, for what is here: the GPU, if one answers,
    and the host executor. Without --dtype and --head-dim: float16, bfloat16, float32, and 64 and 128.

    \b
    Examples:
      cuattn-bench cache warmup --dtype bfloat16 --head-dim 128
      cuattn-bench cache warmup --for decode --dtype float16
      cuattn-bench cache warmup --arch sm_80 --arch sm_90a --for forward
    """
    store.require_usable()  # a temporary folder would be gone with this program
    targets = [compile.Target(name, "cubin") for name in names] or here()
    began = time.perf_counter()
    done: set[tuple[str, ...]] = set()
    work = list(wanted(dtypes, seqlens, head_dims, parts))
    with progress() as update:
        for index, target in enumerate(targets):
            with warm.built(target, partial(_built, done, target)) as xp:
                for place, (label, call) in enumerate(work):
                    update(index * len(work) + place, len(targets) * len(work), f"{label} {target.arch}")
                    call(xp)
            for source, constants in variants() if softmax else ():
                update(index * len(work), len(targets) * len(work), f"{source} {target.arch}")
                build(target, source, constants)
                _built(done, target, source, "", constants)
    places = ", ".join(f"{target.arch} ({target.kind})" for target in targets)
    click.echo(f"{len(done)} kernels are ready for {places}, after {time.perf_counter() - began:.1f} s")


def _built(done: set[tuple[str, ...]], target: compile.Target, source: str, entry: str, constants: Any) -> None:
    done.add((target.arch, target.kind, source, repr(tuple(constants.items()))))


def here() -> list[compile.Target]:
    """What kernels are compiled for on this machine, as a `Target`."""
    targets = [compile.Target(environment.host_arch(), "ptx")]
    capability = machine.gpu().get("compute_capability")
    if capability is not None:
        targets.insert(0, compile.for_device(divmod(int(str(capability)), 10)))
    return targets


def wanted(
    dtypes: tuple[str, ...], seqlens: tuple[int, ...], head_dims: tuple[int, ...], parts: tuple[str, ...]
) -> Iterator[warm.Call]:
    """The calls to be made."""
    chosen = parts or warm.PARTS
    if set(chosen) == {"options"}:
        chosen = (*chosen, "forward", "backward", "decode")  # options of what
    for dtype in dict.fromkeys(dtypes or DTYPES):
        for head_dim in dict.fromkeys(head_dims or HEAD_DIMS):
            yield from warm.calls(chosen, dtype, head_dim, tuple(dict.fromkeys(seqlens)))


def build(target: compile.Target, source: str, constants: dict[str, Any]) -> None:
    """Compile one kernel; on the host, translate it as well."""
    binary = compile.build(source, constants, arch=target.arch, kind=target.kind)
    if target == compile.Target(environment.host_arch(), "ptx"):
        from cuattn import host

        host.RawModule(code=binary.image.decode())
