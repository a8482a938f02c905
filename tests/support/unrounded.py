"""Results of 16- and 8-bit inputs that are written in float32, before they are rounded."""

from __future__ import annotations

import numpy as np

from cuattn.testing.arrays import Layout

#: Rows at multiples of 16 bytes; at multiples of 8, of 4 alone (by a stride, by the base); heads before queries.
LAYOUTS = (
    Layout(),
    Layout(pad=(0, 0, 0, 2)),
    Layout(pad=(0, 0, 0, 1)),
    Layout(offset=1),
    Layout(order=(0, 2, 1, 3)),
)


def assert_rounds_to(unrounded, rounded):
    """To the bit; and what is not 0 holds more bits than that."""
    assert unrounded.dtype == np.float32 and rounded.dtype.itemsize == 2
    np.testing.assert_array_equal(unrounded.astype(rounded.dtype).view(np.uint16), rounded.view(np.uint16))
    more_bits = (unrounded != rounded.astype(np.float32))[unrounded != 0]
    assert more_bits.size == 0 or more_bits.mean() > 0.9


def into_float32(executor, call, shape, layout=None):
    """What ``call(out)`` returns for an array among poison, which it writes and returns; nothing around it is."""
    target = executor.guarded(shape, np.float32, layout)
    result = call(target.array)
    assert (result[0] if isinstance(result, tuple) else result) is target.array
    target.check()
    return executor.numpy(target.array)
