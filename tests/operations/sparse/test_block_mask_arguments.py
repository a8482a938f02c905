"""What masks of blocks are not made from: the error, and that its message says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse

import cuattn
from cuattn import BlockMask
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OutOfMemoryError, ShapeError

GRID = np.ones((2, 3), bool)
BSR = scipy.sparse.bsr_array(np.ones((4, 6)), blocksize=(2, 2))
CSR = scipy.sparse.csr_array(np.ones((2, 3)))


class OnDevice:
    """An array that says it is on a GPU."""

    def __repr__(self) -> str:
        return "OnDevice()"

    def __dlpack__(self, **keywords: Any) -> Any:
        raise AssertionError("nobody may look at it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"blocks": GRID[:1]}, ShapeError, r"\[1, 3\].* need \[\.\.\., 2, 3\]"),
        ({"blocks": GRID[0]}, ShapeError, "rank 1"),
        ({"blocks": np.ones((1, 1, 1, 2, 3), bool)}, ShapeError, "rank 5"),
        ({"blocks": GRID.astype(np.float32)}, DTypeError, "float32"),
        ({"blocks": None}, ArrayTypeError, "blocks"),
        ({"blocks": OnDevice()}, ArrayTypeError, "blocks"),
        ({"blocks": [[1], [1, 2]]}, ArrayTypeError, "blocks"),
        ({"seqlen_q": -1}, ArgumentError, "seqlen_q is -1"),
        ({"seqlen_k": 2**31}, ArgumentError, "seqlen_k"),
        ({"seqlen_k": 5.0}, ArgumentError, "seqlen_k"),
        ({"block_size": 0}, ArgumentError, "block_size is 0"),
        ({"block_size": (2, 0)}, ArgumentError, r"block_size\[1\] is 0"),
        ({"block_size": (2, 2, 2)}, ArgumentError, "3 entries"),
        ({"block_size": None}, ArgumentError, "block_size is None"),
        ({"block_size": 2**31 - 1}, ShapeError, "2147483647"),
        ({"elements": np.ones((5, 2, 2), bool)}, ShapeError, r"\[5, 2, 2\].*keeps 6 blocks"),
        ({"elements": np.ones((6, 2, 3), bool)}, ShapeError, r"\[6, 2, 3\]"),
        ({"elements": np.ones((6, 2, 2))}, DTypeError, "elements has dtype float64"),
    ],
    ids=str,
)
def test_grids(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        BlockMask.from_blocks(**{"blocks": GRID, "seqlen_q": 4, "seqlen_k": 6, "block_size": 2, **given})


@pytest.mark.parametrize(
    ("indptr", "indices", "error", "says"),
    [
        ([0, 1], [0], ShapeError, r"indptr has shape \[2\]; .* 2 blocks of queries"),
        ([[0, 1, 2], [3, 3, 3]], [0, 0, 1], ArgumentError, "indptr of head 1 begins with 3; .* end at 2"),
        ([1, 1, 2], [0, 1], ArgumentError, "begins with 1"),
        ([0, 2, 1], [0], ArgumentError, "descends from 2 to 1 at index 2"),
        ([0, 1, 3], [0, 1], ArgumentError, "indptr ends at 3; there are 2 indices"),
        ([0, 1, 2], [0, 3], ArgumentError, r"indices\[1\] is 3; there are 3 blocks"),
        ([0, 1, 2], [-1, 2], ArgumentError, r"indices\[0\] is -1"),
        ([0, 2, 3], [1, 0, 0], ArgumentError, r"indices\[1\] is 0 behind 1"),
        ([0, 2, 3], [1, 1, 0], ArgumentError, r"indices\[1\] is 1 behind 1"),
        ([0.0, 1.0, 1.0], [0], DTypeError, "indptr"),
        ([0, 1, 1], [[0]], ShapeError, "indices has shape"),
        ([0, 0, 0], np.ones(0, np.float32), DTypeError, "indices"),
        ([0, 1, 1], np.array([2**63], np.uint64), ArgumentError, "indices"),
    ],
    ids=str,
)
def test_compressed_rows(indptr: Any, indices: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        BlockMask.from_csr(indptr, indices, 4, 6, 2)


@pytest.mark.parametrize(
    ("matrix", "options", "error", "says"),
    [
        (BSR, {"block_size": 3}, ShapeError, r"blocks of \(2, 2\); \(3, 3\)"),
        (BSR, {"seqlen_q": 2}, ShapeError, "seqlen_q = 2"),
        (BSR, {"seqlen_k": 7}, ShapeError, "seqlen_k = 7"),
        (CSR, {"seqlen_q": 129}, ShapeError, "seqlen_q = 129"),
        (CSR, {"block_size": 0}, ArgumentError, "block_size is 0"),
        ([BSR, CSR], {}, ShapeError, "matrix 1 has shape"),
        ([CSR, CSR[:1]], {}, ShapeError, "matrix 1 has shape"),
        ([[CSR], CSR], {}, ShapeError, "neither a sequence"),
        ([[[CSR]]], {}, ShapeError, "neither a sequence"),
        ([], {}, ShapeError, "empty"),
        (np.ones((2, 3)), {}, ArrayTypeError, "ndarray"),
        (CSR.astype(complex), {}, DTypeError, "complex"),
    ],
    ids=str,
)
def test_matrices(matrix: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        BlockMask.from_scipy(matrix, **options)


def test_more_than_the_machine_has() -> None:
    huge = 2**31 - 1
    with pytest.raises(OutOfMemoryError, match="seqlen_q = 2147483647"):
        cuattn.local_mask(huge, huge, 1, 0, 0)
    with pytest.raises(OutOfMemoryError, match="nq = 2147483647"):
        cuattn.bigbird_mask(huge, huge)
    with pytest.raises(OutOfMemoryError, match="block_size"):
        BlockMask.from_dense(GRID, huge)
    one = BlockMask.from_blocks([[1]], 3, 3, huge)  # blocks beyond the lengths cost nothing
    assert one.todense().all() and one.T.nnz == 1


def test_masks_that_do_not_go_together() -> None:
    mask = BlockMask.from_blocks(GRID, 4, 6, 2)
    for other in (
        BlockMask.from_blocks(GRID, 3, 6, 2),
        BlockMask.from_blocks(np.ones((2, 2), bool), 4, 6, (2, 3)),
        mask.T,
    ):
        with pytest.raises(ShapeError, match="must be the same"):
            mask & other
    two, three = (BlockMask.from_blocks(np.ones((n, 2, 3), bool), 4, 6, 2) for n in (2, 3))
    with pytest.raises(ShapeError, match="do not fit"):
        two | three
    with pytest.raises(TypeError):
        mask & GRID  # type: ignore[operator]
    with pytest.raises(TypeError):
        mask | None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: cuattn.local_mask(4, 4, 2, -1, 0), ArgumentError, "left is -1"),
        (lambda: cuattn.local_mask(4, 4, 0, 1, 0), ArgumentError, "block_size is 0"),
        (lambda: cuattn.strided_mask(4, 4, 0, 1), ArgumentError, "stride is 0"),
        (lambda: cuattn.strided_mask(4, 4, 2, -1), ArgumentError, "local is -1"),
        (lambda: cuattn.strided_mask(4, -1, 2, 1), ArgumentError, "nk is -1"),
        (lambda: cuattn.global_mask(4, 4, [4]), ArgumentError, "blocks holds 4; -4 to 3"),
        (lambda: cuattn.global_mask(4, 4, 5), ArgumentError, "blocks is 5"),
        (lambda: cuattn.global_mask(4, 4, [0.5]), DTypeError, "blocks"),
        (lambda: cuattn.streaming_mask(4, 4, -1, 1), ArgumentError, "sinks is -1"),
        (lambda: cuattn.vertical_slash_mask(4, 4, 2, [4], [0]), ArgumentError, "vertical holds 4; -1 to 3"),
        (lambda: cuattn.vertical_slash_mask(4, 4, 2, [0], [-2]), ArgumentError, "slash holds -2"),
        (lambda: cuattn.vertical_slash_mask(4, 4, 2, [[0]] * 2, [[0]] * 3), ShapeError, "must fit"),
        (lambda: cuattn.bigbird_mask(4, 4, seed=-1), ArgumentError, "seed is -1"),
        (lambda: cuattn.bigbird_mask(4, 4, num_random=0.5), ArgumentError, "num_random is 0.5"),
        (lambda: cuattn.bigbird_mask(4, 4, causal="yes"), ArgumentError, "causal is 'yes'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_patterns(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
