"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cuattn.dtypes import ELEMENTS
from cuattn.head_dims import MAX_HEAD_DIM


def problem_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--dtype``, ``--seqlen`` and ``--head-dim``, each any number of times."""
    for option in (
        click.option("--head-dim", "head_dims", type=click.IntRange(1, MAX_HEAD_DIM), multiple=True, help="Head dim."),
        click.option("--seqlen", "seqlens", type=click.IntRange(min=1), multiple=True, help="Sequence or row length."),
        click.option("--dtype", "dtypes", type=click.Choice(tuple(ELEMENTS)), multiple=True, help="Element type."),
    ):
        command = option(command)
    return command
