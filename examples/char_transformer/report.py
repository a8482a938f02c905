"""What the example prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from .training import Run

# Training can multiply what rounding changed in its first step, more so the longer it goes on. So the losses are
# compared over as many steps as the default has, and only shown from there on.
COMPARED_STEPS = 400
# The largest difference allowed there, in nats, by the dtype of attention: ten times what some seeds gave, or more.
BOUNDS = {"float64": 1e-13, "float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}
LAST_STEPS = 20  # the loss of one batch jumps about; this many are averaged

PROGRESS_HEADER = f"{'step':>5}  {'kernels':>8}  {'float64':>8}  {'difference':>10}"


def progress_line(kernel: Run, float64: Run) -> str:
    """Return the losses of the newest step, and the time that the others will take at the pace so far."""
    done, loss, expected = len(kernel.losses), kernel.losses[-1], float64.losses[-1]
    left_s = (kernel.time_s + float64.time_s) / done * (kernel.steps - done)
    return f"{done - 1:5}  {loss:8.4f}  {expected:8.4f}  {abs(loss - expected):10.1e}  about {left_s:.0f} s left"


def largest_difference(kernel: Run, float64: Run) -> float:
    """Return the largest difference of the losses over the steps that are compared; NaN if one of them is."""
    return float(np.abs(np.subtract(kernel.losses, float64.losses))[:COMPARED_STEPS].max())


def summary(runs: Mapping[str, Run]) -> Table:
    """Return one row for each run, by the name that it has in the table."""
    table = Table(title=f"loss in nats per character (last: mean of {LAST_STEPS} steps), and time of training")
    table.add_column("attention", no_wrap=True)
    for name in ("first loss", "last loss", "time", "a step"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run.losses[0]:.4f}",
            f"{np.mean(run.losses[-LAST_STEPS:]):.4f}",
            f"{run.time_s:.1f} s",
            f"{run.time_s / len(run.losses) * 1e3:.0f} ms",
        )
    return table


def agreeing(written: str, text: str) -> int:
    """Count the characters that two texts have in common from their start."""
    pairs = zip(written, text, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
