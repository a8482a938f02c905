"""The tables that the example prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table


@dataclass
class Row:
    """One forward of all the sentences."""

    dtype: str
    batching: str
    tokens: int  # that went through the layers, padding included where it did
    attention_calls: int
    time_s: float
    bound: float
    deviation: float = math.inf

    def compare(self, embeddings: np.ndarray, expected: np.ndarray) -> None:
        """Record the largest deviation of a component of an embedding from its reference."""
        self.deviation = float(np.abs(embeddings - expected).max())

    @property
    def passed(self) -> bool:
        return self.deviation <= self.bound  # False for NaN


def deviations(rows: Sequence[Row]) -> Table:
    table = Table(title="attention on the host executor, against a float64 NumPy forward")
    for name in ("q, k, v", "batches"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "calls", "time", "largest deviation", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            row.dtype,
            row.batching,
            str(row.tokens),
            str(row.attention_calls),
            f"{row.time_s:.2f} s",
            f"{row.deviation:.1e}",
            f"{row.bound:.0e}",
            "[green]ok[/green]" if row.passed else "[bold red]no[/bold red]",
        )
    return table


def closest_pairs(sentences: Sequence[str], embeddings: np.ndarray, expected: np.ndarray, count: int = 8) -> Table:
    table = Table(title="closest pairs of sentences (cosine)")
    table.add_column("cuattn", justify="right")
    table.add_column("float64", justify="right", no_wrap=True)
    table.add_column("sentences", no_wrap=True)
    first, second = np.triu_indices(len(sentences), 1)
    similarity = np.sum(embeddings[first] * embeddings[second], axis=1)
    for pair in np.argsort(-similarity)[:count]:
        i, j = first[pair], second[pair]
        table.add_row(
            f"{similarity[pair]:.4f}",
            f"{expected[i] @ expected[j]:.4f}",
            f"{shortened(sentences[i], 56)}\n{shortened(sentences[j], 56)}",
            end_section=True,
        )
    return table


def similarity_matrix(sentences: Sequence[str], embeddings: np.ndarray, count: int = 8) -> Table:
    count = min(count, len(sentences))
    table = Table(title=f"similarity of the first {count} sentences")
    table.add_column("")
    for column in range(count):
        table.add_column(str(column + 1), justify="right", no_wrap=True)
    similarity = embeddings[:count] @ embeddings[:count].T
    for row in range(count):
        cells = (f"{value:.2f}" for value in similarity[row])
        table.add_row(f"{row + 1} {shortened(sentences[row], 15)}", *cells)
    return table


def shortened(sentence: str, width: int) -> str:
    return sentence if len(sentence) <= width else sentence[: width - 1] + "…"
