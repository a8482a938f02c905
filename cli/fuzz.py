"""`fuzz`: calls of every operation, drawn and checked until the time is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.status import Status

from cuattn.benchmark.grids import Grid, Part
from cuattn.benchmark.suite import Options
from cuattn.errors import ArgumentError

from .output import emit, form_option

if TYPE_CHECKING:
    from cuattn.testing.fuzzing.engine import Failure
    from cuattn.testing.fuzzing.judge import How
    from cuattn.testing.fuzzing.operation import Operation
    from cuattn.testing.fuzzing.workers import Plan, Progress

#: Where failures go in a checkout, and elsewhere.
CORPUS, ELSEWHERE = Path("tests/corpus"), Path("fuzz-failures")
INTERVAL_S = 30.0  # of lines where there is no terminal
NEVER_SHOWN = 12  # files of which lines are named that nothing has executed


@contextmanager
def hypothesis_needed() -> Iterator[None]:
    """Say how to get what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise click.ClickException("this needs Hypothesis: pip install hypothesis") from error


def _checkers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in ("mem", "init", "race")]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of mem, init, race")
    return names


def known(operations: tuple[str, ...]) -> list[Operation]:
    """The operations of those names; a name that is none is a wrong argument."""
    from cuattn.testing.fuzzing.catalogue import choose

    try:
        return choose(operations)
    except ArgumentError as error:
        raise click.BadParameter(str(error), param_hint="OPERATION") from error


def require(executor: str) -> None:
    """Raise unless that executor answers: else every call would be taken for a wrong one."""
    Options(executor).resolved()


@click.command()
@click.argument("operations", nargs=-1, metavar="[OPERATION]...")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True, help="Time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="What is drawn follows from it.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option("--executor", type=click.Choice(("host", "cuda")), default="host", show_default=True, help="Where.")
@click.option(
    "--checkers", default="mem,init,race", show_default=True, callback=_checkers, help="Those of the host executor."
)
@click.option(
    "--schedules",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Each call again in so many random orders of warps and copies: the bits have to be the same.",
)
@click.option(
    "--save",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Where failures are saved; {CORPUS} if there is one, else {ELSEWHERE}.",
)
@click.option(
    "--replay",
    "replayed",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help="Make the calls of this file or folder again, and no others.",
)
@click.option("--list", "listed", is_flag=True, help="List the operations.")
@form_option
def fuzz(
    operations: tuple[str, ...],
    minutes: float,
    seed: int,
    workers: int,
    executor: str,
    checkers: tuple[str, ...],
    schedules: int,
    folder: Path | None,
    replayed: tuple[Path, ...],
    listed: bool,
    form: str,
) -> None:
    """Draw calls of operations, check them, shrink what fails.

    Every option, dtype, layout and awkward value is drawn, forward and backward; results are compared with float64
    under the tolerance rule of the tests, on the host executor with its checkers and in several orders of warps. What
    is drawn next follows from what has been covered. A failure is shrunk, printed as a program, and saved as a file for
    --replay. The exit code is 1 if there was one.

    \b
    Examples:
      cuattn-bench fuzz --list
      cuattn-bench fuzz --minutes 10 --workers 2
      cuattn-bench fuzz attention attention_backward --minutes 1 --seed 7 --schedules 3
      cuattn-bench fuzz --replay tests/corpus
    """
    with hypothesis_needed():
        from cuattn.testing.fuzzing import judge
        from cuattn.testing.fuzzing import workers as processes
        from cuattn.testing.fuzzing.catalogue import OPERATIONS
    if listed:
        rows = [(one.name, ", ".join(one.functions), ", ".join(one.options)) for one in OPERATIONS.values()]
        emit([Grid("what is fuzzed", ("operation", "functions", "options"), rows)], form)
        return
    known(operations)
    require(executor)
    how = judge.How(executor, checkers, schedules, seed)
    if replayed:
        again(replayed, how, form)
        return
    folder = folder or (CORPUS if CORPUS.is_dir() else ELSEWHERE)
    watch(processes.Plan(operations, 60 * minutes, seed, workers, how), folder, form)


def again(places: tuple[Path, ...], how: How, form: str) -> None:
    """Make the calls of files again; exit code 1 if one is wrong."""
    from cuattn.testing.fuzzing import corpus, judge
    from cuattn.testing.fuzzing.engine import describe

    rows, wrong = [], 0
    for place in places:
        for path in corpus.files(place):
            case = corpus.load(path)
            try:
                outcome = judge.run(case, how)
                rows.append((path.name, case.operation, "right", f"{outcome.margin:.3f} of what is allowed"))
            except Exception as error:
                wrong += 1
                rows.append((path.name, case.operation, "wrong", describe(error)))
    columns = ("file", "operation", "result", "largest error, or what is wrong")
    emit([Grid("replayed", columns, rows), f"{wrong} of {len(rows)} wrong"], form)
    if wrong:
        raise click.exceptions.Exit(1)


