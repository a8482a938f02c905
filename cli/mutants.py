"""`mutants`: do the tests of a kernel notice a kernel that is wrong?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
from rich.text import Text

from cuattn.benchmark.grids import Grid, Part
from cuattn.testing.mutation import Edit, Outcome, Source, Trial, in_turn

from .output import emit, format_option, progress

_STYLES = {"survived": "bold red", "killed": "green", "hung": "green", "discarded": "dim"}
Tried = list[tuple[Edit, Outcome]]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("kernel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option(
    "--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".", help="What to copy."
)
@click.option("--sample", type=click.IntRange(min=0), default=20, show_default=True, help="Mutants; 0 is all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of their choice.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0.1), help="Seconds of a run; else 10 times the first."
)
@click.option("--list", "only_list", is_flag=True, help="Show the mutants; run nothing.")
@click.option("--fail", is_flag=True, help="Exit with status 1 if a mutant survives.")
@format_option
def mutants(
    kernel: Path,
    command: tuple[str, ...],
    root: Path,
    sample: int,
    seed: int,
    timeout_s: float | None,
    only_list: bool,
    fail: bool,
    form: str,
) -> None:
    """Edit a kernel in small wrong ways, and see whether its tests notice.

    KERNEL is a CUDA file of yours, COMMAND what tests it: status 0 is that nothing was noticed. The folder --root
    (where you are) is copied, and all happens in the copy. First the command has to succeed on the file as it is, and
    to fail without it. A mutant that does not compile is discarded, and another one taken in its place. For the kernels
    of cuattn itself, python -m bench.mutants in a checkout knows which tests run which kernel.

    \b
    Examples:
      cuattn-bench mutants KERNEL --list
      cuattn-bench mutants KERNEL --sample 50 -- pytest -x tests
    """
    source = Source.of(kernel.name, kernel.read_text(encoding="utf-8"))
    edits = in_turn(source, seed)
    if not edits:
        raise click.ClickException(f"{kernel} has nothing to edit")
    if only_list:
        chosen = edits[: sample or None]
        emit(
            [Grid(f"{kernel.name}: {len(chosen)} of {len(edits)} mutants", COLUMNS, [row(source, x) for x in chosen])],
            form,
        )
        return
    if not command:
        raise click.UsageError("say how to test the kernel: -- COMMAND...")
    tried: Tried = []
    try:
        with Trial(root, kernel, command, timeout_s=timeout_s) as trial, progress() as update:
            wanted = min(sample or len(edits), len(edits))
            update(0, wanted, "as it is, and without it")
            trial.baseline()
            for edit in edits:
                counting = sum(outcome.status != "discarded" for _, outcome in tried)
                if counting >= wanted:
                    break
                update(counting, wanted, f"line {source.line_of(edit.start)}: {edit.operator}")
                tried.append((edit, trial.run(edit.apply(source.text))))
    finally:  # Ctrl-C keeps what there is
        if tried:
            emit(parts(source, tried), form)
    if fail and any(outcome.status == "survived" for _, outcome in tried):
        raise click.exceptions.Exit(1)


COLUMNS = ("line", "operator", "before", "after")


def row(source: Source, edit: Edit) -> tuple[int, str, str, str]:
    """The line that an edit changes, before and after."""
    first, last = source.text.rfind("\n", 0, edit.start) + 1, source.text.find("\n", edit.end)
    last = len(source.text) if last < 0 else last
    after = source.text[first : edit.start] + edit.replacement + source.text[edit.end : last]
    return source.line_of(edit.start), edit.operator, " ".join(source.text[first:last].split()), " ".join(after.split())


def parts(source: Source, tried: Tried) -> list[Part]:
    """A line a mutant, those that survived first, and how many were noticed."""
    ordered = sorted(tried, key=lambda pair: (pair[1].status != "survived", source.line_of(pair[0].start)))
    rows = [
        (*row(source, edit), Text(outcome.status, _STYLES[outcome.status]), outcome.seconds)
        for edit, outcome in ordered
    ]
    counts = Counter(outcome.status for _, outcome in tried)
    noticed, counting = counts["killed"] + counts["hung"], sum(counts.values()) - counts["discarded"]
    return [
        Grid(source.name, (*COLUMNS, "fate", "seconds"), rows),
        f"{noticed} of {counting} mutants were noticed; {counts['discarded']} did not compile",
    ]
