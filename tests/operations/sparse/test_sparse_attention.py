"""sparse_attention: each pattern is the function that it stands for, and nothing else is a pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn.errors import ArgumentError

MASK = cuattn.BlockMask.from_blocks(cuattn.bigbird_mask(3, 3, num_random=0, num_global=0, num_window=1), 40, 40, 16)


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (("window", 3, None), lambda *qkv, **own: cuattn.attention(*qkv, window=(3, None), **own)),
        (("strided", 3, 5), lambda *qkv, **own: cuattn.strided_attention(*qkv, 3, local=5, **own)),
        (("strided", 3), lambda *qkv, **own: cuattn.strided_attention(*qkv, 3, **own)),
        (["strided", 3, None], lambda *qkv, **own: cuattn.strided_attention(*qkv, 3, **own)),
        (MASK, lambda *qkv, **own: cuattn.block_sparse_attention(*qkv, MASK, **own)),
    ],
    ids=["window", "strided with a window", "strided", "strided, as a list", "blocks"],
)
@pytest.mark.parametrize("options", [{}, {"causal": True, "scale": 0.3}], ids=str)
def test_each_pattern_is_its_function(executor: Any, pattern: Any, same: Any, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    qkv = [executor.array(rng.standard_normal((1, 40, heads, 32)).astype(np.float32)) for heads in (2, 1, 1)]
    expected, expected_lse = same(*qkv, return_lse=True, **options)
    out = executor.xp.zeros((1, 40, 2, 32), np.float32)
    found, lse = cuattn.sparse_attention(*qkv, pattern=pattern, out=out, return_lse=True, **options)
    assert found is out
    assert executor.numpy(found).tobytes() == executor.numpy(expected).tobytes()
    assert executor.numpy(lse).tobytes() == executor.numpy(expected_lse).tobytes()


@pytest.mark.parametrize(
    "pattern",
    [
        None,
        "window",
        (),
        ("window",),
        ("window", 1),
        ("window", 1, 0, 0),
        ("strided",),
        ("blocks", 1, 2),
        MASK.blocks,
        3,
    ],
    ids=str,
)
def test_what_is_no_pattern(pattern: Any) -> None:
    q = np.zeros((1, 40, 2, 32), np.float32)
    with pytest.raises(ArgumentError, match="pattern is "):
        cuattn.sparse_attention(q, q, q, pattern=pattern)


def test_a_pattern_of_wrong_numbers_is_refused_by_its_function() -> None:
    q = np.zeros((1, 40, 2, 32), np.float32)
    for pattern, says in (
        (("window", -1, 0), "window"),
        (("strided", 0, None), "stride"),
        (("strided", 2, -1), "local"),
    ):
        with pytest.raises(ArgumentError, match=says):
            cuattn.sparse_attention(q, q, q, pattern=pattern)
