"""`run`: suites with a progress bar, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from cuattn.benchmark import SUITES, Options, run_suite, tables
from cuattn.benchmark.results import write_text

from .options import problem_options
from .output import progress


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(tuple(SUITES)), metavar="[SUITE]...")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to this file.")
@click.option(
    "--executor",
    type=click.Choice(("auto", "host", "cuda")),
    default="auto",
    show_default=True,
    help="Where kernels run; auto is the GPU if one answers.",
)
@problem_options
@click.option("--peers/--no-peers", default=True, show_default=True, help="On a GPU, time peers as well.")
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=0.01),
    default=0.5,
    show_default=True,
    help="Seconds for the repetitions of one problem.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random inputs.")
def run(
    suites: tuple[str, ...],
    path: Path | None,
    executor: str,
    dtypes: tuple[str, ...],
    seqlens: tuple[int, ...],
    head_dims: tuple[int, ...],
    peers: bool,
    budget_s: float,
    seed: int,
) -> None:
    """Run suites, print tables, write JSON.

    Without a name, the one-minute suite `smoke`; `cuattn-bench list suites` names them all. The options --dtype,
    --seqlen and --head-dim may be repeated; they choose the problems of the suites attention, backward, softmax,
    layout, decode and linear. The exit code is 1 if a measurement of cuattn failed or a goal was missed.

    \b
    Examples:
      cuattn-bench run
      cuattn-bench run attention softmax --json results.json
      cuattn-bench run attention --dtype float16 --seqlen 512 --seqlen 1024 --head-dim 128
      cuattn-bench run attention --executor cuda --no-peers
    """
    options = Options(executor, dtypes, seqlens, head_dims, peers, budget_s, seed)
    report_of(suites or ("smoke",), options, path)


def report_of(suites: Sequence[str], options: Options | None = None, path: Path | None = None) -> None:
    """Run suites, print their tables, write their JSON; exit code 1 if one failed or missed a goal."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent} is not a directory", param_hint="--json")
    with progress() as update:
        report = run_suite(suites, options=options, progress=update)
    console = Console()
    tables.show(report, console)
    if path is not None:
        try:
            write_text(path, report.to_json())
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
        console.print(f"written to {path}")
    if report.failures or report.missed:
        raise click.exceptions.Exit(1)
