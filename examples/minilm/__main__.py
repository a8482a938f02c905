"""Embed sentences on the host executor, compare with float64, and print what was found."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import cuattn

from . import batches, files, report
from .model import Encoder

HERE = Path(__file__).resolve().parent
# "packed" batches are padded ones that lose their padding before the first layer and get it back behind the last.
BATCHINGS = {"bucketed": batches.bucketed, "padded": batches.padded, "packed": batches.padded}

# The largest deviation of a component of a unit vector from the float64 forward. With float32 throughout, rounding
# (unit roundoff 6e-8) adds up over six layers to a few 1e-7. With float16, q, k, v and the softmax weights are rounded
# to 11 bits (5e-4 relative); averaged over keys and tokens, about 5e-5 is left of a component of typically 0.05.
BOUNDS: dict[type[np.floating], float] = {np.float32: 2e-6, np.float16: 5e-4}


def float64_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    out, _ = cuattn.reference.attention(q, k, v)
    return out


class CountedAttention:
    """`cuattn.attention` and `cuattn.attention_varlen`, counting their calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.calls += 1
        return cuattn.attention(q, k, v)

    def packed(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: cuattn.PaddingPlan) -> np.ndarray:
        self.calls += 1
        lengths, longest = plan.cu_seqlens, plan.max_seqlen
        return cuattn.attention_varlen(q, k, v, lengths, lengths, max_seqlen_q=longest, max_seqlen_k=longest)


def read_sentences(path: Path, limit: int | None) -> list[str]:
    sentences = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return sentences[:limit]


def first_call_seconds(dtype: type[np.floating], head_dim: int) -> float:
    """Compile the kernels for `dtype`, or load them from the cache, by calling them once."""
    start = time.perf_counter()
    x = np.ones((1, 1, 1, head_dim), dtype)
    cuattn.attention(x, x, x)
    cuattn.attention_varlen(x[0], x[0], x[0], [0, 1], [0, 1])
    return time.perf_counter() - start


def forward(
    model: files.ModelFiles,
    tokens: Sequence[Sequence[int]],
    dtype: type[np.floating],
    batching: str,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, report.Row]:
    attention = CountedAttention()
    encoder = Encoder(
        model.config,
        model.weights,
        attention,
        dtype=np.float32,
        attention_dtype=dtype,
        packed_attention=attention.packed if batching == "packed" else None,
    )
    start = time.perf_counter()
    embeddings = encoder.embed(BATCHINGS[batching](tokens), lambda batch: progress(len(batch.sentences)))
    return embeddings, report.Row(
        dtype=np.dtype(dtype).name,
        batching=batching,
        tokens=encoder.tokens_computed,
        attention_calls=attention.calls,
        time_s=time.perf_counter() - start,
        bound=BOUNDS[dtype],
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--sentences",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=HERE / "sentences.txt",
    show_default="those of this example",
    help="A text file with one sentence a line.",
)
@click.option("--limit", type=click.IntRange(min=2), help="Only the first so many sentences.")
def main(path: Path, limit: int | None) -> None:
    """Embed sentences with all-MiniLM-L6-v2, every attention layer computed by cuattn on the host executor.

    \b
    Examples:
      python -m examples.minilm
      python -m examples.minilm --limit 8
      python -m examples.minilm --sentences my_sentences.txt
    """
    console = Console()
    sentences = read_sentences(path, limit)
    if len(sentences) < 2:
        raise click.ClickException(f"{path} holds fewer than two sentences")
    try:
        model = files.load()
    except files.ModelFileError as error:
        raise click.ClickException(str(error)) from error
    tokens = [encoding.ids for encoding in model.tokenizer.encode_batch(sentences)]
    head_dim = model.weights["embeddings.LayerNorm.bias"].size // int(str(model.config["num_attention_heads"]))
    console.print(
        f"[bold]all-MiniLM-L6-v2[/bold]: {len(sentences)} sentences, {sum(map(len, tokens))} tokens "
        f"(longest {max(map(len, tokens))}), {model.config['num_hidden_layers']} layers"
        f" of {model.config['num_attention_heads']} heads of {head_dim}"
    )
    expected = Encoder(model.config, model.weights, float64_attention, dtype=np.float64).embed(batches.bucketed(tokens))
    for dtype in BOUNDS:
        seconds = first_call_seconds(dtype, head_dim)
        console.print(f"kernels for {np.dtype(dtype).name}: ready after {seconds:.2f} s (compiled, or from the cache)")

    rows = []
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        for dtype in BOUNDS:
            for batching in BATCHINGS:
                task = bar.add_task(f"{np.dtype(dtype).name}, {batching}", total=len(sentences))
                embeddings, row = forward(
                    model,
                    tokens,
                    dtype,
                    batching,
                    lambda n, task=task: bar.advance(task, n),  # type: ignore[misc]
                )
                row.compare(embeddings, expected)
                rows.append(row)

    console.print(report.deviations(rows))
    tokens_of = {row.batching: row.tokens for row in rows}
    console.print(
        f"tokens computed: {tokens_of['padded']} with padding, {tokens_of['packed']} without "
        f"({1 - tokens_of['packed'] / tokens_of['padded']:.0%} fewer)"
    )
    console.print(report.closest_pairs(sentences, embeddings, expected))
    console.print(report.similarity_matrix(sentences, embeddings))
    if not all(row.passed for row in rows):
        console.print("[bold red]a deviation is larger than its bound[/bold red]")
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m examples.minilm")
