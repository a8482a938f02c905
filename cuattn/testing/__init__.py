"""What the tests, the benchmarks and users check kernels with.

* :mod:`~cuattn.testing.tolerance` and :mod:`~cuattn.testing.gradient_tolerance`: when a result is right; the assertions
  below;
* :mod:`~cuattn.testing.arrays`: arrays in any layout, surrounded by poison that is verified afterwards;
* :mod:`~cuattn.testing.cases`: one object per problem, for tests, benchmarks and the command line;
* :mod:`~cuattn.testing.kernels`: the functions of `cuattn` with a kernel shape of one's own choice;
* :mod:`~cuattn.testing.strategies`: Hypothesis strategies (these modules alone need Hypothesis), and
  :mod:`~cuattn.testing.pool`: the kernel variants that the suite draws from.
"""

from __future__ import annotations

from cuattn.testing.decode_tolerance import assert_decode_close, assert_paged_close, assert_paged_varlen_close
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.tolerance import (
    ToleranceError,
    assert_attention_close,
    assert_lse_close,
    assert_softmax_close,
    assert_varlen_close,
)

__all__ = [
    "ToleranceError",
    "assert_attention_close",
    "assert_decode_close",
    "assert_gradients_close",
    "assert_lse_close",
    "assert_paged_close",
    "assert_paged_varlen_close",
    "assert_softmax_close",
    "assert_varlen_close",
    "assert_varlen_gradients_close",
]