def watch(plan: Plan, folder: Path, form: str) -> None:
    """Fuzz, say how far it is, save failures, and sum up, after Ctrl-C too."""
    from cuattn.testing.fuzzing import corpus, workers

    err, last, interrupted = Console(stderr=True), None, False
    try:
        with _teller(err, plan) as tell, closing(workers.fuzz(plan)) as told:
            for progress in told:
                last = progress
                tell(progress)
                if progress.failure is not None:
                    path = corpus.save(folder, progress.failure)
                    click.echo(_told(progress.failure, path))
    except KeyboardInterrupt:
        interrupted = True
    if last is not None:
        emit(summary(last, plan), form)
    if interrupted:
        err.print("interrupted")
        raise click.exceptions.Exit(130)
    if last is not None and last.failures:
        raise click.exceptions.Exit(1)


@contextmanager
def _teller(err: Console, plan: Plan) -> Iterator[Any]:
    """Yield what says how far it is: one line that changes, or one every half minute where there is no terminal."""
    if err.is_terminal:
        with Status("starting", console=err) as status:
            yield lambda progress: status.update(line(progress, plan))
        return
    told = time.monotonic()
    operations, workers = counted(len(_operations(plan)), "operation"), counted(plan.workers, "worker")
    click.echo(f"{operations}, seed {plan.seed}, {workers}, {_minutes(plan.seconds)}", err=True)

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= INTERVAL_S:
            told = time.monotonic()
            click.echo(line(progress, plan), err=True)

    yield tell


def line(progress: Progress, plan: Plan) -> str:
    """How far it is, in one line."""
    coverage = progress.coverage
    rate = progress.cases / progress.seconds if progress.seconds else 0.0
    done, total = coverage.option_pairs(_operations(plan))
    cases, kernels = counted(progress.cases, "case"), counted(len(coverage.kernels), "kernel")
    return (
        f"{_minutes(progress.seconds)} of {_minutes(plan.seconds)}: {cases}, {rate:.1f} a second; "
        f"{done:,} of {total:,} pairs of options, {kernels}, {_lines(progress)} lines of them; "
        f"{counted(len(progress.failures), 'failure')}"
    )


def counted(number: int, noun: str) -> str:
    """A number of things: ``"1 case"``, ``"2 cases"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _operations(plan: Plan) -> Any:
    from cuattn.testing.fuzzing.catalogue import choose

    return choose(plan.operations)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _lines(progress: Progress) -> str:
    code, done = progress.coverage.lines_of_code, progress.coverage.lines
    return f"{len(code & done.keys()):,} of {len(code):,}"


def _told(failure: Failure, path: Path) -> str:
    cut = "" if failure.whole else " (shrinking was cut off)"
    return f"\n{failure.error}{cut}\n\n{failure.case.snippet()}\n\nsaved: cuattn-bench fuzz --replay {path}\n"


def summary(progress: Progress, plan: Plan) -> list[Part]:
    """Tables of what was done: a line an operation, and a line for each kernel file."""
    coverage, rows = progress.coverage, []
    for one in _operations(plan):
        done, total = coverage.option_pairs([one])
        dtypes = sorted(dtype for name, dtype in coverage.dtypes if name == one.name)
        margin = coverage.margins.get(one.name)
        cases, pairs = coverage.cases[one.name], f"{done} of {total}" if total else "–"
        rows.append((one.name, cases, ", ".join(dtypes), pairs, None if margin is None else round(margin, 3)))
    names = ("operation", "cases", "dtypes", "pairs of options", "largest error, of what is allowed")
    parts: list[Part] = [Grid("operations", names, rows)]
    if coverage.lines_of_code:
        parts.append(Grid("lines of kernels", ("file", "lines", "executed", "never"), _by_file(progress)))
    parts.append(line(progress, plan))
    return parts


def _by_file(progress: Progress) -> list[tuple[str, int, int, str]]:
    code, done = progress.coverage.lines_of_code, progress.coverage.lines
    files = Counter(where.partition(":")[0] for where in code)
    rows = []
    for file, count in sorted(files.items()):
        own = {where for where in code if where.partition(":")[0] == file}
        never = sorted(int(where.partition(":")[2] or 0) for where in own - done.keys())
        named = ", ".join(map(str, never[:NEVER_SHOWN])) + (", …" if len(never) > NEVER_SHOWN else "")
        rows.append((file, count, count - len(never), named))
    return rows
