"""Train with kernels and in float64, compare the losses at every step, and print what was found."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.markup import escape

import cuattn
from cuattn.testing.executors import executor_names

from . import data, plot, report
from .adam import Adam
from .attention import KernelAttention, ReferenceAttention
from .kinds import KINDS
from .model import CharTransformer, Positions, Shape, initial_weights
from .training import Run, continuation

BATCH_SIZE = 8
PROGRESS_LINES = 20
PROMPT = 8  # characters
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}


@dataclass(frozen=True)
class Setting:
    """What is the same for every kind of attention."""

    dtype: str
    steps: int
    dropout: float
    seed: int
    positions: Positions
    device: str


def runs(setting: Setting, kind_name: str, vocabulary: int) -> tuple[Run, Run]:
    """Make two models of equal weights, yet to be trained: (with kernels, in float64)."""
    kind, dtype = KINDS[kind_name], DTYPES[setting.dtype]
    shape = Shape(vocabulary, positions=setting.positions, gates=kind.num_gates(Shape.heads))
    weights = initial_weights(shape, setting.seed)
    around = np.float64 if dtype is np.float64 else np.float32  # of what is not attention
    array_module = np if setting.device == "host" else import_module("cupy")
    ours = {name: array_module.asarray(w.astype(around)) for name, w in weights.items()}
    theirs = {name: w.astype(np.float64) for name, w in weights.items()}
    options: dict[str, Any] = {"dropout_p": setting.dropout, "dropout_seed": setting.seed}
    rotate = setting.positions == "rope"
    kernel = CharTransformer(shape, ours, KernelAttention(dtype, kind, rotate=rotate), **options)
    float64 = CharTransformer(shape, theirs, ReferenceAttention(kind, rotate=rotate), **options)
    return Run(kernel, Adam(ours), setting.steps), Run(float64, Adam(theirs), setting.steps)


def first_call_seconds(run: Run) -> float:
    """Compile the kernels, or load them from the cache, by computing gradients once; no weight changes."""
    start = time.perf_counter()
    tokens = np.zeros((1, run.model.shape.context), np.int64)
    run.model.loss_and_grads(tokens, tokens)
    return time.perf_counter() - start


def train(console: Console, kernel: Run, float64: Run, batches: data.Batches) -> None:
    """Make all steps of both runs, step by step on the same batches, with a line of progress now and then."""
    console.print(report.PROGRESS_HEADER)
    every = max(1, kernel.steps // PROGRESS_LINES)
    for step in range(kernel.steps):
        tokens, targets = batches.draw()
        kernel.step(tokens, targets)
        float64.step(tokens, targets)
        if step % every == 0 or step == kernel.steps - 1:
            console.print(report.progress_line(kernel, float64))


def sample(console: Console, kernel: Run, float64: Run, corpus: data.Corpus, length: int) -> None:
    """Print `length` characters that the trained model writes, and how far text and float64 model agree with them."""
    prompt = corpus.encode(corpus.text[:PROMPT])
    written, expected = (corpus.decode(continuation(run.model, prompt, length)) for run in (kernel, float64))
    console.print(f'\n[bold]what it writes[/bold] (after "{written[:PROMPT]}", always the likeliest character):\n')
    console.print(written, markup=False, highlight=False)
    console.print(
        f"\nof these {len(written)} characters, the first {report.agreeing(written, corpus.text)} are as in the text, "
        f"and the first {report.agreeing(written, expected)} as the float64 model writes them"
    )


def checked_image(console: Console, image: Path) -> Path | None:
    """Return where to save the plot; None, and a line that says so, without matplotlib."""
    try:
        plot.check(image)
    except plot.NoMatplotlibError as error:
        console.print(f"no plot, only figures: {error}", markup=False)
        return None
    return image


def train_kind(console: Console, setting: Setting, name: str, corpus: data.Corpus, write: int) -> tuple[Run, Run]:
    """Train with one kind of attention, say how it went, and let it write."""
    kernel, float64 = runs(setting, name, len(corpus.characters))
    batches = data.Batches(corpus.encode(corpus.text), BATCH_SIZE, kernel.model.shape.context, setting.seed)
    shape = kernel.model.shape
    console.print(
        f"[bold]{name} attention[/bold], {shape.positions} positions: {shape.blocks} blocks of {shape.heads} heads of "
        f"{shape.width // shape.heads}, {sum(w.size for w in kernel.model.weights.values())} weights; "
        f"{setting.steps} steps of {BATCH_SIZE} times {shape.context} characters"
    )
    seconds = first_call_seconds(kernel)
    console.print(f"kernels for {setting.dtype}: ready after {seconds:.2f} s (compiled, or from the cache)\n")
    train(console, kernel, float64, batches)
    console.print()
    place = "host executor" if setting.device == "host" else "GPU"
    console.print(report.summary({f"{setting.dtype} kernels, {place}": kernel, "float64 NumPy, reference": float64}))
    if setting.device == "host":
        console.print("The host executor is an interpreter on the CPU: its times say nothing about a GPU.")
    sample(console, kernel, float64, corpus, write)
    return kernel, float64


def judge(console: Console, setting: Setting, name: str, kernel: Run, float64: Run) -> bool:
    """Print how far the losses are apart, and return whether they may be."""
    difference, bound = report.largest_difference(kernel, float64), report.BOUNDS[setting.dtype]
    passed = difference <= bound  # False for NaN
    console.print(
        f"{name}: largest difference of the losses in the first {min(setting.steps, report.COMPARED_STEPS)} steps: "
        f"{difference:.1e} (allowed: {bound:.0e}) " + ("[green]ok[/green]" if passed else "[bold red]no[/bold red]")
    )
    return passed


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", type=click.IntRange(min=1), default=400, show_default=True, help="Training steps.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="float32",
    show_default=True,
    help="What the kernels compute attention in; the rest is float32 (with float64: float64).",
)
@click.option(
    "--attention",
    "kinds",
    type=click.Choice([*KINDS, "all"]),
    multiple=True,
    default=("softmax",),
    show_default=True,
    help="The kind of attention; given several times, or as all, one training after the other.",
)
@click.option(
    "--positions",
    type=click.Choice(get_args(Positions)),
    default="learned",
    show_default=True,
    help="A learned vector for each, fixed sines and cosines, or queries and keys turned by them.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Probability with which attention drops a key.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Of weights, batches and dropout.",
)
@click.option(
    "--data",
    "--text",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A UTF-8 text to learn, of 65 characters or more.  [default: the Zen of Python]",
)
@click.option(
    "--write",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Characters that the trained model writes in the end.",
)
@click.option(
    "--plot",
    "image",
    type=click.Path(path_type=Path),
    help="Where to save a plot of both losses; the name's ending says the format: .png, .svg, .pdf and others.",
)
@click.option(
    "--device",
    type=click.Choice(["host", "cuda"]),
    default="host",
    show_default=True,
    help="host: NumPy arrays, the host executor; cuda: CuPy arrays, the GPU.",
)
def main(
    steps: int,
    dtype: str,
    kinds: tuple[str, ...],
    positions: Positions,
    dropout: float,
    seed: int,
    path: Path | None,
    write: int,
    image: Path | None,
    device: str,
) -> None:
    """Train a character-level transformer of two blocks, attention and its gradients computed by cuattn.

    The same training runs in float64 NumPy beside it, and the losses are compared at every step. The text is short and
    the model learns it nearly by heart: this shows that the gradients are right, not that the model is any good.

    \b
    Examples:
      python -m examples.char_transformer
      python -m examples.char_transformer --plot losses.png
      python -m examples.char_transformer --dtype bfloat16 --dropout 0.1
      python -m examples.char_transformer --attention window --positions rope
      python -m examples.char_transformer --attention all --plot losses.png
    """
    console = Console()
    if device not in executor_names():
        raise click.ClickException("--device cuda needs a GPU and CuPy, and none answers; --device host needs neither")
    names = list(KINDS) if "all" in kinds else list(dict.fromkeys(kinds))
    without = [name for name in names if not KINDS[name].has_dropout]
    if dropout and without:
        raise click.ClickException(f"--dropout {dropout:g} is given, which {without[0]} attention does not have")
    text_name = "the Zen of Python" if path is None else path.name
    setting = Setting(dtype, steps, dropout, seed, positions, device)
    trained: dict[str, tuple[Run, Run]] = {}
    try:
        image = None if image is None else checked_image(console, image)
        corpus = data.Corpus.of(data.zen_of_python() if path is None else data.read_text(path))
        console.print(
            f"[bold]{escape(text_name)}[/bold]: {len(corpus.text)} characters, {len(corpus.characters)} different ones"
        )
        for name in names:
            trained[name] = train_kind(console, setting, name, corpus, write)
            console.print()
        if image is not None:
            place = "host executor" if device == "host" else "GPU"
            curves = {name: (kernel.losses, float64.losses) for name, (kernel, float64) in trained.items()}
            title = f"A character-level transformer learns {text_name}"
            plot.save(image, curves, title=title, kernel_label=f"{dtype}, cuattn on the {place}")
            console.print(f"plot: {image}\n", markup=False, soft_wrap=True)
    except (data.TextError, plot.PlotError, cuattn.errors.CuattnError) as error:
        raise click.ClickException(str(error)) from error
    passed = [judge(console, setting, name, *pair) for name, pair in trained.items()]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main(prog_name="python -m examples.char_transformer")
