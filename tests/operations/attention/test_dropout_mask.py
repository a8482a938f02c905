"""cuattn.dropout_mask: the generator against published answers, the counters against the contract, and chance."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.errors import ArgumentError, NonFiniteError
from cuattn.ops.attention.dropout import check_dropout
from cuattn.reference.dropout import kept, philox4x32_10
from cuattn.testing.strategies import examples

# The vectors of the authors' own test suite (Random123, kat_vectors, "philox4x32 10").
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def one_by_one(batch, num_heads, seqlen_q, seqlen_k, dropout_p, seed, offset):
    """The contract with Python integers, one element at a time."""
    threshold = math.floor((1 - Fraction(dropout_p)) * 2**32)
    mask = np.zeros((batch, num_heads, seqlen_q, seqlen_k), bool)
    for b, h, i, j in np.ndindex(*mask.shape):
        counter = [8 * (j // 16) + j % 8, 8 * (i // 16) + i % 8, b * num_heads + h, offset]
        key = [seed % 2**32, seed // 2**32]
        for _ in range(10):
            high, low = divmod(0xD2511F53 * counter[0], 2**32)
            high_2, low_2 = divmod(0xCD9E8D57 * counter[2], 2**32)
            counter = [high_2 ^ counter[1] ^ key[0], low_2, high ^ counter[3] ^ key[1], low]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        mask[b, h, i, j] = counter[2 * ((i // 8) % 2) + (j // 8) % 2] < threshold
    return mask


@pytest.mark.smoke
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert philox4x32_10(words(counter), words(key)).tolist() == list(words(answer))
    many = philox4x32_10(tuple(np.full((2, 3), word) for word in words(counter)), words(key))
    assert many.dtype == np.uint32 and many.shape == (4, 2, 3)
    assert (many == np.reshape(words(answer), (4, 1, 1))).all()


@pytest.mark.smoke
@examples(20)
@given(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 35), st.integers(0, 35)),
    st.sampled_from([0.0, 1e-12, 0.1, 0.5, 0.9, 1 - 2**-32, 1 - 2**-40]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
)
def test_counters_are_those_of_the_contract(shape, p, seed, offset):
    mask = cuattn.dropout_mask(*shape, dropout_p=p, dropout_seed=seed, dropout_offset=offset)
    assert mask.dtype == np.bool_ and mask.shape == shape
    np.testing.assert_array_equal(mask, one_by_one(*shape, p, seed, offset))


@examples(30)
@given(st.tuples(*[st.integers(0, 70)] * 4), st.tuples(*[st.integers(0, 40)] * 2))
def test_parts_are_parts_of_the_whole(starts, lengths):
    rows, columns = (range(start, start + n) for start, n in zip(starts, lengths, strict=False))
    whole = cuattn.dropout_mask(2, 3, 115, 115, dropout_p=0.4, dropout_seed=2**63 + 9, dropout_offset=77)
    part = kept(check_dropout(0.4, 0, 0).threshold, 2**63 + 9, 77, [5, 1], rows, columns)
    cut = whole.reshape(6, 115, 115)[[5, 1], rows.start : rows.stop, columns.start : columns.stop]
    np.testing.assert_array_equal(part, cut)


def test_a_longer_sequence_only_adds():
    short = cuattn.dropout_mask(1, 2, 20, 33, dropout_p=0.3)
    np.testing.assert_array_equal(cuattn.dropout_mask(1, 2, 47, 64, dropout_p=0.3)[:, :, :20, :33], short)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept(p):
    mask = cuattn.dropout_mask(2, 4, 160, 160, dropout_p=p, dropout_seed=3)
    deviation = math.sqrt(p * (1 - p) / mask.size)
    assert abs(mask.mean() - (1 - p)) < 4 * deviation
    for axis in range(4):  # of every head, query and key as well
        share = mask.mean(axis=tuple(a for a in range(4) if a != axis))
        assert np.abs(share - (1 - p)).max() < 5.5 * math.sqrt(p * (1 - p) * mask.shape[axis] / mask.size)


def agreement(a, b):
    """How many deviations the share of equal elements of two masks with p = 1/2 lies from 1/2."""
    return abs((a == b).mean() - 0.5) * 2 * math.sqrt(a.size)


def test_masks_are_independent():
    def mask(**arguments):
        return cuattn.dropout_mask(2, 3, 128, 128, **{"dropout_p": 0.5, "dropout_seed": 5, **arguments})

    one = mask()
    others = [mask(dropout_seed=seed) for seed in (6, 4, 5 + 2**32, 5 + 2**63)]
    others += [mask(dropout_offset=offset) for offset in (1, 2, 2**32 - 1)]
    assert all(agreement(one, other) < 4 for other in others)
    heads = one.reshape(6, 128, 128)
    assert all(agreement(heads[a], heads[b]) < 4 for a in range(6) for b in range(a))
    # Neighbours share a call of the generator at a distance of 8: no distance along either axis may show in the mask.
    for step in (1, 2, 7, 8, 9, 15, 16, 17, 24, 32, 64):
        assert agreement(one[..., step:, :], one[..., :-step, :]) < 4.5
        assert agreement(one[..., step:], one[..., :-step]) < 4.5
        assert agreement(one[..., step:, step:], one[..., :-step, :-step]) < 4.5
    assert agreement(heads, heads.swapaxes(1, 2)) < 4


def test_no_dropout_keeps_everything():
    assert cuattn.dropout_mask(2, 2, 40, 40, dropout_p=0.0, dropout_seed=1).all()
    assert check_dropout(0, 0, 0) == (2**32, 0, 0, 0, 1.0, 1, 0, 0, 0, 0, 1, False)


def test_arguments_as_kernels_take_them():
    assert check_dropout(0.5, 2**64 - 2, 2**32 - 1) == (
        2**31,
        2**32 - 2,
        2**32 - 1,
        2**32 - 1,
        2.0,
        1,
        0,
        0,
        0,
        0,
        1,
        False,
    )
    assert check_dropout(np.float32(0.1), np.uint64(7), np.int32(3)).threshold == math.floor(
        (1 - Fraction(float(np.float32(0.1)))) * 2**32
    )


GOOD = {"dropout_p": 0.5, "dropout_seed": 0, "dropout_offset": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout_p": 1.0}, "dropout_p is 1.0; a finite number from 0 to below 1"),
        ({"dropout_p": 1}, "dropout_p is 1; a finite"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1; a finite"),
        ({"dropout_p": True}, "dropout_p is True of type bool"),
        ({"dropout_p": "0.1"}, "dropout_p is '0.1' of type str"),
        ({"dropout_p": None}, "dropout_p is None"),
        ({"dropout_p": 0.1j}, "dropout_p is 0.1j of type complex"),
        ({"dropout_seed": -1}, f"dropout_seed is -1; an integer from 0 to {2**64 - 1} is allowed"),
        ({"dropout_seed": 2**64}, "dropout_seed is 18446744073709551616; an integer"),
        ({"dropout_seed": 1.0}, "dropout_seed is 1.0; an integer"),
        ({"dropout_seed": False}, "dropout_seed is False; an integer"),
        ({"dropout_offset": 2**32}, f"dropout_offset is 4294967296; an integer from 0 to {2**32 - 1} is allowed"),
        ({"dropout_offset": -5}, "dropout_offset is -5; an integer"),
        ({"dropout_offset": None}, "dropout_offset is None; an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    for function in (check_dropout, lambda **given: cuattn.dropout_mask(1, 1, 2, 2, **given)):
        with pytest.raises(ArgumentError, match=f"^{message}"):
            function(**GOOD | arguments)


@pytest.mark.parametrize("p", [math.nan, math.inf, -math.inf])
def test_a_share_that_is_not_finite(p):
    with pytest.raises(NonFiniteError, match="dropout_p is"):
        cuattn.dropout_mask(1, 1, 2, 2, dropout_p=p)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("extent", [-1, 2.0, True, 2**31, None])
def test_bad_extents(position, extent):
    shape = [1, 1, 2, 2]
    shape[position] = extent
    name = ("batch", "num_heads", "seqlen_q", "seqlen_k")[position]
    with pytest.raises(ArgumentError, match=f"^{name} is {extent}"):
        cuattn.dropout_mask(*shape, dropout_p=0.5)
