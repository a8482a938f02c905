"""`explain`: how a call of attention would run on a GPU, and what bounds it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from cuattn.benchmark.explained import Explanation
from cuattn.benchmark.explained import explain as explained
from cuattn.benchmark.grids import Grid
from cuattn.dtypes import ELEMENTS
from cuattn.estimate import GPUS
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.testing.attention_cases import AttentionCase

from .options import GPU, Window
from .output import emit, format_option

POSITIVE = click.IntRange(min=1)
DTYPES = (*ELEMENTS, "float8_e4m3fn", "float8_e5m2")


@click.command()
@click.option("--batch", type=POSITIVE, default=1, show_default=True, help="Sequences.")
@click.option("--heads", type=POSITIVE, default=16, show_default=True, help="Query heads.")
@click.option("--kv-heads", type=POSITIVE, help="Key/value heads; as many as query heads by default.")
@click.option("--seqlen", type=POSITIVE, default=4096, show_default=True, help="Queries.")
@click.option("--seqlen-k", type=POSITIVE, help="Keys; as many as queries by default.")
@click.option("--head-dim", type=click.IntRange(1, MAX_HEAD_DIM), default=128, show_default=True, help="Head dim.")
@click.option("--head-dim-v", type=click.IntRange(1, MAX_HEAD_DIM), help="That of values, where it is another.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Element type.")
@click.option("--causal", is_flag=True, help="Hide later keys.")
@click.option("--window", type=Window(), help="Keys that a query sees before and behind its own; inf: all.")
@click.option("--chunk", type=POSITIVE, help="Tokens of a piece that sees itself alone.")
@click.option("--softcap", type=click.FloatRange(min=0, min_open=True), help="Bound of the logits.")
@click.option("--alibi", is_flag=True, help="With slopes.")
@click.option("--sinks", is_flag=True, help="With a sink for each head.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Probability.")
@click.option(
    "--precision", type=click.Choice(("ieee", "tf32", "fp8")), help="How float32 or 8-bit floats are multiplied."
)
@GPU
@format_option
def explain(form: str, gpu: str, **problem: Any) -> None:
    """Say how a call of attention would run on a GPU.

    Which kernel and which row of its table, why, the launch, registers and occupancy, the work, and what bounds it.
    Nothing runs; the kernel is compiled for the GPU's architecture. Times are what its data sheet allows at best.

    \b
    Examples:
      cuattn-bench explain --seqlen 8192 --heads 32 --kv-heads 8 --causal
      cuattn-bench explain --seqlen 1 --seqlen-k 4096 --batch 8 --gpu A100
      cuattn-bench explain --dtype float32 --head-dim 64 --window 256,0 --gpu RTX-4090
    """
    found = explained(case_of(**problem), gpu)
    emit([grid(found)], form, as_json(found))


def case_of(
    batch: int,
    heads: int,
    kv_heads: int | None,
    seqlen: int,
    seqlen_k: int | None,
    head_dim: int,
    head_dim_v: int | None,
    dropout: float,
    **options: Any,
) -> AttentionCase:
    """The case that the options of the command line say."""
    if heads % (kv_heads or heads):
        raise click.BadParameter(f"{heads} heads are no multiple of {kv_heads}", param_hint="--kv-heads")
    window = options.pop("window") or None
    shape = (batch, seqlen, heads, head_dim, seqlen_k, kv_heads, head_dim_v)
    return AttentionCase(*shape, dropout_p=dropout, window=window, **options)


def grid(found: Explanation) -> Grid:
    """The answer as a table of two columns."""
    case, path, of = found.case, found.path, GPUS[found.gpu]
    row, roof = path.row, found.roofline
    q, k, v = (case.shapes[name] for name in "qkv")
    waves = "" if found.waves is None else f"; {found.waves:.2f} times what runs at once on {of.sms} multiprocessors"
    ceiling, units = found.ceiling
    compute, memory = found.flops / ceiling, found.least_bytes / of.bytes_per_s
    rows: list[tuple[str, str]] = [
        ("problem", f"q {list(q)}, k {list(k)}, v {list(v)}, {case.dtype}"),
        ("kernel", f"{path.kernel}, compiled with {path.options.label} for {path.arch}"),
        ("why", path.reason),
        ("row", f"tiles of {row.block_m} queries and {row.block_n} keys; {_fields(row)}"),
        ("launch", f"{found.num_ctas:,} CTAs of {found.num_threads} threads{waves}"),
        ("shared memory", f"{found.smem_bytes:,} bytes a CTA, of {_smem_limit(path.arch):,}"),
        ("registers", _registers(found)),
        ("work", f"{found.flops:,} FLOPs"),
        ("bytes", f"{found.least_bytes:,} at least; {found.asked_bytes:,} are asked for, caches answer the rest"),
        ("intensity", f"{roof.intensity:,.0f} FLOPs a byte; bound by arithmetic from {roof.ridge:,.0f} on"),
        ("arithmetic", f"{_time(compute)} at {ceiling / 1e12:,.4g} TFLOP/s ({units})"),
        ("memory", f"{_time(memory)} at {of.bytes_per_s / 1e9:,.0f} GB/s"),
        ("bound", f"{roof.bound}: {_time(roof.time_s)} at best"),
    ]
    return Grid(f"attention on {found.gpu}, by its data sheet", ("what", "value"), rows)


def _fields(row: Any) -> str:
    skipped = ("block_m", "block_n")
    return ", ".join(f"{name} {value}" for name, value in asdict(row).items() if name not in skipped)


def _smem_limit(arch: str) -> int:
    from cuattn import compile

    return compile.smem_limit_bytes(arch)


def _registers(found: Explanation) -> str:
    if found.registers is None or found.occupancy is None:
        return "unknown: no NVRTC to compile with"
    spills = f"{found.spill_bytes} bytes spilled" if found.spill_bytes else "none spilled"
    return (
        f"{found.registers} a thread, {spills}; {found.ctas_per_sm} CTAs a multiprocessor, "
        f"{found.occupancy:.0%} of its warps"
    )


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:,.2f} ms"


def as_json(found: Explanation) -> dict[str, Any]:
    """The answer for programs."""
    path = found.path
    names = ("num_ctas", "num_threads", "smem_bytes", "registers", "spill_bytes", "ctas_per_sm", "occupancy")
    return {
        "case": found.case.name,
        "gpu": found.gpu,
        "kernel": path.kernel,
        "arch": path.arch,
        "reason": path.reason,
        "row": asdict(path.row),
        "constants": found.constants,
        **{name: getattr(found, name) for name in (*names, "waves", "flops", "least_bytes", "asked_bytes")},
        "roofline": found.roofline._asdict(),
    }
