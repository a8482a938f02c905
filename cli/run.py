"""`run`: suites with a progress bar, tables and JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from cuattn.benchmark import SUITES, Options, Record, Report, grids, machine, peers, require_read, tables
from cuattn.benchmark import plan as make_plan
from cuattn.benchmark.problem import ATTENTION
from cuattn.benchmark.results import write_text
from cuattn.benchmark.suite import run_steps
from cuattn.errors import ArgumentError

from .options import given, own_problem_options, problem_of
from .output import form_option, progress

INTERRUPTED = 130  # the status of a program that Ctrl-C has ended
OF_MODELS = ("attention", "decode", "backward")
GENERAL = frozenset(
    {"path", "executor", "seed", "form", "plot", "check", "full"}
)  # what every suite reads, or none need


class Peers(click.ParamType):
    """``all``, ``none``, or names of peers with commas between them."""

    name = "NAMES"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value in ("all", "none"):
            return value == "all"
        spelt = {self.slug(name): name for name in peers.names()}
        found = []
        for word in value.split(","):
            if self.slug(word) not in spelt:
                self.fail(f"{word!r} is no peer: choose from all, none, {', '.join(spelt)}", parameter, context)
            found.append(spelt[self.slug(word)])
        return tuple(found)

    @staticmethod
    def slug(name: str) -> str:
        return name.lower().replace(", ", "-").replace(" ", "-")


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(tuple(SUITES)), metavar="[SUITE]...")
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the results to this file, after every record anew.",
)
@click.option(
    "--executor",
    type=click.Choice(("auto", "host", "cuda")),
    default="auto",
    show_default=True,
    help="Where kernels run; auto is the GPU if one answers.",
)
@own_problem_options
@click.option(
    "--peers",
    type=Peers(),
    default="all",
    show_default=True,
    help="What to time as well: all that are installed (on a GPU), none, or names with commas between.",
)
@click.option("--no-peers", is_flag=True, help="The same as --peers none.")
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=0.01),
    default=0.5,
    show_default=True,
    help="Seconds for the repetitions of one problem.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random inputs.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the results too: a .png or .svg; see `cuattn-bench plot`.",
)
@click.option("--check", is_flag=True, help="Exit with status 1 if a goal is missed.")
@click.option("--full", is_flag=True, help="Show every metric, also those that are else only in the JSON.")
@form_option
@click.pass_context
def run(
    context: click.Context,
    suites: tuple[str, ...],
    path: Path | None,
    executor: str,
    dtypes: tuple[str, ...],
    seqlens: tuple[int, ...],
    head_dims: tuple[int, ...],
    models: tuple[str, ...],
    peers: bool | tuple[str, ...],
    no_peers: bool,
    budget_s: float,
    seed: int,
    plot: Path | None,
    check: bool,
    full: bool,
    form: str,
    **sizes: Any,
) -> None:
    """Run suites, print tables, write JSON.

    Without a name, the one-minute suite `smoke`; with sizes or options, `attention` or `decode`; with --model, the
    calls that read a prompt, write a token and learn. `cuattn-bench list suites` names all suites. --dtype, --seqlen,
    --head-dim and --model may be repeated. An option that a chosen suite does not read is an error.

    The exit status is 1 if a measurement of cuattn failed, or with --check if a goal was missed, and 130 after Ctrl-C,
    which keeps what has been measured.

    \b
    Examples:
      cuattn-bench run
      cuattn-bench run attention softmax --json results.json
      cuattn-bench run attention --dtype float16 --seqlen 512 --seqlen 1024 --head-dim 128
      cuattn-bench run --batch 2 --heads 16 --kv-heads 4 --seqlen 1024 --causal --window 255 --softcap 50
      cuattn-bench run decode --kv-heads 2 --seqlen 4096 --page-size 32 --splits 8 --kv-format int8
      cuattn-bench run seed --plot seed.png
      cuattn-bench run --model Llama-3-8B --seqlen 256
      cuattn-bench run attention --executor cuda --peers torch-flash,flash-attn-3
    """
    if no_peers:
        peers = False
    fields = {name: label for name, label in given(context).items() if name not in GENERAL}
    if "no_peers" in fields:
        fields["peers"] = fields.pop("no_peers")
    if models and (kept := [fields[name] for name in ("head_dims", "heads", "kv_heads") if name in fields]):
        raise click.UsageError(f"{', '.join(kept)}: the heads are the model's")
    names = suites or _suites_for(fields)
    problem = problem_of(sizes)
    options = Options(executor, dtypes, seqlens, head_dims, peers, budget_s, seed, problem, models)
    try:
        require_read(names, fields)
        make_plan(names, options)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    report_of(names, options, Output(path, form, check, full, plot))


def _suites_for(fields: dict[str, str]) -> tuple[str, ...]:
    """The suites that are meant where none is named."""
    if "models" in fields:
        return OF_MODELS
    sizes = set(fields) - {"peers", "budget_s"}
    if not sizes:
        return ("smoke",)
    return ("attention",) if sizes <= {*ATTENTION, "dtypes", "seqlens", "head_dims"} else ("decode",)


@dataclass
class Output:
    """Where the records of a run go, and what its exit status says."""

    path: Path | None = None
    form: str = "table"
    check: bool = False
    full: bool = False
    plot: Path | None = None
    records: list[Record] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    created: str = field(default_factory=machine.now)
    environment: dict[str, Any] = field(default_factory=dict)
    is_lost: bool = False  # the file could not be written once

    def open(self) -> None:
        """Write the file for the first time: a run whose results cannot be kept does not begin."""
        if self.plot is not None:
            from .plot import require_drawable

            require_drawable(self.plot)
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise click.BadParameter(f"{self.path.parent} is not a directory", param_hint="--json")
        self.environment = machine.describe()
        self.save(complete=False)

    def add(self, record: Record) -> None:
        """Keep a record."""
        self.records.append(record)
        if self.path is not None and not self.is_lost:
            try:
                self.save(complete=False)
            except click.ClickException as error:  # the disk is full: the run goes on, and the end says so again
                self.is_lost = True
                click.echo(f"Warning: {error.message}", err=True)

    def report(self, *, complete: bool) -> Report:
        """What there is so far."""
        environment = {**(self.environment or machine.describe()), "host_isa": machine.host_isa()}
        seconds = round(time.monotonic() - self.began, 2)
        return Report(environment, tuple(self.records), self.created, seconds, complete=complete)

    def save(self, *, complete: bool) -> None:
        """Write the file, whole or not at all."""
        assert self.path is not None
        try:
            write_text(self.path, self.report(complete=complete).to_json())
        except OSError as error:
            raise click.ClickException(f"cannot write {self.path}: {error.strerror}") from error

    def show(self, *, complete: bool) -> Report:
        """Print what there is, in the form asked for."""
        report = self.report(complete=complete)
        console = Console()
        if self.form == "json":
            click.echo(json.dumps(json.loads(report.to_json()), ensure_ascii=False))
        elif self.form == "csv":
            grids.write(console, [tables.flat(report)], "csv")
        else:
            grids.write(console, tables.parts(report, full=self.full), self.form)
        if self.plot is not None and self.records:
            from cuattn.benchmark.plots import Source

            from .plot import draw_to

            draw_to(self.plot, [Source("", report)])
        if self.path is not None:
            self.save(complete=complete)
            Console(stderr=True).print(f"written to {self.path}", soft_wrap=True, markup=False, highlight=False)
        return report


def report_of(suites: Sequence[str], options: Options | None = None, output: Output | None = None) -> None:
    """Run suites, print their tables, write their JSON; the exit status says what went wrong."""
    output = output or Output()
    steps = make_plan(suites, options)
    output.open()
    try:
        with progress() as update:
            run_steps(steps, progress=update, on_record=output.add)
    except KeyboardInterrupt:
        output.show(complete=False)
        click.echo(f"interrupted after {len(output.records)} records, which are kept", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    report = output.show(complete=True)
    if report.failures or (output.check and report.missed):
        raise click.exceptions.Exit(1)
