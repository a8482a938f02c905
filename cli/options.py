"""Options that several commands have, and those that say what a problem is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from cuattn.benchmark.models import MODELS, slug
from cuattn.benchmark.problem import Problem
from cuattn.dtypes import ELEMENTS
from cuattn.estimate import GPUS
from cuattn.formats import KV_FORMATS
from cuattn.head_dims import MAX_HEAD_DIM

POSITIVE = click.IntRange(min=1)


class Window(click.ParamType):
    """``LEFT`` or ``LEFT,RIGHT``: keys that a query sees before and behind its own; ``inf`` is all of them."""

    name = "LEFT[,RIGHT]"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        sides = str(value).split(",")
        if len(sides) > 2 or not all(side == "inf" or side.isdecimal() for side in sides):
            self.fail(f"{value!r} is not LEFT or LEFT,RIGHT: numbers of keys, or inf for all", parameter, context)
        left, right = (None if side == "inf" else int(side) for side in [*sides, "0"][:2])
        return left, right


class OneOf(click.ParamType):
    """One of some names, in capitals or not; messages and help spell them as they are."""

    name = "NAME"

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        for name in self.names:
            if slug(name) == slug(str(value)):
                return name
        self.fail(f"{value!r} is not one of {', '.join(map(repr, self.names))}", parameter, context)


class Axes(click.ParamType):
    """The axes of a bias or mask: some of ``bhnm``, in this order."""

    name = "AXES"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if not value or list(value) != sorted(set(value), key="bhnm".find) or set(value) - set("bhnm"):
            self.fail(f"{value!r} is not a part of bhnm, in this order", parameter, context)
        return value


SWEEP = (
    click.option("--dtype", "dtypes", type=click.Choice(tuple(ELEMENTS)), multiple=True, help="Element type."),
    click.option("--seqlen", "seqlens", type=POSITIVE, multiple=True, help="Sequence, row or context length."),
    click.option("--head-dim", "head_dims", type=click.IntRange(1, MAX_HEAD_DIM), multiple=True, help="Head dim."),
)
ONE_PROBLEM = (
    click.option("--batch", type=POSITIVE, help="Sequences."),
    click.option("--heads", type=POSITIVE, help="Query heads."),
    click.option("--kv-heads", type=POSITIVE, help="Key/value heads."),
    click.option("--seqlen-k", type=POSITIVE, help="Keys, where they are not as many as queries."),
    click.option("--head-dim-v", type=click.IntRange(1, MAX_HEAD_DIM), help="Columns of the values."),
    click.option("--causal/--no-causal", default=None, help="With or without a causal mask; else both."),
    click.option("--scale", type=float, help="Of the logits."),
    click.option("--window", type=Window(), help="Keys that a query sees before and behind its own; inf: all."),
    click.option("--chunk", type=POSITIVE, help="Attention within chunks of so many positions."),
    click.option("--softcap", type=click.FloatRange(min=0, min_open=True), help="Bound of the logits."),
    click.option("--alibi", is_flag=True, default=None, help="ALiBi slopes."),
    click.option("--sinks", is_flag=True, default=None, help="A sink for each head."),
    click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="Probability of dropout."),
    click.option("--bias", type=Axes(), help="A bias with these of the axes bhnm."),
    click.option("--mask", type=Axes(), help="A random mask with these of the axes bhnm."),
    click.option("--precision", type=click.Choice(("ieee", "tf32", "fp8")), help="Of the products."),
    click.option("--queries", type=POSITIVE, help="Decoding: queries of a sequence."),
    click.option("--page-size", type=click.IntRange(min=0), help="Decoding: tokens a page; 0: no pages."),
    click.option("--splits", type=POSITIVE, help="Decoding: parts of the keys."),
    click.option("--kv-format", type=click.Choice(tuple(KV_FORMATS)), help="Decoding: format of the cache."),
)
GPU = click.option(
    "--gpu",
    type=OneOf(GPUS),
    default="H200",
    show_default=True,
    help=f"Whose data sheet: {', '.join(GPUS)}.",
)
MODEL = click.option(
    "--model", "models", type=OneOf(MODELS), multiple=True, help=f"The calls of a model: {', '.join(MODELS)}."
)


def problem_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--dtype``, ``--seqlen`` and ``--head-dim``, each any number of times."""
    return _with(SWEEP, command)


def own_problem_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Everything that says what a problem is, and ``--model``."""
    return _with((*SWEEP, *ONE_PROBLEM, MODEL), command)


def _with(options: tuple[Callable[..., Any], ...], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def problem_of(values: Mapping[str, Any]) -> Problem:
    """The problem that the values of a command's options are."""
    return Problem(**{field.name: values[field.name] for field in dataclasses.fields(Problem)})


def given(context: click.Context) -> dict[str, str]:
    """Name of each value that the user gave to how the option is spelt."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if isinstance(parameter, click.Option) and source is click.core.ParameterSource.COMMANDLINE:
            found[str(parameter.name)] = parameter.opts[0]
    return found
