"""`PagedKVCache` by examples: what happens when pages run out, what is refused, and attention over what it holds."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from cache_model import CacheModel
from paged_steps import make, prompt, step

import cuattn
from cuattn import errors
from cuattn.testing import assert_paged_close, assert_paged_varlen_close

# --- running out, and misuse ----------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_out_of_pages_in_the_middle_changes_nothing(executor) -> None:
    model = CacheModel(executor, num_pages=6, page_size=4)
    first = prompt(model, range(6))
    second = model.fork(first)
    cached = prompt(model, range(50, 55))
    model.free(cached)
    before = model.state()
    with pytest.raises(errors.OutOfPagesError, match="5 pages are needed for 19 tokens of 2 sequences; 4 of 6") as info:
        model.cache.reserve([first, second], [9, 10])
    assert model.state() == before
    assert (info.value.needed, info.value.allocatable) == (5, 4)
    assert isinstance(info.value, MemoryError)
    step(model, [first, second], [2, 10])  # one copy and three pages: just as many as there are
    assert model.cache.stats().allocatable == 1
    model.finish()


def test_a_failed_copy_changes_nothing(monkeypatch) -> None:
    cache = make(prefix_caching=True)
    seq = cache.add([1, 2, 3])
    rows = np.zeros((3, 1, 1), np.float32)
    with cache.reserve([seq], [3]) as made:
        made.append(0, rows, rows)
        made.commit()
    other = cache.fork(seq)
    before = cache.stats(), seq.pages, other.pages

    def fail(*args):
        raise errors.LaunchError("no")

    monkeypatch.setattr(cache._storage, "copy", fail)
    with pytest.raises(errors.LaunchError):
        cache.reserve([seq, other], 1)
    assert (cache.stats(), seq.pages, other.pages) == before
    cache.free(other)
    cache.reserve([seq], 1).abort()


def test_steps_out_of_order() -> None:
    cache = make(num_layers=2)
    seq = cache.add()
    made = cache.reserve([seq], 2)
    rows, q = np.zeros((2, 1, 1), np.float32), np.zeros((2, 1, 1), np.float32)
    with pytest.raises(errors.StepError, match="must be appended before"):
        made.attend(0, q)
    with pytest.raises(errors.ArgumentError, match="layer is 2; an integer from 0 to 1"):
        made.append(2, rows, rows)
    with pytest.raises(errors.ShapeError, match="k has shape"):
        made.append(0, rows[:1], rows)
    with pytest.raises(errors.ArrayTypeError):
        made.append(0, np.ndarray, rows)
    with pytest.raises(errors.DTypeError):
        made.append(0, rows.astype(np.float16), rows.astype(np.float16))
    made.append(0, rows, rows)
    with pytest.raises(errors.StepError, match="layer 0 has been appended"):
        made.append(0, rows, rows)
    with pytest.raises(errors.ShapeError, match="the step has 1 sequences"):
        made.attend(0, np.zeros((2, 1, 1, 1), np.float32))
    with pytest.raises(TypeError, match="k_pages"):
        made.attend(0, q, k_pages=rows)
    with pytest.raises(errors.StepError, match=r"layers \[1\] have not been appended"):
        made.commit()
    assert made.is_open and seq.length == 0
    for call in (cache.free, cache.fork, cache.swap_out, lambda seq: cache.reserve([seq], 1)):
        with pytest.raises(errors.SequenceError, match="is in an open step"):
            call(seq)
    made.append(1, rows, rows)
    made.commit()
    assert seq.length == 2
    for call in (made.commit, made.abort, lambda: made.append(0, rows, rows), lambda: made.attend(0, q)):
        with pytest.raises(errors.StepError, match="the step is over"):
            call()
    cache.free(seq)
    with pytest.raises(errors.SequenceError, match="freed"):
        cache.free(seq)
    assert cache.stats().free == cache.num_pages


def test_leaving_a_step_by_an_exception_aborts_it() -> None:
    cache = make()
    seq = cache.add()
    with pytest.raises(ZeroDivisionError), cache.reserve([seq], 4):
        raise ZeroDivisionError
    assert cache.stats().used == 0 and seq.length == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, s: c.reserve([s], 1.5), errors.ArgumentError, "counts is 1.5"),
        (lambda c, s: c.reserve([s], [1, 2]), errors.ArgumentError, "counts has 2 numbers for 1"),
        (lambda c, s: c.reserve([s], [True]), errors.ArgumentError, r"counts\[0\] is True"),
        (lambda c, s: c.reserve([s], np.array([-1])), errors.ArgumentError, r"counts\[0\] is"),
        (lambda c, s: c.reserve([s, s], 1), errors.ArgumentError, "twice"),
        (lambda c, s: c.reserve([3], 1), errors.ArgumentError, r"seqs\[0\]: int"),
        (lambda c, s: c.reserve(None, 1), errors.ArgumentError, "seqs: NoneType"),
        (lambda c, s: c.reserve([s], ((1,), 2)), errors.ArgumentError, "counts has 2 numbers for 1"),
        (lambda c, s: c.reserve([s], [(1,)]), errors.ArgumentError, r"counts\[0\] is"),
        (lambda c, s: c.swap_out(np.array(0.5)), errors.ArgumentError, "seqs: ndarray"),
        (lambda c, s: c.block_tables([s, 1]), errors.ArgumentError, r"seqs\[1\]: int"),
        (lambda c, s: c.layer_arrays(-1), errors.ArgumentError, "layer is -1; an integer from 0 to 0"),
        (lambda c, s: c.reserve([s], 2, [1]), errors.ArgumentError, "tokens has 1 numbers; 2"),
        (lambda c, s: c.reserve([s], 2, [[1]]), errors.ArgumentError, r"tokens\[0\] has 1 numbers"),
        (lambda c, s: c.reserve([s], 2, [[1, 2], None]), errors.ArgumentError, "tokens has 2 entries"),
        (lambda c, s: c.reserve([s], 2, [[7, 7]]), errors.ArgumentError, "but add"),
        (lambda c, s: c.reserve([s], 2, "ab"), errors.ArrayTypeError, "tokens: str"),
        (lambda c, s: c.reserve([s], 2, [[1, 2.5]]), errors.ArgumentError, "holds 2.5"),
        (lambda c, s: c.add("prompt"), errors.ArrayTypeError, "tokens: str"),
        (lambda c, s: c.add([1.0]), errors.ArgumentError, "tokens holds 1.0"),
        (lambda c, s: c.add(np.zeros((2, 2), int)), errors.ArgumentError, "integers"),
        (lambda c, s: c.add([1], cache_key=[]), errors.ArgumentError, "hashable"),
        (lambda c, s: c.truncate(s, 1), errors.ArgumentError, "length is 1; an integer from 0 to 0"),
        (lambda c, s: c.swap_in(s), errors.SequenceError, "one that is swapped is needed"),
        (lambda c, s: make().fork(s), errors.SequenceError, "belongs to another cache"),
    ],
)
def test_bad_arguments_change_nothing(call, error, message) -> None:
    cache = make()
    seq = cache.add([1, 2, 3])
    before = cache.stats(), seq.pages, seq.tokens
    with pytest.raises(error, match=message):
        call(cache, seq)
    assert (cache.stats(), seq.pages, seq.tokens) == before
    cache.reserve([seq], [3]).abort()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_pages=0), errors.ArgumentError, "num_pages is 0"),
        (dict(page_size=-1), errors.ArgumentError, "page_size is -1"),
        (dict(num_layers=1.0), errors.ArgumentError, "num_layers is 1.0"),
        (dict(num_kv_heads=True), errors.ArgumentError, "num_kv_heads is True"),
        (dict(head_dim=513), errors.ArgumentError, "head_dim is 513; 1 to 512"),
        (dict(head_dim_v=513), errors.ArgumentError, "head_dim_v is 513"),
        (dict(dtype=np.int32), errors.DTypeError, "dtype is .*int32"),
        (dict(dtype="no"), errors.DTypeError, "dtype is 'no'"),
        (dict(kv_format="int4"), errors.ArgumentError, "kv_format is 'int4'"),
        (dict(kv_format="float16"), errors.ArgumentError, "a plain format is the dtype's own"),
        (dict(kv_format="int8", dtype=np.float64), errors.DTypeError, "dtype is float64"),
        (dict(kv_format="nvfp4", head_dim=3), errors.ArgumentError, "head_dim is 3"),
        (dict(k_scale=1.0), errors.ArgumentError, "k_scale was given"),
        (dict(kv_format="mxfp4", head_dim=2, v_scale=1.0), errors.ArgumentError, "v_scale was given"),
        (dict(kv_format="int8", k_scale=0.0), errors.NonFiniteError, "k_scale is 0.0"),
        (dict(kv_format="int8", k_scale=[1.0, 2.0]), errors.ShapeError, "k_scale"),
        (dict(prefix_caching=1), errors.ArgumentError, "prefix_caching is 1"),
        (dict(array_module=threading), errors.ArrayTypeError, "array_module"),
    ],
)
def test_bad_caches(options, error, message) -> None:
    with pytest.raises(error, match=message):
        make(**options)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_format", "scales"),
    [(None, {}), ("int8", {}), ("e4m3fn", dict(k_scale=[[0.5, 0.25], [1.0, 2.0]], v_scale=0.125)), ("nvfp4", {})],
)
def test_attention_over_steps_is_that_of_the_reference(executor, kv_format, scales) -> None:
    """Prefill, chunks and single tokens in one batch, with a fork on the way; every layer of every step."""
    rng, dtype = np.random.default_rng(0), np.dtype(np.float16)
    options = dict(num_layers=2, num_kv_heads=2, head_dim=32, dtype=dtype, array_module=executor.xp, **scales)
    cache = cuattn.PagedKVCache(16, 4, kv_format=kv_format, **options)
    seqs = [cache.add(), cache.add()]

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    def check(counts):
        with cache.reserve(seqs, counts) as made:
            for layer in range(2):
                k, v = draw(made.num_tokens, 2, 32), draw(made.num_tokens, 2, 32)
                made.append(layer, executor.array(k), executor.array(v))
                q = draw(made.num_tokens, 4, 32)
                out, lse = made.attend(layer, executor.array(q), return_lse=True)
                arrays = {name: x for name, x in cache.layer_arrays(layer).items() if name != "kv_format"}
                arrays = {name: x if isinstance(x, float) else executor.numpy(x) for name, x in arrays.items()}
                pages = arrays.pop("k_pages"), arrays.pop("v_pages")
                tables = made.block_tables, made.cu_seqlens, made.seqlens_k
                how = dict(kv_format=cache.kv_format, **arrays)
                assert_paged_varlen_close(executor.numpy(out), q, *pages, *tables, lse=executor.numpy(lse), **how)
                if len(set(counts)) == 1:
                    batch = q.reshape(len(seqs), counts[0], 4, 32)
                    out, lse = made.attend(layer, executor.array(batch), return_lse=True)
                    tables = made.block_tables, made.seqlens_k
                    assert_paged_close(executor.numpy(out), batch, *pages, *tables, lse=executor.numpy(lse), **how)
            made.commit()

    check([7, 1])
    check([1, 5])
    seqs.append(cache.fork(seqs[0]))
    check([1, 1, 1])
    check([2, 2, 2])
    cache.swap_out(seqs[:1])
    cache.swap_in(seqs[:1])
    check([1, 1, 1])


def test_attend_writes_where_it_is_told(executor) -> None:
    cache = make(head_dim=8, array_module=executor.xp)
    rng = np.random.default_rng(0)
    seqs = [cache.add(), cache.add()]
    for counts in ([1, 1], [3, 2]):
        with cache.reserve(seqs, counts) as made:
            k, q = (rng.standard_normal((made.num_tokens, heads, 8), np.float32) for heads in (1, 2))
            made.append(0, executor.array(k), executor.array(k))
            out = executor.guarded(q.shape, np.float32)
            result = made.attend(0, executor.array(q), out=out.array)
            expected = made.attend(0, executor.array(q))
            np.testing.assert_array_equal(executor.numpy(out.array), executor.numpy(expected))
            assert result.shape == q.shape
            out.check()
            made.commit()


def test_keys_are_turned_at_the_positions_of_their_tokens(executor) -> None:
    cache = make(head_dim=8, array_module=executor.xp)
    rng = np.random.default_rng(0)
    seq, start = cache.add(), 0
    for count in (3, 4):
        k = rng.standard_normal((count, 1, 8), np.float32)
        with cache.reserve([seq], count) as made:
            made.append(0, executor.array(k), executor.array(k), rope=cuattn.Rotary())
            made.commit()
        pages = executor.numpy(cache.layer_arrays(0)["k_pages"])
        stored = pages[list(seq.pages)].reshape(-1, 1, 8)[start : seq.length]
        turned = executor.numpy(cuattn.rope(executor.array(k), np.arange(start, start + count)))
        np.testing.assert_array_equal(stored, turned)
        start += count


def test_threads_share_a_cache() -> None:
    """Metadata from several threads at once: the lock keeps every count right."""
    cache = make(num_pages=64, page_size=2, prefix_caching=True)
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                seqs = [cache.add(rng.integers(0, 2, 6).tolist())]
                made = cache.reserve(seqs, 6 - seqs[0].length)
                rows = np.zeros((made.num_tokens, 1, 1), np.float32)
                made.append(0, rows, rows)
                made.commit()
                seqs.append(cache.fork(seqs[0]))
                cache.reserve(seqs, [1, 2]).abort()
                cache.swap_out(seqs)
                cache.swap_in(seqs)
                for seq in seqs:
                    cache.free(seq)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = cache.stats()
    assert stats.used == stats.host_pages == 0 and stats.cached + stats.free == 64
    assert not any(cache._pool.references)
