"""`verify`: every row and option against float64, and how much of what the tolerance rule allows it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cuattn.benchmark.grids import Grid, Part

from .fuzz import hypothesis_needed, known, require
from .output import emit, form_option, progress

if TYPE_CHECKING:
    from cuattn.testing.fuzzing.verifying import Verdict

NOTE = (
    "Figures are largest errors as fractions of what the tolerance rule allows (docs/numerics.md): 1 is the limit. "
    "Where there is none, the dtype has no such option or row, or the row is for another architecture."
)


@click.command()
@click.argument("operations", nargs=-1, metavar="[OPERATION]...")
@click.option("--executor", type=click.Choice(("host", "cuda")), default="host", show_default=True, help="Where.")
@click.option(
    "--examples", type=click.IntRange(1, 10_000), default=3, show_default=True, help="Drawn calls of each option."
)
@click.option("--rows/--no-rows", default=True, show_default=True, help="The rows of the tables of kernel shapes.")
@click.option("--options/--no-options", default=True, show_default=True, help="The options, alone and together.")
@click.option("--dtype", "dtypes", multiple=True, help="Only this dtype; may be repeated.")
@form_option
def verify(
    operations: tuple[str, ...],
    executor: str,
    examples: int,
    rows: bool,
    options: bool,
    dtypes: tuple[str, ...],
    form: str,
) -> None:
    """Compare every row and option with float64.

    Each option alone, all together, each format and layout; and each row of the tables of kernel shapes at the largest
    head dims that it is for. Calls are drawn as by `cuattn-bench fuzz`, always the same ones; on the host executor with
    its checkers. The exit code is 1 if a result is wrong. Names are those of `cuattn-bench fuzz --list`; without one,
    everything is verified, which compiles some thousand kernels.

    \b
    Examples:
      cuattn-bench verify softmax rope
      cuattn-bench verify attention --dtype float16 --no-rows
      cuattn-bench verify attention_backward --no-options --format markdown
    """
    with hypothesis_needed():
        from cuattn.testing.fuzzing import judge, verifying, verifying_rows
    chosen, how = known(operations), judge.How(executor)
    require(executor)
    work: list[Any] = []
    for one in chosen:
        if options:
            work += [
                (one.name, f"{one.name}, {name}, {skeleton['dtype']}", one, name, skeleton)
                for name, skeleton in verifying.skeletons(one)
                if not dtypes or skeleton["dtype"] in dtypes
            ]
        if rows:
            found = [row for row in verifying_rows.rows(one.name) if not dtypes or row.dtype in dtypes]
            work += [(one.name, f"{one.name}, {row.name}, {row.dtype}", row, None, None) for row in found]
    if not work:
        raise click.BadParameter(f"nothing to verify in {', '.join(dtypes) or 'no rows and no options'}")
    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    interrupted = False
    with progress() as tell:
        try:
            for index, (name, label, one, of_option, skeleton) in enumerate(work):
                tell(index, len(work), label)
                if skeleton is None:
                    verdicts.setdefault((name, "rows"), []).append(one.verdict(how))
                else:
                    verdict = verifying.check(one, of_option, skeleton, how, examples)
                    verdicts.setdefault((name, "options"), []).append(verdict)
        except KeyboardInterrupt:
            interrupted = True
    emit(parts(verdicts), form)
    if interrupted:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(130)
    if any(not verdict.right for own in verdicts.values() for verdict in own):
        raise click.exceptions.Exit(1)


def parts(verdicts: dict[tuple[str, str], list[Verdict]]) -> list[Part]:
    """A table for the options of each operation and one for its rows, and what was wrong."""
    found: list[Part] = [_table(f"{name}: {kind}", own) for (name, kind), own in verdicts.items()]
    everything = [verdict for own in verdicts.values() for verdict in own]
    wrong = [verdict for verdict in everything if not verdict.right]
    found += [f"wrong: {one.operation}, {one.name}, {one.dtype}: {one.error}" for one in wrong]
    calls = sum(verdict.cases for verdict in everything)
    found.append(f"{calls:,} calls, {len(everything):,} kinds of them, {len(wrong):,} wrong. {NOTE}")
    return found


def _table(title: str, verdicts: list[Verdict]) -> Grid:
    dtypes = list(dict.fromkeys(verdict.dtype for verdict in verdicts))
    by_name: dict[str, dict[str, float | str | None]] = {}
    for verdict in verdicts:
        row = by_name.setdefault(verdict.name, dict.fromkeys(dtypes))
        row[verdict.dtype] = _cell(verdict)
    return Grid(title, ("", *dtypes), [(name, *row.values()) for name, row in by_name.items()])


def _cell(verdict: Verdict) -> float | str | None:
    if not verdict.cases:
        return None  # a row that cannot run here
    return round(verdict.margin, 3) if verdict.right else "wrong"
