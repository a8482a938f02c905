"""`KVCache`: sequences in rows, step by step, against plain lists; and that a program can take a `PagedKVCache`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from row_model import HEAD_DIM, HEAD_DIM_V, HEADS, KV_HEADS, LAYERS, contiguous, sizes

import cuattn
from cuattn import KVCache, PagedKVCache, errors


@pytest.mark.parametrize("options", ({}, {"softcap": 3.0, "window": (3, None), "scale": 0.4}), ids=("plain", "options"))
def test_prefill_and_decode(executor, options):
    model = contiguous(executor)
    first, second = model.add(), model.add()
    model.step([first, second], [5, 2], **options)
    model.step([second], [1], **options)
    model.step([second, first], [1, 1], **options)
    model.step([first, second], [3, 0], **options)
    model.check()


@pytest.mark.parametrize("order", ((0, 1, 2), (1, 2), (2, 0), (1,)), ids=str)
def test_rows_in_any_order(executor, order):
    """Rows that follow one another are read where they are, others through a table: the same answers."""
    model = contiguous(executor)
    seqs = [model.add() for _ in range(3)]
    model.step(seqs, [4, 1, 6])
    chosen = [seqs[i] for i in order]
    model.step(chosen, [2] * len(chosen), batched=True)


@pytest.mark.parametrize("kv_format", ("e4m3fn", "int8"))
def test_quantized_rows_are_read_with_their_own_scales(executor, kv_format):
    """The last two of three rows, of which each slot has a scale: as the same tokens in pages."""
    rng = np.random.default_rng(1)
    shapes = (6, HEADS, HEAD_DIM), (6, KV_HEADS, HEAD_DIM), (6, KV_HEADS, HEAD_DIM_V)
    q, k, v = (executor.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
    own = sizes(executor, num_layers=1, kv_format=kv_format)
    results = []
    for cache in (KVCache(3, 5, **own), PagedKVCache(9, 2, **own)):
        seqs = [cache.add() for _ in range(3)][1:]
        step = cache.reserve(seqs, 3)
        step.append(0, k, v)
        results.append(executor.numpy(step.attend(0, q.reshape(2, 3, HEADS, HEAD_DIM))))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)  # the same numbers; sums in another order


def test_either_cache_serves_a_program(executor):
    """The program knows neither; `tokens`, `length` and the results are the same."""
    rng = np.random.default_rng(2)
    drawn = {
        n: [rng.standard_normal((n, heads, HEAD_DIM)).astype(np.float32) for heads in (4, 2, 2)] for n in (3, 1, 2)
    }

    def program(cache):
        seq = cache.add([7, 8, 9])
        outs = []
        for n, tokens in ((3, None), (1, [5]), (2, [[6, 4]])):
            q, k, v = (executor.array(x.copy()) for x in drawn[n])
            with cache.reserve([seq], [n], tokens) as step:
                step.append(0, k, v, rope=cuattn.Rotary())
                outs.append(executor.numpy(step.attend(0, q, rope=cuattn.Rotary())))
                step.commit()
        cache.truncate(seq, 4)
        state = seq.length, seq.tokens
        cache.free(seq)
        return np.concatenate(outs), state

    own = sizes(executor, num_layers=1, head_dim_v=None)
    (out, state), (expected, its_state) = (
        program(cache) for cache in (KVCache(1, 6, **own), PagedKVCache(3, 2, **own))
    )
    assert state == its_state == (4, (7, 8, 9, 5))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_fails_is_aborted(executor):
    model = contiguous(executor)
    seq = model.add()
    model.step([seq], [2])
    before = model.state()
    with pytest.raises(ZeroDivisionError), model.reserve([seq], [3]) as step:
        model.append(step, 0)
        raise ZeroDivisionError
    assert model.state() == before and not step.is_open
    model.step([seq], [1])  # reads nothing of what was written
    model.check()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda m, s: m.cache.reserve([s], [4]), errors.CacheFullError, r"seqs\[0\] has 9 tokens and counts\[0\] is 4"),
        (lambda m, s: m.cache.reserve([s], [-1]), errors.ArgumentError, r"counts\[0\] is -1"),
        (lambda m, s: m.cache.reserve([s], [1, 1]), errors.ArgumentError, "counts has 2 numbers for 1 sequences"),
        (lambda m, s: m.cache.reserve([s, s], 1), errors.ArgumentError, "seqs names a sequence twice"),
        (lambda m, s: m.cache.reserve([0], 1), errors.ArgumentError, r"seqs\[0\]: int"),
        (lambda m, s: m.cache.reserve([s], [2], [1]), errors.ArgumentError, "tokens has 1 numbers; 2 are reserved"),
        (lambda m, s: m.cache.truncate(s, 10), errors.ArgumentError, "length is 10; an integer from 0 to 9"),
        (lambda m, s: m.cache.truncate(s, -1), errors.ArgumentError, "length is -1"),
        (lambda m, s: m.cache.truncate(s, 1.5), errors.ArgumentError, r"length is 1\.5"),
        (lambda m, s: m.cache.layer_arrays(-1), errors.ArgumentError, "layer is -1; an integer from 0 to 1"),
        (lambda m, s: m.cache.add(["a"]), errors.ArgumentError, "tokens holds 'a'"),
    ),
)
def test_calls_that_fail_change_nothing(executor, call, error, message):
    model = contiguous(executor)
    seq = model.add()
    model.step([seq], [9])
    before = model.state()
    with pytest.raises(error, match=message):
        call(model, seq)
    assert model.state() == before
    model.check()


def test_sequences_in_the_wrong_state(executor):
    model, other = contiguous(executor, batch=1), contiguous(executor, batch=1)
    seq = model.add()
    with pytest.raises(errors.CacheFullError, match="the cache has 1 sequences"):
        model.cache.add()
    for call in (model.cache.free, model.cache.reset, lambda seq: model.cache.reserve([seq], 1)):
        with pytest.raises(errors.SequenceError, match="belongs to another cache"):
            call(other.add() if not other.streams else next(iter(other.streams)))
    step = model.reserve([seq], [1])
    for call in (model.cache.free, model.cache.reset, lambda seq: model.cache.reserve([seq], 1)):
        with pytest.raises(errors.SequenceError, match="is in an open step"):
            call(seq)
    step.abort()
    model.free(seq)
    for call in (model.cache.free, model.cache.reset, lambda seq: model.cache.reserve([seq], 1)):
        with pytest.raises(errors.SequenceError, match="freed"):
            call(seq)
    assert model.add().row == 0 and "freed" in repr(seq)


def test_steps_in_the_wrong_order(executor):
    model = contiguous(executor)
    seq = model.add()
    step = model.reserve([seq], [2])
    with pytest.raises(errors.StepError, match="layer 0 must be appended"):
        model.attend(step, 0)
    model.append(step, 0)
    with pytest.raises(errors.StepError, match="layer 0 has been appended"):
        model.append(step, 0)
    with pytest.raises(errors.StepError, match=r"layers \[1\] have not been appended"):
        step.commit()
    with pytest.raises(errors.ArgumentError, match=f"layer is {LAYERS}; an integer from 0 to {LAYERS - 1}"):
        step.attend(LAYERS, None)
    model.append(step, 1)
    model.attend(step, 1)
    model.commit(step)
    for call in (step.commit, step.abort, lambda: model.append(step, 0)):
        with pytest.raises(errors.StepError, match="the step is over"):
            call()
    model.check()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    (
        ({"batch": 0}, errors.ArgumentError, "batch is 0"),
        ({"max_seqlen": True}, errors.ArgumentError, "max_seqlen is True"),
        ({"num_layers": 1.0}, errors.ArgumentError, r"num_layers is 1\.0"),
        ({"num_kv_heads": -1}, errors.ArgumentError, "num_kv_heads is -1"),
        ({"head_dim": 513}, errors.ArgumentError, "head_dim is 513"),
        ({"dtype": "int8"}, errors.DTypeError, "dtype is 'int8'"),
        ({"kv_format": "fp5"}, errors.ArgumentError, "kv_format is 'fp5'"),
        ({"k_scale": 1.0}, errors.ArgumentError, "k_scale was given; kv_format float32 has no scales"),
        ({"array_module": "numpy"}, errors.ArrayTypeError, "array_module is 'numpy'"),
    ),
)
def test_caches_that_cannot_be(executor, more, error, message):
    with pytest.raises(error, match=message):
        contiguous(executor, **more)


def test_threads(executor):
    """Each thread has sequences of its own; no row is given out twice and none is lost."""
    cache = KVCache(8, 4, **sizes(executor))

    def work(_):
        for _ in range(50):
            seq = cache.add()
            cache.reserve([seq], 2).abort()
            cache.free(seq)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.stats().sequences == 0
    assert sorted(cache.add().row for _ in range(8)) == list(range(8))
