"""Everything that can be measured without a GPU, as a result file.

python -m bench.host_figures                     write bench/results/host.json
python -m bench.host_figures --out figures.json
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from cuattn.benchmark import run_suite, tables

RESULTS = Path(__file__).resolve().parent / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "host.json",
    show_default="bench/results/host.json",
    help="Where to write.",
)
def main(out: Path) -> None:
    """Run the suite `figures` on a machine that is otherwise idle, and write its results."""
    console = Console()
    with tables.progress(console) as progress:
        report = run_suite(["figures"], progress=progress)
    console.print(tables.summary(report))
    report.write(out)
    if report.failures:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main(prog_name="python -m bench.host_figures")
