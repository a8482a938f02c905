"""Edits written by hand: the mistakes that one makes in these algorithms, found again by a pattern.

A pattern that no longer matches is left out: a test says when these become too many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cuattn.testing.mutation.operators import Edit
from cuattn.testing.mutation.source import Source


@dataclass(frozen=True)
class Semantic:
    """An edit by hand: in ``file``, the ``occurrence``-th match of ``pattern`` of the text is replaced."""

    file: str
    what: str
    pattern: str
    replacement: str
    occurrence: int = 0

    def find(self, source: Source) -> Edit | None:
        matches = list(re.finditer(self.pattern, source.text, re.DOTALL))
        if len(matches) <= self.occurrence:
            return None
        match = matches[self.occurrence]
        return Edit(self.what, *match.span(), match.expand(self.replacement))


def edits(source: Source) -> Iterator[Edit]:
    """The edits of the table that belong to this source."""
    for entry in table():
        if entry.file == source.name and (edit := entry.find(source)) is not None:
            yield edit


def table() -> list[Semantic]:
    """The table of all edits written by hand."""
    from bench.mutants.semantic_attention import ATTENTION
    from bench.mutants.semantic_backward import BACKWARD
    from bench.mutants.semantic_decode import DECODE
    from bench.mutants.semantic_differential import HOPPER_STREAMS
    from bench.mutants.semantic_hopper import HOPPER
    from bench.mutants.semantic_layout import LAYOUT
    from bench.mutants.semantic_softmax import SOFTMAX
    from bench.mutants.semantic_variants import DIFFERENTIAL, DUAL_CHUNK, SPARSE

    variants = [*DIFFERENTIAL, *DUAL_CHUNK, *SPARSE]
    return [*SOFTMAX, *ATTENTION, *BACKWARD, *DECODE, *HOPPER, *HOPPER_STREAMS, *LAYOUT, *variants]
