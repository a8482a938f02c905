"""`estimate`: what a model costs, by formulas: parameters, memory, FLOPs, traffic, time at best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cuattn import estimate as of
from cuattn.benchmark.grids import FORMATS as FORMS
from cuattn.benchmark.grids import Grid, Part

from .options import GPU, OneOf
from .output import emit


@click.command(epilog=f"MODEL is one of {', '.join(of.MODELS)}.")
@click.argument("model", type=OneOf(of.MODELS), metavar="MODEL")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option("--seqlen", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of each.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(tuple(of.FORMATS)),
    multiple=True,
    help="Formats of the cache; by default bfloat16 and all narrower ones.",
)
@click.option(
    "--dtype", type=click.Choice(tuple(of.FORMATS)), default="bfloat16", show_default=True, help="Format of weights."
)
@GPU
@click.option("--plot", "path", type=click.Path(dir_okay=False, path_type=Path), help="Draw it over context length.")
@click.option("--as", "form", type=click.Choice(FORMS), default="table", show_default=True, help="How to print it.")
def estimate(
    model: str,
    batch: int,
    seqlen: int,
    formats: tuple[str, ...],
    dtype: str,
    gpu: str,
    path: Path | None,
    form: str,
) -> None:
    """Say what a model costs: parameters, cache, FLOPs, traffic, time.

    By formulas, in whole numbers; nothing runs. Times are the least that a GPU's data sheet allows: weights and cache
    read once, products at its full speed.

    \b
    Examples:
      cuattn-bench estimate Llama-3-8B
      cuattn-bench estimate Llama-3-70B --batch 16 --seqlen 32768 --gpu H200 --format e4m3fn
      cuattn-bench estimate SmolLM2-135M --seqlen 8192 --plot smollm2.png
    """
    formats = formats or ("bfloat16", "e4m3fn", "int8", "nvfp4", "mxfp4")
    if path is not None:
        from cuattn.benchmark import estimate_plot

        estimate_plot.draw(path, model, batch=batch, seqlen=seqlen, formats=formats, dtype=dtype, gpu=gpu)
    parts = tables(model, batch, seqlen, formats, dtype, gpu)
    emit([*parts, f"drawn to {path}"] if path is not None else parts, form)


def tables(model: str, batch: int, seqlen: int, formats: tuple[str, ...], dtype: str, gpu: str) -> list[Part]:
    """Tables of the model, of its memory by format of the cache, and of its work."""
    config, card = of.model(model), of.GPUS[gpu]
    parameters, weights = of.parameters(config), of.weight_bytes(config, dtype)
    shape = (
        f"{config.layers} layers of width {config.hidden}, {config.heads} heads and {config.num_kv_heads} for keys and "
        f"values, head dim {config.head_dim}, {'gated ' if config.gated else ''}feed-forward {config.ffn_width}, "
        f"vocabulary {config.vocab:,}"
    )
    what: list[tuple[Any, ...]] = [("shape", shape), ("parameters", parameters), (f"weights, {dtype}, bytes", weights)]
    memory = []
    for name in formats:
        cache = of.kv_cache_bytes(config, batch, seqlen, name)
        a_token = of.kv_cache_bytes(config, 1, 1, name)
        total = weights + cache
        fits = "yes" if total <= card.memory_bytes else f"no, {total / card.memory_bytes:.1f} times"
        memory.append((name, a_token, cache, total, fits))
    cached = of.kv_cache_bytes(config, batch, seqlen, formats[0])
    rows = []
    for phase, bytes_moved in (("prefill", weights + cached), ("decode", weights + cached)):
        logits = 1
        work = of.flops(config, batch, seqlen, causal=True, phase=phase, logits=logits)  # type: ignore[arg-type]
        roof = of.roofline(gpu, work, bytes_moved)
        tokens = batch * (seqlen if phase == "prefill" else 1)
        rows.append((phase, work, bytes_moved, roof.intensity, 1e3 * roof.time_s, roof.bound, tokens / roof.time_s))
    block_m = 128
    head_dim = config.head_dim or 0
    traffic = of.attention_traffic(seqlen, seqlen, head_dim, head_dim, 2, block_m)
    heads = batch * config.heads
    names = ("", "standard", f"tiles of {block_m} queries", "least")
    held = of.attention_memory(batch, config.heads, seqlen, seqlen, head_dim, kv_heads=config.num_kv_heads)
    moved = [
        ("bytes moved", *(heads * value for value in traffic)),
        ("bytes held", held.standard, held.flash, held.flash),
    ]
    title = f"{model}, batch {batch}, {seqlen:,} tokens"
    columns = ("format of the cache", "bytes a token", "cache, bytes", "with weights", f"fits into {gpu}")
    work_columns = ("", "FLOPs", "bytes", "FLOPs a byte", "ms at best", "bound by", "tokens a second at best")
    return [
        Grid(title, ("what", "value"), what),
        Grid("memory", columns, memory),
        Grid(f"work on {gpu}, by its data sheet: weights and a {formats[0]} cache once", work_columns, rows),
        Grid("attention of one layer, not causal, 16 bits", names, moved),
    ]
