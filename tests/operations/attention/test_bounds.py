"""The stretch of keys or queries that hosts plan with, against the matrix of what is visible."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.reference.visibility import visible

BOUNDS = (
    Bounds(),
    Bounds(right=0),
    Bounds(3, 2),
    Bounds(0, UNBOUNDED, from_end=False),
    Bounds(UNBOUNDED, 4, from_end=False, offset=-2),
    Bounds(1, 0, from_end=False, offset=5),
)
SHAPES = ((7, 7), (3, 11), (11, 3), (1, 9))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_stretch_is_what_is_visible(bounds, shape):
    diagonal = bounds.diagonal(*(np.array([n]) for n in shape))
    window = tuple(None if side == UNBOUNDED else side for side in bounds[:2])
    seen = visible(*shape, window=window, diagonal_offset=int(diagonal[0]))[0, 0]
    for matrix, stretch in ((seen, bounds.keys), (seen.T, bounds.queries)):
        for first in range(len(matrix)):
            for last in range(first, len(matrix)):
                begin, end = stretch(np.array([first]), np.array([last]), diagonal, np.array([matrix.shape[1]]))
                hit = np.flatnonzero(matrix[first : last + 1].any(axis=0))
                assert (begin[0], end[0]) == (hit[0], hit[-1] + 1) if hit.size else begin[0] >= end[0]
                if (width := bounds.width(last + 1 - first)) is not None:
                    assert hit.size <= width
