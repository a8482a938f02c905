"""`plot`: pictures of result files."""

from __future__ import annotations

from pathlib import Path

import click

from cuattn.benchmark import plots

from .compare import read


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE..."
)
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The picture: .png or .svg."
)
@click.option("--kind", type=click.Choice(tuple(plots.KINDS)), help="What to draw; else what fits the suites.")
def plot(files: tuple[Path, ...], output: Path, kind: str | None) -> None:
    """Draw result files as PNG or SVG.

    FILE is a file of `cuattn-bench run --json`; of several, each has lines or bars of its own. Needs matplotlib: pip
    install 'cuattn[plot]'. Figures of the host executor say so on their axes: times there are not a GPU's.

    \b
    seed      time and memory over length as published, and two larger shapes (suite seed)
    lengths   attention, window, blocks, linear attention over length: which takes least from where on (suite lengths)
    decode    bandwidth over context and page size (suite decode)
    bars      operations or bytes a second beside peers and ceilings (attention, backward, softmax, linear ...)
    roofline  operations a second over operations a byte (attention, backward, decode ...)
    mix       instructions by class (suite options)

    \b
    Examples:
      cuattn-bench plot seed.json -o seed.png
      cuattn-bench plot before.json after.json -o bars.svg --kind bars
    """
    reports = [plots.Source(path.stem, read(path)) for path in files]
    draw_to(output, reports, kind)


def require_drawable(path: Path) -> None:
    """Raise unless a picture of that name can be drawn: before anything is measured for it."""
    plots.require(path)
    if not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent} is not a directory", param_hint="--plot")


def draw_to(path: Path, sources: list[plots.Source], kind: str | None = None) -> None:
    """Draw a picture into a file, and say so."""
    figure = plots.draw(sources, kind or plots.kind_for(sources[0].report))
    plots.save(figure, path)
    click.echo(f"drawn to {path}", err=True)
