"""slot_mapping: one token after the other, page by page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import errors
from cuattn.testing.strategies import examples


@examples(60)
@given(
    page_size=st.integers(1, 5),
    sequences=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5),
    dtype=st.sampled_from((np.int32, np.int64, np.uint8)),
)
def test_against_a_loop(executor, page_size, sequences, dtype):
    """Entries behind the last new token are garbage and never felt."""
    most = max([-(-(length + count) // page_size) for length, count in sequences], default=0) + 1
    rng = np.random.default_rng(page_size)
    tables = rng.integers(0, 100, (len(sequences), most)).astype(dtype)
    wanted = []
    for b, (length, count) in enumerate(sequences):
        for token in range(length, length + count):
            wanted.append(int(tables[b, token // page_size]) * page_size + token % page_size)
        if dtype != np.uint8:
            tables[b, -(-(length + count) // page_size) :] = -1
    lengths, counts = np.array(sequences, int).reshape(-1, 2).T
    for given_tables in (tables, executor.array(tables) if dtype != np.uint8 else tables):
        slots = cuattn.slot_mapping(given_tables, lengths, counts.tolist(), page_size)
        assert slots.dtype == np.int64
        np.testing.assert_array_equal(executor.numpy(slots), np.array(wanted, np.int64))


def test_one_count_for_all():
    np.testing.assert_array_equal(cuattn.slot_mapping([[0], [3]], [1, 0], 2, 4), [1, 2, 12, 13])
    assert cuattn.slot_mapping(np.zeros((0, 3), np.int32), [], 2, 4).shape == (0,)


def test_tables_and_lengths_with_strides(executor):
    tables = np.array([[4, 1, 7], [0, 2, 3]], np.int32)
    padded = np.full((2, 9), -1, np.int32)
    padded[:, 1::3] = tables
    lengths = np.array([3, -1, 1, -1])
    wanted = cuattn.slot_mapping(tables, [3, 1], [2, 4], 2)
    found = cuattn.slot_mapping(executor.array(padded)[:, 1::3], executor.array(lengths)[::2], [2, 4], 2)
    np.testing.assert_array_equal(executor.numpy(found), wanted)
    np.testing.assert_array_equal(executor.numpy(found), [3, 14, 1, 4, 5, 6])


def test_more_tokens_than_one_launch_has_threads(executor, monkeypatch):
    monkeypatch.setattr("cuattn.kv.slots.MAX_GRID", (2, 1, 1))
    found = cuattn.slot_mapping(executor.array(np.array([[1, 0]], np.int32)), [100], [700], 400)
    np.testing.assert_array_equal(executor.numpy(found), np.r_[500:800, 0:400])


def test_slots_beyond_32_bits():
    slots = cuattn.slot_mapping(np.array([[2**31 - 1]], np.int32), np.array([7], np.int32), 1, 256)
    assert slots.tolist() == [(2**31 - 1) * 256 + 7]


def test_no_slot_wraps_around(executor, monkeypatch):
    """The product of a page and the page size, or the end of a sequence, may be beyond 64 bits."""
    last = (2**63 - 1) // 4
    tables = np.array([[last - 1], [last], [last + 1], [2**62], [2**61]])
    slots = cuattn.slot_mapping(tables[:1], [3], 1, 4)
    assert slots.tolist() == [4 * (last - 1) + 3] and slots[0] > 0
    for page in tables[2:]:
        with pytest.raises(errors.ArgumentError, match=rf"block_tables\[0, 0\] is {page[0]}; .* pages are 0 to "):
            cuattn.slot_mapping([page], [0], 1, 4)
    for length in (2**63 - 1, 2**62):
        with pytest.raises(errors.ArgumentError, match=f"sequence 0 has {length} tokens and gets 1"):
            cuattn.slot_mapping([[0]], np.array([length]), 1, 4)
    for check in ("_check_used", "_check_room"):  # as on a device, where such a page is none
        monkeypatch.setattr(f"cuattn.kv.slots.{check}", lambda *args: None)
    tables, lengths = np.array([*tables, [-3], [7]]), np.array([0, 0, 0, 0, 0, 0, 4])
    found = cuattn.slot_mapping(executor.array(tables), executor.array(lengths), 1, 4)
    assert executor.numpy(found).tolist() == [4 * (last - 1), 4 * last, -1, -1, -1, -1, -1]


REFUSED = [
    ({"page_size": 0}, errors.ArgumentError, "page_size is 0"),
    ({"page_size": True}, errors.ArgumentError, "page_size is True"),
    ({"page_size": 2**31}, errors.ArgumentError, "page_size is 2147483648"),
    ({"counts": [2**31, 0]}, errors.ArgumentError, "counts holds 2147483648 tokens in all"),
    ({"counts": [[1], [2, 3]]}, errors.ArrayTypeError, "counts cannot be read as an array"),
    ({"page_size": 2.0}, errors.ArgumentError, "page_size is 2.0"),
    ({"block_tables": [1, 2]}, errors.ShapeError, "block_tables has shape"),
    ({"block_tables": [[0.5]]}, errors.DTypeError, "block_tables has dtype float64"),
    ({"lengths": [1]}, errors.ShapeError, r"lengths has shape \(1,\); \[2\] is needed"),
    ({"lengths": [1, -1]}, errors.ArgumentError, r"lengths\[1\] is -1"),
    ({"lengths": [0, 4]}, errors.ArgumentError, "sequence 1 has 4 tokens and gets 1; its row .* has room for 4"),
    ({"lengths": [0, 2]}, errors.ArgumentError, r"block_tables\[1, 1\] is -1; the new tokens need that page"),
    ({"counts": [1]}, errors.ShapeError, "counts has shape"),
    ({"counts": [1, -2]}, errors.ArgumentError, "counts holds -2"),
    ({"counts": [1.0, 2.0]}, errors.ArgumentError, "counts holds float64"),
    ({"counts": None}, errors.ArrayTypeError, "counts is a NoneType"),
    ({"counts": True}, errors.ArrayTypeError, "counts is a bool"),
]


@pytest.mark.parametrize(("changes", "error", "match"), REFUSED)
def test_refused(changes, error, match):
    given = {"block_tables": [[0, 1], [2, -1]], "lengths": [0, 1], "counts": [4, 1], "page_size": 2, **changes}
    with pytest.raises(error, match=match):
        cuattn.slot_mapping(**given)
