"""What the example prints: answers, comparisons, pages, speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from .generation import Request, Speed


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt: what the cached model says, and what the plain one says."""

    answer: Request
    expected: Request

    @property
    def agreeing(self) -> int:
        """Number of tokens from the first on that are equal."""
        pairs = zip(self.answer.answer, self.expected.answer, strict=False)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(self.expected.answer))

    @property
    def passed(self) -> bool:
        return self.answer.answer == self.expected.answer

    @property
    def difference(self) -> float:
        """The largest difference of a logit, where both models had read the same tokens."""
        both = slice(0, self.agreeing + 1)
        pairs = zip(self.answer.logits[both], self.expected.logits[both], strict=False)
        return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)

    @property
    def margin(self) -> float:
        """How far the likeliest token was ahead of the second, in the plain model's closest decision."""
        return min(float(np.subtract(*np.partition(logits, -2)[[-1, -2]])) for logits in self.expected.logits)


def comparisons(rows: Sequence[Comparison], title: str) -> Table:
    table = Table(title=title)
    table.add_column("prompt tokens", justify="right")
    table.add_column("from the cache", justify="right")
    table.add_column("new tokens", justify="right")
    table.add_column("equal", justify="right")
    table.add_column("largest difference\nof a logit", justify="right", no_wrap=True)
    table.add_column("closest decision", justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            str(len(row.answer.prompt)),
            str(row.answer.from_cache),
            str(len(row.answer.answer)),
            str(row.agreeing),
            f"{row.difference:.1e}",
            f"{row.margin:.1e}",
            "[green]ok[/green]" if row.passed else "[bold red]no[/bold red]",
        )
    return table


def texts(pairs: Sequence[tuple[str, str]]) -> Table:
    """Print questions and answers, or names and texts; as they are, whatever brackets they hold."""
    table = Table(show_header=False, show_lines=True)
    table.add_column(ratio=1)
    table.add_column(ratio=3)
    for name, text in pairs:
        table.add_row(Text(name), Text(text))
    return table


def sharing(requests: Sequence[Request], used_pages: int, page_size: int, page_bytes: int) -> str:
    """Say how many pages the sequences take, and how many they would take if each had its own."""
    alone = sum(-(-request.sequence.length // page_size) for request in requests)
    saved = alone - used_pages
    return (
        f"{used_pages} pages hold {len(requests)} sequences; with pages of their own they would take {alone}: "
        f"{saved} saved ({saved / alone:.0%}, {saved * page_bytes / 2**20:.1f} MiB)"
    )


def speeds(speed: Speed, place: str) -> str:
    prompts, decoded = (
        f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds if seconds else 0:.0f} tokens/s)"
        for tokens, seconds in ((speed.prompt_tokens, speed.prompt_s), (speed.decoded_tokens, speed.decode_s))
    )
    return f"{place}: prompts {prompts}; decode {decoded}"
