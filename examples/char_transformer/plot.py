"""The losses of both runs, and below them how far they are apart, as an image. Needs matplotlib: the extra "plot"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

#: Colors that color-blind readers tell apart (Okabe and Ito, 2008).
COLORS = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999", "#f0e442"
RING_COLOR = "#d55e00"
RINGS = "float64, NumPy reference"


class PlotError(RuntimeError):
    """The plot cannot be saved at this path."""


class NoMatplotlibError(PlotError):
    """matplotlib is not installed."""


def check(path: Path) -> None:
    """Raise now what `save` would raise after minutes of training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoMatplotlibError("matplotlib is not installed; get it with: pip install '.[plot]'") from None
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise PlotError(f"{path} does not end in a format that matplotlib writes: {', '.join(sorted(formats))}")
    if path.is_dir() or not path.parent.is_dir():
        raise PlotError(f"cannot write {path}: {'it is a folder' if path.is_dir() else f'there is no {path.parent}'}")


def save(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, kernel_label: str
) -> None:
    """Draw the losses of both runs of each kind of attention, a value for each step, and write the image to `path`."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    several = len(curves) > 1
    for (name, (kernel, float64)), color in zip(curves.items(), COLORS, strict=False):
        steps = np.arange(len(kernel))
        difference = np.abs(np.subtract(kernel, float64))
        above.plot(steps, kernel, color=color, linewidth=1.4, label=name if several else kernel_label)
        # The curves lie on each other, so this one is rings: a few of them, through which the line is seen.
        rings = max(1, len(kernel) // 40)
        style = {"linestyle": "none", "marker": "o", "markersize": 6, "markerfacecolor": "none", "markevery": rings}
        above.plot(steps, float64, color=color if several else RING_COLOR, label=None if several else RINGS, **style)
        visible = np.where(difference > 0, difference, np.nan)
        below.semilogy(steps, visible, ".", color=color if several else "black", markersize=3)
    if several:
        above.plot([], [], color="black", linewidth=1.4, label=kernel_label)
        above.plot([], [], color="black", label=RINGS, linestyle="none", marker="o", markerfacecolor="none")
    above.set_ylabel("cross entropy\n(nats per character)")
    above.set_ylim(bottom=0)
    above.set_title(title)
    above.legend(frameon=False)
    below.set_ylabel("|difference|\n(nats per character)")
    below.set_xlabel("training step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error.strerror}") from error
