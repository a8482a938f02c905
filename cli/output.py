"""What commands print: tables on a terminal, plain text elsewhere, or the form that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from cuattn.benchmark import grids, tables
from cuattn.benchmark.suite import Progress


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--format``, and ``--json`` as a short way to say ``--format json``; the command gets ``form``."""

    def set_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.params["form"] = "json"

    short = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=set_json,
        help="The same as --format json.",
    )
    return form_option(short(command))


def form_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--format`` alone."""

    def keep(context: click.Context, parameter: click.Parameter, value: str) -> str:
        return str(context.params.get("form") or value)

    option = click.option(
        "--format",
        "form",
        type=click.Choice(grids.FORMATS),
        default="table",
        show_default=True,
        callback=keep,
        help="How to print what there is.",
    )
    return option(command)


def emit(parts: Sequence[grids.Part], form: str, data: Any = None) -> None:
    """Print tables and lines in the form asked for; `data` is what JSON says instead of the tables, if given."""
    if form == "json" and data is not None:
        click.echo(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        grids.write(Console(), parts, form)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on standard error, as a function of seconds done, seconds in all, and a label."""
    with tables.progress(Console(stderr=True)) as update:
        yield update
