"""Two ways to put sentences of different lengths into batches. (A packed batch is a padded one without its padding.)"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .model import Batch


def bucketed(token_lists: Sequence[Sequence[int]]) -> list[Batch]:
    """Make one batch for each length that occurs: no padding, one attention call for each batch and layer."""
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(token_lists):
        by_length.setdefault(len(tokens), []).append(index)
    return [
        Batch(
            tokens=np.array([token_lists[index] for index in indices]),
            lengths=(length,) * len(indices),
            sentences=tuple(indices),
        )
        for length, indices in sorted(by_length.items())
    ]


def padded(token_lists: Sequence[Sequence[int]], batch_size: int = 8) -> list[Batch]:
    """Make batches of `batch_size` in the order given, zeros to the right of the shorter ones."""
    batches = []
    for start in range(0, len(token_lists), batch_size):
        rows = token_lists[start : start + batch_size]
        lengths = tuple(len(row) for row in rows)
        tokens = np.zeros((len(rows), max(lengths)), np.int64)
        for row, values in enumerate(rows):
            tokens[row, : len(values)] = values
        batches.append(Batch(tokens=tokens, lengths=lengths, sentences=tuple(range(start, start + len(rows)))))
    return batches
