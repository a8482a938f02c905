"""The kernel variants that drawn problems of the suite ask for: a fixed pool. Shapes, layouts and values stay free.

A forward kernel is compiled for the dtype, for the buckets that both head dims fall into, for rows that all begin at
multiples of 16 bytes or for any, and for options. Drawn freely, every few examples are one more compilation, for
combinations of which most have nothing to do with each other. So problems of the suite are drawn from :data:`POOL`, in
which every two values of these factors stand together; free combinations belong to the fuzzer. Which row of the table
runs then follows from the number of queries, which is free.

>>> len(POOL), POOL[0]
(22, Blessed(dtype=dtype('float16'), buckets=(32, 32), aligned=True, bounded=False))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from cuattn.testing.covering import covering_array

__all__ = ["FACTORS", "POOL", "Blessed", "pooled"]

#: By buckets and by whether rows are aligned: (D, E). Of those that are not, one of the two is odd, so that no layout
#: aligns them, nor a copy.
_HEAD_DIMS: dict[tuple[int, int], dict[bool, Sequence[tuple[int, int]]]] = {
    (32, 32): {True: ((32, 32), (8, 8), (24, 16)), False: ((31, 32), (1, 1), (16, 7), (24, 17))},
    (64, 64): {True: ((64, 64), (40, 40), (64, 40)), False: ((63, 48), (33, 64))},
    (64, 32): {True: ((64, 32), (40, 8)), False: ((63, 31), (40, 7))},
    (128, 128): {True: ((128, 128), (104, 120)), False: ((101, 120), (128, 97))},
}
_DTYPES = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))

#: What a variant is compiled for; `bounded`: keys are hidden by a causal mask or a window.
FACTORS: dict[str, Sequence[Any]] = {
    "dtype": _DTYPES,
    "buckets": tuple(_HEAD_DIMS),
    "aligned": (True, False),
    "bounded": (False, True),
}


@dataclass(frozen=True)
class Blessed:
    """A variant of the pool, apart from the row: see :data:`FACTORS`."""

    dtype: np.dtype[Any]
    buckets: tuple[int, int]
    aligned: bool
    bounded: bool

    @property
    def head_dims(self) -> Sequence[tuple[int, int]]:
        """Return (D, E) of problems that ask for it."""
        return _HEAD_DIMS[self.buckets][self.aligned]


#: The smallest buckets with aligned rows, in every dtype, then the pairs of factors.
POOL: tuple[Blessed, ...] = tuple(
    dict.fromkeys(
        [Blessed(dtype, (32, 32), True, bounded) for dtype in _DTYPES for bounded in (False, True)]
        + [Blessed(**row) for row in covering_array(FACTORS)]
    )
)


def pooled(**fixed: Sequence[Any]) -> st.SearchStrategy[Blessed] | None:
    """Variants of :data:`POOL` whose factors are among those in `fixed`, for the argument `variants` of
    :func:`~cuattn.testing.strategies.attention_problems`; None, which leaves all to chance, for the fuzzer: with
    the Hypothesis profile "fuzz".
    """
    if settings.get_current_profile_name() == "fuzz":
        return None
    return st.sampled_from([one for one in POOL if all(getattr(one, name) in among for name, among in fixed.items())])
