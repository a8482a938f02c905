"""Generate text through the paged cache, compare it with the plain model, and print what was found."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import cuattn
from cuattn.testing.executors import executor_names

from . import chat, files, report
from .demonstrations import Demonstrations

QUESTIONS = (
    "What is gravity?",
    "Write a short story about a lighthouse keeper.",
    "How do I make tea?",
)
SYSTEM = (
    "You are a patient science teacher. You explain things to children of ten years, in short and simple sentences, "
    "with one example from everyday life, and you never use a word that a child would not know."
)
PUPILS = ("Why is the sky blue?", "Why do boats float?")


def encode(model: files.ModelFile, questions: Sequence[str], system: str, count: int) -> list[list[int]]:
    """Encode prompts as token numbers; a `click.ClickException` if one leaves no room for `count` more."""
    prompts = [model.tokenizer.encode(chat.prompt(question, system)).ids for question in questions]
    longest, context = max(map(len, prompts)), model.weights.shape.context
    if longest + count > context:
        raise click.ClickException(f"{longest} tokens of a prompt and {count} of an answer; the model reads {context}")
    return prompts


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--prompt", "questions", multiple=True, help="A question instead of the three of this example; repeatable."
)
@click.option("--tokens", "count", type=click.IntRange(min=1), default=32, show_default=True, help="Of each answer.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Answers drawn at random to the first question.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=0.8,
    show_default=True,
    help="Of the draws: the higher, the more surprising.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option("--page-size", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of a page.")
@click.option(
    "--device",
    type=click.Choice(["host", "cuda"]),
    default="host",
    show_default=True,
    help="host: NumPy arrays, the host executor; cuda: CuPy arrays, the GPU.",
)
def main(
    questions: tuple[str, ...],
    count: int,
    samples: int,
    temperature: float,
    seed: int,
    page_size: int,
    device: str,
) -> None:
    """Answer questions with SmolLM2-135M-Instruct, its keys and values in cuattn's paged cache.

    Every likeliest answer is computed a second time by a plain NumPy model without a cache, and compared token for
    token; a difference makes the program fail.

    \b
    Examples:
      python -m examples.smollm2
      python -m examples.smollm2 --prompt "Who was Ada Lovelace?" --tokens 64
      python -m examples.smollm2 --samples 8 --temperature 1.2 --page-size 8
    """
    console = Console()
    if device not in executor_names():
        raise click.ClickException("--device cuda needs a GPU and CuPy, and none answers; --device host needs neither")
    place = "host executor" if device == "host" else "GPU"
    questions = questions or QUESTIONS
    start = time.perf_counter()
    try:
        model = files.load()
    except files.ModelFileError as error:
        raise click.ClickException(str(error)) from error
    shape = model.weights.shape
    console.print(
        f"[bold]SmolLM2-135M-Instruct[/bold]: {shape.blocks} blocks of {shape.heads} query heads over {shape.kv_heads} "
        f"key/value heads of {shape.head_dim}, {model.weights.count / 1e6:.1f} million weights, "
        f"read in {time.perf_counter() - start:.1f} s"
    )
    prompts = encode(model, questions, chat.SYSTEM, count)
    pupils = encode(model, PUPILS, SYSTEM, count)

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=not console.is_terminal) as bar:

            def progress(description: str, total: int) -> Callable[[], None]:
                task = bar.add_task(description, total=total)
                return lambda: bar.advance(task)

            shown = Demonstrations(model.weights, model.end, device, count, page_size, progress)
            console.print(f"kernels: ready after {shown.warm_up():.1f} s (compiled, or from the cache)")
            greedy = shown.greedy(prompts)
            drawn, used_pages = shown.samples(prompts[0], samples, temperature, seed)
            prefix = shown.prefix(pupils)
    except cuattn.errors.CuattnError as error:
        raise click.ClickException(str(error)) from error

    def answers(names: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        texts = [model.tokenizer.decode(list(answer)) for answer in tokens]
        console.print(report.texts(list(zip(names, texts, strict=True))))

    console.print(report.comparisons(greedy, "the likeliest answers, paged cache against a plain model without one"))
    answers(questions, [row.answer.answer for row in greedy])
    console.print(f"\n[bold]{samples} samples[/bold] of the first answer, temperature {temperature:g}, by fork")
    answers([f"sample {i + 1}" for i in range(samples)], [request.answer for request in drawn])
    console.print(report.sharing(drawn, used_pages, page_size, shown.page_bytes))
    console.print()
    console.print(report.comparisons(prefix, "two prompts with one system text, the second a step behind the first"))
    answers(PUPILS, [row.answer.answer for row in prefix])
    hits = sum(row.answer.from_cache for row in prefix)
    console.print(f"prefix cache: {hits} tokens, {hits // page_size} pages, were not computed again")
    console.print(f"\n{report.speeds(shown.speed, place)}")
    if device == "host":
        console.print("The host executor is an interpreter on the CPU: its times say nothing about a GPU.")
    if not all(row.passed for row in (*greedy, *prefix)):
        console.print("[bold red]an answer differs from the plain model's[/bold red]")
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m examples.smollm2")
