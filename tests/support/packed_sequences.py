"""Sequences of different lengths, packed one after another."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.testing.arrays import place
from cuattn.testing.strategies import fill

F16 = np.dtype(np.float16)
#: (query length, key length) of each sequence.
LENGTHS = {
    "one": [(70, 135)],
    "mixed": [(5, 9), (70, 70), (1, 130), (64, 63), (130, 1)],
    "empty_ones": [(0, 0), (20, 30), (0, 40), (33, 0), (0, 0), (1, 1), (0, 3)],
    "only_queries": [(40, 0), (3, 0)],
    "only_keys": [(0, 40), (0, 3)],
    "one_long_among_many": [(1, 1), (2, 0), (0, 1), (3, 3), (1, 2)] * 3 + [(200, 260)] + [(1, 1), (2, 3)] * 4,
    "more_queries_than_keys": [(135, 70), (65, 1), (66, 64), (10, 9)],
}
lengths_of = pytest.mark.parametrize("name", LENGTHS)


def pack(lengths, dtype=F16, *, heads=(2, 1), head_dims=(32, 32), seed=0, layout=None):
    """q, k, v of standard normal numbers, and where the sequences start."""
    rng = np.random.default_rng(seed)
    starts = [np.concatenate([[0], np.cumsum(own)]).astype(np.int32) for own in np.transpose(lengths)]
    totals = [int(own[-1]) for own in starts]
    shapes = (
        (totals[0], heads[0], head_dims[0]),
        (totals[1], heads[1], head_dims[0]),
        (totals[1], heads[1], head_dims[1]),
    )
    return [place(fill(shape, dtype, "normal", rng), layout).array for shape in shapes], starts


# --- schedules --------------------------------------------------------------------------------------------------------


BAD_STARTS = {
    "beyond_the_end": [0, 30, 500, 1000],
    "descending": [0, 60, 20, 70],
    "negative": [0, -50, 40, 70],
    "not_from_zero": [10, 20, 30, 70],
    "short": [0, 10, 20, 30],
    "huge": [0, 2**31 - 1, 2**31 - 1, 70],
    "lowest": [0, 30, -(2**31), 70],
}
