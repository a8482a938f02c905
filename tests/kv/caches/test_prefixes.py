"""The index of prefixes: tokens whose hashes Python has alike, and keys that it has equal."""

from __future__ import annotations

import enum
import itertools

import numpy as np
import pytest

import cuattn
from bench.stress.cache_world import SIZES
from cuattn import errors
from cuattn.kv.caches.prefix import PrefixIndex, digest_of


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize("alike", [(-1, -2), (0, 2**61 - 1, 2**62 - 2), (5, 2**64 - 3)], ids=str)
def test_tokens_whose_hashes_are_alike_in_python(alike) -> None:
    index = PrefixIndex()
    root = index.root(None)
    pages = [tokens for _, tokens in zip(range(4000), itertools.product(alike, repeat=12), strict=False)]
    for page, tokens in enumerate(pages):
        index.extend(root, tokens, page)
    assert len(set(map(hash, alike))) == 1
    assert len(index) == len(pages) + 1 and max(map(len, index._nodes.values())) == 1
    assert [index.find(root, tokens).page for tokens in pages[::97]] == list(range(len(pages)))[::97]


def test_digests_are_those_of_every_process() -> None:
    assert digest_of((0, (1, 2, 3))) == 16958249009808338657
    assert len({digest_of(x) for x in ((0, ()), (0, (0,)), (1, ()), (0, (0, 0)), (0, (1, 0)), (0, (0, 1)))}) == 6


KEYS = [None, 1, True, 1.0, "1", b"1", Color.RED, (1,), (True,), (1.0,), ("1",), ((1,),), frozenset([1]), 0, False, ""]


def prompt(cache, tokens, cache_key=None):
    """A sequence whose prompt is cached."""
    seq = cache.add(tokens, cache_key)
    with cache.reserve([seq], len(tokens) - seq.length) as step:
        rows = np.zeros((step.num_tokens, 1, 2), np.float32)
        step.append(0, rows, rows)
        step.commit()
    return seq


def test_keys_that_are_equal_in_python_are_keys_of_their_own() -> None:
    cache = cuattn.PagedKVCache(64, 2, prefix_caching=True, **SIZES)
    pages = set()
    for key in KEYS:
        seq = prompt(cache, [1, 2, 3, 4, 5], key)
        assert not pages & set(seq.pages)  # nobody else's were found
        pages |= set(seq.pages)
    for key, same in ((1, np.int64(1)), (1.0, np.float64(1)), (True, np.True_), ("1", np.str_("1")), ((1,), (1,))):
        found = cache.add([1, 2, 3, 4, 5], same)
        assert found.length == 4
        assert found.pages == cache.add([1, 2, 3, 4, 5], key).pages
    for seq in cache.sequences:
        cache.free(seq)
    assert cache.add([1, 2, 3], float("nan")).length == 0
    assert not any(cache._pool.references)


def test_tokens_are_the_same_integers_of_whatever_type() -> None:
    cache = cuattn.PagedKVCache(8, 2, prefix_caching=True, **SIZES)
    prompt(cache, [-1, -2, 7, 2**40])
    for tokens in (np.array([-1, -2, 7]), [np.int8(-1), np.int64(-2), np.uint8(7)], (-1, -2, 7)):
        seq = cache.add(tokens)
        assert seq.length == 2 and all(type(token) is int for token in seq.tokens)
    assert cache.add([-2, -1, 7]).length == cache.add([-1, -1, 7]).length == 0
    for wrong in ([True, 1], [np.True_], [1.0], np.array([1.0]), np.array([True]), ["1"]):
        with pytest.raises(errors.ArgumentError, match="tokens"):
            cache.add(wrong)


@pytest.mark.parametrize("key", [[], {}, (1, []), {1}])
def test_keys_that_cannot_be(key) -> None:
    cache = cuattn.PagedKVCache(8, 2, prefix_caching=True, **SIZES)
    with pytest.raises(errors.ArgumentError, match=r"cache_key is .*hashable"):
        cache.add([1, 2, 3], key)
    assert not cache.sequences and len(cache._index) == 0
