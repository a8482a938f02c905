"""`doctor`: what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

from collections import Counter

import click
from rich.console import Console
from rich.text import Text

from cuattn.benchmark import doctor as doctors
from cuattn.benchmark.grids import Grid

from .output import emit, format_option

_STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red"}


@click.command()
@format_option
def doctor(form: str) -> None:
    """Say what is installed, what is missing, and how to mend it.

    Looks at packages, environment variables, the cache folder, NVRTC and its headers, the host executor, driver, GPU
    and what else runs on it. The exit status is 1 if something is broken; what is only missing is no fault.

    \b
    Examples:
      cuattn-bench doctor
      cuattn-bench doctor --json
    """
    with Console(stderr=True).status("looking, and compiling a small kernel"):
        found = doctors.examine()
    rows = [(one.what, Text(one.state, _STYLES[one.state]), one.found, one.mend) for one in found]
    counts = Counter(one.state for one in found)
    summary = ", ".join(f"{counts[state]} {state}" for state in _STYLES if counts[state])
    emit([Grid("doctor", ("what", "is", "found", "mend"), rows), summary], form, [one._asdict() for one in found])
    if counts["broken"]:
        raise click.exceptions.Exit(1)
