"""The Hopper forward kernel on packed sequences."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import prepare
from hopper_calls import (
    BF16,
    F16,
    SMALL,
    TURNS,
    assert_varlen_right,
    call_varlen,
    everything,
    same_bits,
)
from packed_sequences import BAD_STARTS, LENGTHS, pack

from cuattn import host
from cuattn.ops.attention import varlen
from cuattn.ops.attention.forward.launch import forward


@pytest.mark.parametrize("name", ("mixed", "empty_ones", "one_long_among_many", "more_queries_than_keys"))
def test_sequences(executor, name):
    for heads, causal in (((2, 2), False), ((8, 2), True)):
        arrays, starts = pack(LENGTHS[name], heads=heads, head_dims=(64, 40))
        assert_varlen_right(executor, arrays, starts, causal=causal)


def test_sequences_with_everything(executor):
    arrays, starts = pack(LENGTHS["mixed"], BF16, heads=(4, 2), head_dims=(64, 64))
    options = everything(np.random.default_rng(2), 5, 4, 130, 130) | {"diagonal_offset": np.int32([0, 3, -5, 60, 200])}
    results = [
        assert_varlen_right(executor, arrays, starts, config=TURNS, schedule_on_device=on_device, **options)
        for on_device in (False, True)
    ]
    assert same_bits(*results)


def test_other_sequences_are_never_felt(executor):
    """NaN and infinities in the sequences before and after: queries, keys and values."""
    (q, k, v), starts = pack([(30, 40), (70, 65), (20, 90)], head_dims=(64, 64))
    out, lse = call_varlen(executor, q, k, v, *starts)
    rows, columns = (slice(own[1], own[2]) for own in starts)
    for poison in (np.nan, np.inf):
        alone = []
        for x, own in ((q, rows), (k, columns), (v, columns)):
            poisoned = np.full_like(x, poison)
            poisoned[own] = x[own]
            alone.append(poisoned)
        again, lse_again = call_varlen(executor, *alone, *starts)
        assert same_bits((again[rows], lse_again[:, rows]), (out[rows], lse[:, rows]))


@pytest.mark.parametrize("starts", BAD_STARTS)
def test_unchecked_lengths_touch_nothing_foreign(executor, starts):
    """Lengths that only the device knows may be nonsense; sequences that overlap are written several times."""
    arrays, good = pack([(20, 20), (30, 30), (20, 20)], head_dims=(64, 64))
    moved, _ = prepare(executor, arrays, {})
    target = executor.guarded((70, 2, 64), F16)
    target.array[...] = 0
    problem, packed = varlen.check(*moved, *good, out=target.array)
    packed.host = packed.max_seqlen_q = packed.max_seqlen_k = None
    packed.cu_seqlens_q = packed.cu_seqlens_k = executor.array(np.array(BAD_STARTS[starts], np.int32))
    with host.check("mem", "init"):
        forward(problem, return_lse=False, packed=packed, config=SMALL)
    target.check()
