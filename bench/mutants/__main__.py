"""The command: make mutants, try them, keep what became of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.mutants import report, runner, tests_of
from bench.mutants.runner import DISCARDED, Laboratory, Mutant, Result
from cuattn.benchmark.results import write_text
from cuattn.compile.expand import KERNELS

RESULTS = tests_of.ROOT / "bench/mutants/results.json"
WORK = tests_of.ROOT / "build/mutants"


def kernel_files() -> list[str]:
    """Every kernel file, headers included."""
    return sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cu*"))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kernel", "kernels", multiple=True, help="Only files whose name (without suffix) matches this pattern.")
@click.option("--list", "only_list", is_flag=True, help="Show the mutants; run nothing.")
@click.option("--sample", type=click.IntRange(min=0), default=20, show_default=True, help="Mutants a file; 0 is all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of their choice.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Mutants at a time.")
@click.option("--cap", "cap_s", type=float, default=120.0, show_default=True, help="Seconds of tests a mutant.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="The result file.")
@click.option("--retry", is_flag=True, help="Try again those that survived, after adding a test.")
@click.option(
    "--tests", multiple=True, default=("*",), help="Only test files whose name matches: to retry with a new one."
)
@click.option("--page", is_flag=True, help="Run nothing: write the table of docs/mutants.md from the result file.")
def main(
    kernels: tuple[str, ...],
    only_list: bool,
    sample: int,
    seed: int,
    jobs: int,
    cap_s: float,
    out: Path,
    retry: bool,
    tests: tuple[str, ...],
    page: bool,
) -> None:
    """Edit the kernels in small wrong ways and see whether their tests notice.

    A mutant that compiles to the same PTX, or not at all, is discarded and another one taken in its place. Each of the
    others runs the tests of its kernel until one fails. Results are kept as they come: run the command again to go on.

    \b
    Examples:
      python -m bench.mutants --kernel softmax_rows --list
      python -m bench.mutants --kernel 'softmax*' --sample 5
      python -m bench.mutants --kernel mask --sample 0 --jobs 2
      python -m bench.mutants --kernel mma --retry --tests 'test_attention_formats*'
    python -m bench.mutants --kernel tile_list --tests 'test_block_sparse*' --tests test_sparse_attention.py
    """
    if page:
        report.write_page(report.read(out))
        return
    chosen = [name for name in kernel_files() if not kernels or any(_matches(name, pattern) for pattern in kernels)]
    if not chosen:
        raise click.ClickException(f"no kernel file matches; there are {', '.join(kernel_files())}")
    console = Console()
    if only_list:
        for name in chosen:
            console.print(_listing(name, runner.mutants(name, seed)[: sample or None]))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "cache").mkdir(mode=0o700, exist_ok=True)
    os.environ["CUATTN_CACHE_DIR"] = str(WORK / "cache")
    results = report.read(out)
    for name in chosen:
        _try_file(
            name, results, console, sample=sample, seed=seed, jobs=jobs, cap_s=cap_s, retry=retry, tests=tests, out=out
        )
    found = [result for result in results.values() if result.file in chosen]
    console.print(report.table(found))
    for result in report.survivors(found):
        console.print(f"survived: {result.file}:{result.line} {result.after}", highlight=False, markup=False)


def _matches(name: str, pattern: str) -> bool:
    path = Path(name).with_suffix("")
    return any(re.fullmatch(pattern.replace("*", ".*"), written) for written in (path.name, path.as_posix()))


def _listing(name: str, mutants: list[Mutant]) -> Table:
    table = Table(title=f"{name} ({len(mutants)})", title_justify="left")
    for heading in ("line", "operator", "before", "after"):
        table.add_column(heading, overflow="fold")
    for mutant in mutants:
        table.add_row(str(mutant.line), mutant.operator, escape(mutant.before), escape(mutant.after))
    return table


def _try_file(
    name: str,
    results: dict[str, Result],
    console: Console,
    *,
    sample: int,
    seed: int,
    jobs: int,
    cap_s: float,
    retry: bool,
    tests: tuple[str, ...],
    out: Path,
) -> None:
    """Try mutants of a file until ``sample`` of them count, in their order, those that are known not again."""
    mutants = runner.mutants(name, seed)
    keys = {mutant.key for mutant in mutants}
    for key in [key for key, result in results.items() if result.file == name and key not in keys]:
        del results[key]  # of a line that is gone
    if retry:
        for key in [key for key, result in results.items() if result.file == name and result.status == "survived"]:
            del results[key]
    pending = list(mutants)
    laboratory: Laboratory | None = None
    counting = 0
    with ThreadPoolExecutor(jobs) as pool:
        while pending and (not sample or counting < sample):
            batch: list[Mutant] = []
            while pending and len(batch) < jobs and (not sample or counting + len(batch) < sample):
                mutant = pending.pop(0)
                if mutant.key in results:
                    results[mutant.key] = replace(results[mutant.key], line=mutant.line)
                    counting += results[mutant.key].status != DISCARDED
                else:
                    batch.append(mutant)
            if not batch:
                break
            if laboratory is None:
                laboratory = Laboratory(WORK, name, cap_s, tests)
            for result in pool.map(laboratory.run, batch):
                results[result.key] = result
                counting += result.status != DISCARDED
                console.print(
                    f"{result.status:9} {result.file}:{result.line} [{result.operator}] {result.after} "
                    f"({result.reason}, {result.seconds} s)",
                    highlight=False,
                    markup=False,
                )
            write_text(out, report.to_json(results))
    if laboratory is not None:
        laboratory.close()
    console.print(f"{name}: {dict(Counter(result.status for result in results.values() if result.file == name))}")


if __name__ == "__main__":
    main(prog_name="python -m bench.mutants")
