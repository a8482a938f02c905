"""Survivors that are no fault of the tests: file, a pattern for "before => after", and the reason.

Nearly all of them compute the same in another way: no test can tell them from the original.
"""

_ANY_THREAD = "every thread of the row holds the same state, so any one of them may write it"
_SPEED = "the same result by another path, which only takes longer or shorter"

EXPLAINED: tuple[tuple[str, str, str], ...] = (
    ("online_softmax_state.cu", r"=> if \(place\.thread == 1 ", _ANY_THREAD),
    ("softmax_split.cu", r"=> if \(place\.thread == 1 ", _ANY_THREAD),
    ("online_softmax_state.cu", r"=> others = merge\(g_others", "merging is commutative, bit for bit"),
    (
        "softmax_output.cuh",
        r"sizeof\(Element\) == 3",
        "a division instead of a product with the reciprocal: both are within the rounding of a 16-bit result",
    ),
    (
        "softmax_rows.cuh",
        r"col_stride = 1; => ;",
        "rows that are loaded 16 bytes at a time have this stride already: the line tells the compiler so",
    ),
    (
        "softmax_rows.cuh",
        r"pack_col\(tile, thread, PACK\) <= end\).*< end",
        _SPEED + ": the last whole pack of a row goes element by element",
    ),
    ("softmax_state.cuh", r"Accumulator\(1\)\}; \}$", "the sum of an empty state is always rescaled, by e^(-inf) = 0"),
    (
        "softmax_state.cuh",
        r"=> return row_max == -infinity\(\) \? Accumulator\(1\)",
        "e^(-inf - 1) is the 0 that is wanted as well, and log 0 swallows the 1",
    ),
    (
        "softmax_state.cuh",
        r"a\.row_max > b\.row_max",
        "states with equal maxima merge to the same bits in either order",
    ),
)
