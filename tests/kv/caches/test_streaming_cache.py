"""`StreamingKVCache`: what each token sees, against lists that get the tokens one by one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from row_model import HEAD_DIM, HEAD_DIM_V, HEADS, LAYERS, streaming

import cuattn
from cuattn import StreamingKVCache, errors, reference

ROPE = cuattn.Rotary(base=50.0, rotary_dim=6)
SLOPES = np.array([[0.5, 0.25, 0.1, 0.0], [0.0, 1.0, 0.3, 0.2]], np.float32)


@pytest.mark.parametrize("num_sinks", (0, 2))
@pytest.mark.parametrize("rope", (None, ROPE), ids=("unrotated", "rotated"))
def test_one_token_at_a_time(executor, num_sinks, rope):
    model = streaming(executor, num_sinks, rope=rope)
    seq = model.add()
    for _ in range(num_sinks + 9):  # past the window, and once around the ring of seven slots
        model.step([seq], [1])
        model.check()
    assert model.cache.cached_tokens(seq).tolist() == [*range(num_sinks), *range(num_sinks + 5, num_sinks + 9)]


@pytest.mark.parametrize("counts", ((6, 3, 3), (9,), (5, 2, 1, 3), (1, 3, 3, 3, 3)), ids=str)
def test_chunks_in_which_the_window_runs_over(executor, counts):
    """Beside them a sequence that gets one token a step, and one that gets none."""
    model = streaming(executor, rope=ROPE)
    seqs = [model.add() for _ in range(3)]
    for count in counts:
        model.step(seqs, [count, 1, 0])
    model.check()


def test_any_chunks_give_what_single_tokens_give(executor):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((13, heads, HEAD_DIM)).astype(np.float32) for heads in (4, 2, 2))
    own = dict(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM, dtype=np.float32, array_module=executor.xp)

    def outs(counts):
        cache = StreamingKVCache(1, 4, batch=1, max_chunk=6, rope=ROPE, **own)
        seq, result = cache.add(), []
        for first, end in zip(np.cumsum([0, *counts[:-1]]), np.cumsum(counts), strict=True):
            with cache.reserve([seq], end - first) as step:
                step.append(0, executor.array(k[first:end].copy()), executor.array(v[first:end].copy()))
                result.append(executor.numpy(step.attend(0, executor.array(q[first:end].copy()))))
                step.commit()
        return np.concatenate(result)

    expected = outs([1] * 13)
    for counts in ([10, 3], [2, 6, 5], [4, 1, 6, 2]):
        np.testing.assert_allclose(outs(counts), expected, rtol=1e-5, atol=1e-6)


def test_until_something_is_evicted_it_is_attention_to_the_whole_prefix(executor):
    model = streaming(executor, rope=ROPE)
    seq = model.add()
    step = model.reserve([seq], [6])  # two sinks, and a window of four
    model.append(step, 0)
    q, k, v = step.layers[0]
    out = executor.numpy(step.attend(0, executor.array(q)))
    turned = (reference.rope(x[None], np.arange(6), base=50.0, rotary_dim=6) for x in (q, k))
    expected, _ = reference.attention(*turned, v[None], causal=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batched", (False, True), ids=("packed", "batched"))
@pytest.mark.parametrize(
    "options",
    ({"softcap": 2.0, "scale": 0.3}, {"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES[0], "window": (2, None)}),
    ids=("softcap", "slopes of each sequence", "window in the cache"),
)
def test_options(executor, options, batched):
    model = streaming(executor)
    seqs = [model.add(), model.add()]
    model.step(seqs, [3, 3], batched=batched, **options)
    model.step(seqs, [3, 3], batched=batched, **options)
    model.step(seqs, [2, 2], batched=batched, **options)


@pytest.mark.parametrize("dtype", (np.float16, ml_dtypes.bfloat16, np.float64), ids=lambda dtype: np.dtype(dtype).name)
def test_dtypes(executor, dtype):
    model = streaming(executor, rope=cuattn.Rotary(), dtype=dtype)
    seq = model.add()
    for count in (5, 3, 1):
        model.step([seq], [count])


def test_quantized(executor):
    """Numbers that have codes of their own, under a scale of 1: nothing is rounded."""
    model = streaming(executor, rope=ROPE, kv_format="e4m3fn", k_scale=1.0, v_scale=1.0)
    model.numbers = lambda *shape: model.rng.integers(-8, 9, shape).astype(np.float32) / 4
    seq = model.add()
    for count in (5, 3, 1):
        model.step([seq], [count])


def test_out(executor):
    model = streaming(executor)
    seq = model.add()
    model.step([seq], [6])
    step = model.reserve([seq], [2])
    model.append(step, 0)
    q, out = step.layers[0][0], executor.array(np.zeros((1, 2, HEADS, HEAD_DIM_V), np.float32))
    expected = executor.numpy(step.attend(0, executor.array(q)))
    assert step.attend(0, executor.array(q[None]), out=out) is out
    np.testing.assert_array_equal(executor.numpy(out)[0], expected)
    with pytest.raises(errors.ShapeError, match="out has shape"):
        step.attend(0, executor.array(q[None]), out=out[:, :1])


def test_an_aborted_step_has_evicted_nothing(executor):
    model = streaming(executor, rope=ROPE)
    seq = model.add()
    model.step([seq], [6])
    for _ in range(3):
        step = model.reserve([seq], [3])
        for layer in range(LAYERS):
            model.append(step, layer)
            model.attend(step, layer)
        step.abort()
        model.check()
    model.step([seq], [1])
    model.check()


def test_truncate(executor):
    """Back among the latest tokens, to where the window begins, then on; into the sinks, and on from there."""
    model = streaming(executor, rope=ROPE)
    seq = model.add()
    model.step([seq], [6])
    model.step([seq], [3])  # 0 1 | 5 6 7 8
    for length in (7, 6, 5):
        model.truncate(seq, length)
        model.check()
        model.step([seq], [2])
    for length in (4, 3):
        with pytest.raises(errors.ArgumentError, match=rf"length is {length}, but tokens 2 to 4 have been evicted"):
            model.cache.truncate(seq, length)
    model.check()
    for length in (2, 1, 0):
        model.truncate(seq, length)
        model.step([seq], [3])
        model.check()
    model.cache.reset(seq)
    assert seq.length == 0 and model.cache.cached_tokens(seq).size == 0


def test_room(executor):
    """An empty sequence takes all slots at once, a full one what is beside its window."""
    model = streaming(executor)  # two sinks, a window of four, three slots more
    seq = model.add()
    with pytest.raises(errors.CacheFullError, match=r"counts\[0\] is 10: there is room for 7 more tokens behind"):
        model.cache.reserve([seq], [10])
    model.step([seq], [9])
    with pytest.raises(errors.CacheFullError, match=r"counts\[0\] is 4: there is room for 3 more.*max_chunk=3"):
        model.cache.reserve([seq], [4])
    model.check()
    model.step([seq], [3])


@pytest.mark.parametrize("option", ({"causal": True}, {"rope": ROPE}, {"rotate_keys": False}), ids=str)
def test_what_the_cache_decides(executor, option):
    model = streaming(executor)
    step = model.reserve([model.add()], [1])
    if "rope" in option:
        with pytest.raises(errors.ArgumentError, match=r"rope is Rotary.*a streaming cache decides that itself"):
            step.append(0, *step.layers[0][1:], **option)
    model.append(step, 0)
    with pytest.raises(errors.ArgumentError, match=f"{next(iter(option))} is .*a streaming cache decides that itself"):
        step.attend(0, step.layers[0][0], **option)


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"num_sinks": -1}, "num_sinks is -1; an integer from 0"),
        ({"window": 0}, "window is 0; an integer from 1"),
        ({"max_chunk": 0}, "max_chunk is 0"),
        ({"rope": "yes"}, "rope is 'yes'; a cuattn.Rotary or None"),
        ({"window": 2**30, "batch": 4}, r"batch \* \(num_sinks \+ window \+ max_chunk\) is"),
    ),
)
def test_caches_that_cannot_be(executor, more, message):
    with pytest.raises(errors.ArgumentError, match=message):
        streaming(executor, **more)


def test_a_result_does_not_go_into_the_cache(executor):
    model = streaming(executor)
    step = model.reserve([model.add()], [1])
    model.append(step, 0)
    pages = model.cache._storage.layers[0]["v_pages"]
    q = executor.array(np.zeros((1, 1, pages.shape[2], HEAD_DIM), np.float32))
    for out in (pages[:1], q[..., :HEAD_DIM_V]):
        with pytest.raises(errors.OverlapError, match="out lies in the memory range of"):
            step.attend(0, q, out=out)
