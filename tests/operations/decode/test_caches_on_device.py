"""Caches of rows and the flash-attn function on a stand-in for CuPy: the same numbers as on the host, and who waits."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_cupy import ComputingCupy, installed

import cuattn
from cuattn.compat.flash_attn import flash_attn_with_kvcache
from cuattn.ops.rotary.arguments import turn_words

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch, ComputingCupy) as module:
        yield module
        turn_words.cache_clear()  # it holds arrays of this stand-in


def drawn(rng, *shape):
    return rng.standard_normal((*shape, HEAD_DIM)).astype(np.float16)


def streamed(xp):
    """What a streaming cache gives while two sequences run over their windows, one token at a time and several."""
    rng, outs = np.random.default_rng(0), []
    cache = cuattn.StreamingKVCache(
        *(2, 6), rope=cuattn.Rotary(), batch=2, num_layers=1, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        dtype=np.float16, array_module=xp,
    )  # fmt: skip
    seqs = [cache.add(), cache.add()]
    for counts in ([5, 3], [4, 1], [1, 7], [1, 1]):
        q, k, v = (xp.asarray(drawn(rng, sum(counts), heads)) for heads in (HEADS, KV_HEADS, KV_HEADS))
        with cache.reserve(seqs, counts) as step:
            step.append(0, k, v)
            outs.append(step.attend(0, q))
            step.commit()
    return outs


def generated(xp, *, lengths_on_device=False, **places):
    """Steps of the flash-attn function, and the cache that they leave."""
    rng = np.random.default_rng(1)
    k_cache, v_cache = (xp.asarray(drawn(rng, 6, 8, KV_HEADS)) for _ in "kv")
    cos, sin = (xp.asarray(x) for x in cuattn.rope_frequencies(HEAD_DIM, 64))
    put = xp.asarray if lengths_on_device else np.asarray
    places = {name: put(np.asarray(x, np.int32)) for name, x in places.items()}
    outs = []
    for first in range(3):
        q, k, v = (xp.asarray(drawn(rng, 2, 2, heads)) for heads in (HEADS, KV_HEADS, KV_HEADS))
        outs += flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, put(np.array([2 * first, 1], np.int32)), **places, causal=True,
            rotary_interleaved=False, return_softmax_lse=True,
        )  # fmt: skip
    return [*outs, k_cache, v_cache]


def on_host(arrays):
    return [x if isinstance(x, np.ndarray) else x.get() for x in arrays]


def test_a_streaming_cache(cupy):
    expected = streamed(np)
    outs = streamed(cupy)
    assert cupy.num_synchronizations == 0
    assert all(isinstance(out, cupy.ndarray) for out in outs)
    for out, wanted in zip(on_host(outs), expected, strict=True):
        np.testing.assert_allclose(out.astype(float), wanted.astype(float), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "places",
    [{}, {"cache_batch_idx": [4, 1]}, {"cache_leftpad": [0, 1]}, {"block_table": [[0, -1], [4, 2]]}],
    ids=lambda places: "".join(places),
)
@pytest.mark.parametrize("lengths_on_device", (False, True))
def test_flash_attn(cupy, lengths_on_device, places):
    """Lengths and tables that only the device knows are not looked at, and are the same call."""
    expected = generated(np, **places)
    outs = generated(cupy, lengths_on_device=lengths_on_device, **places)
    if lengths_on_device:
        assert cupy.num_synchronizations == 0
    for out, wanted in zip(on_host(outs), expected, strict=True):
        np.testing.assert_allclose(out.astype(float), wanted.astype(float), rtol=0, atol=2e-3)
