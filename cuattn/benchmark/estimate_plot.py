"""Memory and time of a model over context length, as a picture. By formulas: nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cuattn import estimate
from cuattn.errors import ArgumentError, NotSupportedError

__all__ = ["draw", "lengths"]

SHORTEST, LONGEST = 256, 131_072
SUFFIXES = (".png", ".svg", ".pdf")


def lengths(seqlen: int) -> list[int]:
    """Context lengths to draw: powers of two, up to 131,072 or to that of the problem."""
    found, n = [], SHORTEST
    while n <= max(LONGEST, seqlen):
        found.append(n)
        n *= 2
    return found


def draw(path: Path, model: str, *, batch: int, seqlen: int, formats: Sequence[str], dtype: str, gpu: str) -> None:
    """Draw two panels: bytes of weights and cache by format beside the GPU's memory, and time at best.

    Raises
    ------
    NotSupportedError
        There is no Matplotlib.
    ArgumentError
        The file cannot be written, or has another suffix than those of pictures.
    """
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"{path} is no name of a picture; allowed are names that end with {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotSupportedError("pictures need Matplotlib: pip install 'cuattn[plot]'") from error
    config, card = estimate.model(model), estimate.GPUS[gpu]
    weights, at = estimate.weight_bytes(config, dtype), lengths(seqlen)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for name in formats:
        held = [(weights + estimate.kv_cache_bytes(config, batch, n, name)) / 1e9 for n in at]
        memory.plot(at, held, marker=".", label=f"weights and {name} cache")
    memory.axhline(weights / 1e9, color="gray", linestyle=":", label=f"weights, {dtype}")
    memory.axhline(card.memory_bytes / 1e9, color="black", linestyle="--", label=f"memory of {gpu}")
    memory.set(title="memory", ylabel="GB", ylim=(0, None))
    for phase, name in (("prefill", "prefill of all tokens"), ("decode", "one more token")):
        milliseconds = []
        for n in at:
            work = estimate.flops(config, batch, n, causal=True, phase=phase, logits=1)  # type: ignore[arg-type]
            moved = weights + estimate.kv_cache_bytes(config, batch, n, formats[0])
            milliseconds.append(1e3 * estimate.roofline(gpu, work, moved).time_s)
        time.plot(at, milliseconds, marker=".", label=name)
    time.set(title=f"time at best on {gpu}, by its data sheet", ylabel="ms", yscale="log")
    for axes in (memory, time):
        axes.set(xlabel="tokens of each sequence", xscale="log")
        axes.set_xticks(at, [f"{n // 1024}k" if n >= 1024 else str(n) for n in at])
        axes.minorticks_off()
        axes.axvline(seqlen, color="gray", linewidth=0.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{model}, batch {batch}: by formulas, nothing measured")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror}") from error
