"""BlockMask against masks written out by elements: whatever it is made from, combined, turned, pickled and shown."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import BlockMask, reference
from cuattn.runtime.executor import executor_for
from cuattn.testing.strategies import examples


@dataclass(frozen=True)
class Case:
    """A grid of blocks and what it says by elements."""

    blocks: Any
    elements: Any
    seqlens: tuple[int, int]
    block_size: tuple[int, int]

    @property
    def mask(self) -> BlockMask:
        return BlockMask.from_blocks(self.blocks, *self.seqlens, self.block_size, self.elements)

    @property
    def dense(self) -> Any:
        return reference.expand_blocks(self.blocks, *self.seqlens, self.block_size, self.elements)


@st.composite
def cases(draw: st.DrawFn, like: Case | None = None) -> Case:
    """A mask; like another one: of its lengths and block size, and of axes that go together with its axes."""
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9))) if like is None else like.block_size
    lengths = st.one_of(st.sampled_from((0, 1, *(n * size[0] for n in (1, 2)))), st.integers(0, 40))
    seqlens = draw(st.tuples(lengths, lengths)) if like is None else like.seqlens
    if like is None:
        leading = draw(st.sampled_from(((), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3))))
    else:
        full = like.blocks.shape[:-2]
        leading = draw(st.sampled_from((full, full[1:], (1,) * len(full), ())))
    nq, nk = (-(-n // b) for n, b in zip(seqlens, size, strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.random((*leading, nq, nk)) < draw(st.sampled_from((0.5, 0.1, 0.9, 0, 1)))
    elements = None
    if draw(st.booleans()):
        elements = rng.random((int(blocks.sum()), *size)) < draw(st.sampled_from((0.5, 0.05, 1)))
    return Case(blocks, elements, seqlens, size)


@examples(60)
@given(case=cases())
def test_what_it_is_made_from_is_what_it_says(case: Case) -> None:
    mask, dense = case.mask, case.dense
    assert mask.shape == dense.shape and mask.ndim == dense.ndim
    np.testing.assert_array_equal(mask.todense(), dense)
    np.testing.assert_array_equal(mask.blocks, case.blocks)
    assert mask.nnz == case.blocks.sum() and mask.density == (case.blocks.mean() if case.blocks.size else 0)
    np.testing.assert_array_equal(np.diff(mask.indptr, axis=-1), case.blocks.sum(axis=-1))
    ends = mask.indptr.reshape(-1, mask.grid[0] + 1)
    assert ends[0, 0] == 0 and ends[-1, -1] == mask.nnz and (ends[1:, 0] == ends[:-1, -1]).all()
    assert mask.indices.tolist() == np.nonzero(case.blocks)[-1].tolist()


@examples(60)
@given(case=cases())
def test_every_way_to_make_it_gives_the_same_mask(case: Case) -> None:
    mask = case.mask
    again = BlockMask.from_csr(mask.indptr, mask.indices, *case.seqlens, case.block_size, mask.elements)
    assert again == mask and hash(again) == hash(mask)
    dense = BlockMask.from_dense(case.dense, case.block_size)
    np.testing.assert_array_equal(dense.todense(), case.dense)
    assert dense.elements is None or dense.elements.any(axis=(1, 2)).all()  # no block in which nothing is seen
    if all(mask.grid):
        through_scipy = BlockMask.from_scipy(mask.to_scipy(), *case.seqlens, case.block_size)
        assert through_scipy == (dense if mask.elements is not None else mask)
    for copied in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert copied == mask and not copied.indices.flags.writeable


@examples(60)
@given(data=st.data())
def test_algebra_is_that_of_the_elements(data: st.DataObject) -> None:
    case = data.draw(cases())
    other = data.draw(cases(like=case))
    mask, dense = case.mask, case.dense
    for combined, by_elements in (
        (mask & other.mask, dense & other.dense),
        (other.mask | mask, dense | other.dense),
        (~mask, ~dense),
        (mask.T, dense.swapaxes(-1, -2)),
    ):
        assert isinstance(combined, BlockMask)
        assert combined.shape == by_elements.shape
        np.testing.assert_array_equal(combined.todense(), by_elements)
    assert mask == mask.T.T and mask.T.block_size == case.block_size[::-1]


@examples(60)
@given(case=cases())
def test_lists_of_the_blocks_of_keys(case: Case) -> None:
    """The blocks of queries ascend, and `order` is the number that a block has among those of the queries."""
    mask, executor = case.mask, executor_for()
    lists = mask.key_lists(executor)
    assert all(x.dtype == np.int32 for x in (*lists, *mask.query_lists(executor)))
    columns = case.blocks.reshape(mask.batch, mask.num_heads, *mask.grid).swapaxes(2, 3)
    number = np.cumsum(case.blocks).reshape(mask.batch, mask.num_heads, *mask.grid).swapaxes(2, 3) - 1
    assert lists.indptr.tolist() == [0, *np.cumsum(columns.sum(axis=3))]
    assert lists.indices.tolist() == np.nonzero(columns)[3].tolist()
    assert lists.order.tolist() == number[columns].tolist()


@examples(60)
@given(case=cases())
def test_equal_masks(case: Case) -> None:
    mask = case.mask
    assert mask == case.mask and len({mask, case.mask}) == 1
    assert mask != case.blocks and mask != 1
    if mask.nnz:
        fewer = case.blocks.copy()
        fewer[tuple(np.argwhere(fewer)[0])] = False
        assert mask != Case(fewer, None, case.seqlens, case.block_size).mask
    everything = np.ones((mask.nnz, *case.block_size), bool)
    assert Case(case.blocks, everything, case.seqlens, case.block_size).mask.elements is None


def test_elements_beyond_the_end_do_not_count() -> None:
    inside = np.zeros((4, 2, 2), bool)
    inside[0], inside[1, :, 0], inside[2, 0], inside[3, 0, 0] = True, True, True, True
    masks = [
        BlockMask.from_blocks(np.ones((2, 2)) > 0, 3, 3, 2, elements) for elements in (inside, np.ones((4, 2, 2), int))
    ]
    assert masks[0] == masks[1] and masks[0].elements is None


def test_it_cannot_be_changed() -> None:
    blocks, elements = np.array([[True, False], [True, True]]), np.ones((3, 2, 2), bool)
    elements[0, 0, 1] = False
    mask = BlockMask.from_blocks(blocks, 4, 4, 2, elements)
    before = mask.todense()
    blocks[:], elements[:] = False, False  # what it was made from is the caller's
    np.testing.assert_array_equal(mask.todense(), before)
    for array in (mask.indices, mask.elements):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        mask.block_size = (1, 1)  # type: ignore[misc]
    with pytest.raises(TypeError):
        np.ones((4, 4), bool) & mask


def test_what_is_derived_is_made_once() -> None:
    mask, executor, made = BlockMask.from_blocks([[1]], 8, 8, 8), executor_for(), []

    def make() -> list[Any]:
        made.append(0)
        return [np.arange(3, dtype=np.int32)]

    first, second = (mask.derived(executor, ("tiles", 64), make) for _ in range(2))
    assert first is second and made == [0]
    assert mask.key_lists(executor).order is mask.key_lists(executor).order


def test_matrices_of_scipy() -> None:
    """Whatever the format is: blocks of "bsr" are those of the mask, everything else is a grid of blocks."""
    grid = np.array([[1, 0, 2], [0, 0, 3]])
    expected = BlockMask.from_blocks(grid, 128, 192)
    for kind in ("csr", "csc", "coo", "lil", "dok"):
        assert BlockMask.from_scipy(getattr(scipy.sparse, f"{kind}_matrix")(grid)) == expected
    stored_zero = scipy.sparse.csr_array((np.array([1.0, 0.0]), np.array([2, 0]), np.array([0, 2, 2])), shape=(2, 3))
    assert BlockMask.from_scipy(stored_zero).blocks.tolist() == [[False, False, True], [False, False, False]]
    twice = scipy.sparse.csr_array((np.ones(3, bool), np.array([2, 0, 2]), np.array([0, 3, 3])), shape=(2, 3))
    assert BlockMask.from_scipy(twice).blocks.tolist() == [[True, False, True], [False, False, False]]
    dense = np.kron(grid != 0, np.array([[1, 1, 1], [1, 0, 1]]))
    by_elements = scipy.sparse.bsr_array(dense.astype(np.float32), blocksize=(2, 3))
    mask = BlockMask.from_scipy(by_elements)
    np.testing.assert_array_equal(mask.todense(), dense != 0)
    assert mask.block_size == (2, 3)
    per_head = BlockMask.from_scipy([[by_elements, 0 * by_elements]], 3, 8)
    assert per_head.shape == (1, 2, 3, 8) and not per_head.todense()[0, 1].any()
    np.testing.assert_array_equal(per_head.todense()[0, 0], dense[:3, :8] != 0)
    assert np.shape(per_head.to_scipy())[:2] == (1, 2)


def test_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    mask = BlockMask.from_blocks(np.tri(4, dtype=bool), 100, 128, 32)
    mask.show(width=2, height=3)
    assert capsys.readouterr().out.splitlines() == [repr(mask), "+.", "#+"]
    elements = np.ones((1, 2, 2), bool)
    elements[0, 1, 1] = False
    BlockMask.from_blocks([[[1]], [[0]]], 2, 2, 2, np.array([[[1, 1], [1, 0]]])).show()
    assert capsys.readouterr().out.splitlines()[1:] == ["head 0:", "+", "head 1:", "."]
    assert repr(cuattn.BlockMask.from_blocks(np.zeros((2, 3, 1, 0)), 1, 0)).startswith(
        "BlockMask(2 batch x 3 heads x 1 x 0"
    )
