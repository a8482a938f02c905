"""Block tables from FlashInfer's compressed rows, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_cupy import Exporter, installed

import cuattn
from cuattn import block_tables_from_csr, csr_from_block_tables
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from cuattn.testing.strategies import examples

GOOD = {"indptr": [0, 2, 2, 3], "indices": [7, 4, 5], "last_page_len": [3, 0, 16], "page_size": 16}
TABLES = {"block_tables": [[7, 4], [-1, 99], [5, -1]], "seqlens_k": [19, 0, 16], "page_size": 16}


def test_one_by_hand():
    tables, lengths = block_tables_from_csr(**GOOD)
    assert tables.tolist() == [[7, 4], [-1, -1], [5, -1]] and lengths.tolist() == [19, 0, 16]
    assert tables.dtype == lengths.dtype == np.int32
    rows = csr_from_block_tables(**TABLES)
    assert [x.tolist() for x in rows] == [GOOD["indptr"], GOOD["indices"], GOOD["last_page_len"]]
    assert all(x.dtype == np.int32 for x in rows)


@examples(60)
@given(data=st.data(), page_size=st.integers(1, 40), dtype=st.sampled_from(["i4", "i8", "u8", ">i4", "list"]))
def test_there_and_back(data, page_size, dtype):
    """Whatever stands behind the used part of a table is gone, and nothing else is."""
    lengths = data.draw(st.lists(st.integers(0, 5 * page_size), max_size=6))
    width = data.draw(st.integers(0, 2)) + max((-(-n // page_size) for n in lengths), default=0)
    tables = np.array(
        data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=width * len(lengths)))[: width * len(lengths)]
    )
    tables = tables.astype(np.int64).reshape(len(lengths), width)
    used = np.arange(width) < -(-np.array(lengths, np.int64) // page_size)[:, None]
    garbage = np.where(used, tables, -(2**40) if dtype == "i8" else tables)
    as_given = (
        (lambda x: np.asarray(x).tolist()) if dtype == "list" else (lambda x: np.asarray(x, np.int64).astype(dtype))
    )
    if dtype == "list" and not garbage.size:
        return  # a list cannot say how many columns there are
    indptr, indices, last = csr_from_block_tables(as_given(garbage), as_given(lengths), page_size)
    assert indices.tolist() == tables[used].tolist()
    back, seqlens = block_tables_from_csr(as_given(indptr), as_given(indices), as_given(last), page_size)
    assert seqlens.tolist() == lengths
    most = back.shape[1]
    assert most == max((-(-n // page_size) for n in lengths), default=0)
    assert np.array_equal(back, np.where(used, tables, -1)[:, :most])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        (
            {"last_page_len": [17, 0, 16]},
            ArgumentError,
            r"last_page_len\[0\] is 17; .* has 1 to 16 keys on its last page",
        ),
        ({"last_page_len": [0, 0, 16]}, ArgumentError, r"last_page_len\[0\] is 0"),
        ({"last_page_len": [3, -1, 16]}, ArgumentError, r"last_page_len\[1\] is -1"),
        ({"last_page_len": [3, 17, 16]}, ArgumentError, r"last_page_len\[1\] is 17"),
        ({"last_page_len": [3, 0]}, ShapeError, "last_page_len has shape"),
        ({"last_page_len": [3.0, 0.0, 16.0]}, DTypeError, "last_page_len has dtype float64"),
        ({"indptr": [1, 2, 2, 3]}, ArgumentError, r"indptr\[0\] is 1"),
        ({"indptr": [0, 2, 1, 3]}, ArgumentError, "indptr descends from 2 to 1 at index 2"),
        ({"indptr": np.array([0, 2**63 - 1, -1, 3])}, ArgumentError, "indptr descends"),
        ({"indptr": [0, 2, 2, 4]}, ArgumentError, "indptr ends at 4; there are 3 indices"),
        ({"indptr": [0, 2, 2, 2]}, ArgumentError, "indptr ends at 2"),
        ({"indptr": []}, ShapeError, r"indptr has shape \[0\]"),
        ({"indptr": [[0, 2, 2, 3]]}, ShapeError, "indptr has shape .* rank 2"),
        ({"indptr": None}, ArrayTypeError, "indptr"),
        ({"indices": [7, -1, 5]}, ArgumentError, r"indices\[1\] is -1"),
        ({"indices": np.array([7, 2**31, 5])}, ArgumentError, r"indices\[1\] is 2147483648"),
        ({"indices": [True, False, True]}, DTypeError, "indices has dtype bool"),
        ({"indices": 3}, ArrayTypeError, "indices"),
        *(({"page_size": n}, ArgumentError, "page_size is") for n in (0, -1, 2**31, True, 1.0, "16", None)),
        ({"page_size": 2**31 - 1, "last_page_len": [2**31 - 1, 0, 5]}, ArgumentError, r"seqlens_k\[0\] is"),
    ),
)
def test_rows_that_are_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        block_tables_from_csr(**GOOD | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"seqlens_k": [19, -1, 16]}, ArgumentError, r"seqlens_k\[1\] is -1; the tables have room for 0 to 32"),
        ({"seqlens_k": [33, 0, 16]}, ArgumentError, r"seqlens_k\[0\] is 33"),
        ({"seqlens_k": [19, 0]}, ShapeError, "seqlens_k has shape"),
        ({"seqlens_k": [19, 1, 16]}, ArgumentError, r"block_tables\[1, 0\] is -1, a page that the 1 keys"),
        ({"seqlens_k": [19.0, 0.0, 16.0]}, DTypeError, "seqlens_k has dtype float64"),
        ({"block_tables": np.array([[7, 2**32 + 4], [0, 0], [5, 0]])}, ArgumentError, r"block_tables\[0, 1\] is 42949"),
        ({"block_tables": [7, 4, 5]}, ShapeError, "block_tables has shape"),
        ({"block_tables": [[7, 4], [5]]}, ArrayTypeError, "block_tables cannot be read as an array"),
        *(({"page_size": n}, ArgumentError, "page_size is") for n in (0, True, 1.5)),
    ),
)
def test_tables_that_are_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        csr_from_block_tables(**TABLES | changes)


def test_attention_through_both(executor):
    """FlashInfer's form of a cache: head-major pages, rows, and lengths of the last pages."""
    rng = np.random.default_rng(0)
    q, pages = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 1, 4, 16), (9, 2, 2, 5, 16)))
    k_pages, v_pages = (pages[:, i].swapaxes(1, 2) for i in (0, 1))
    tables, lengths = block_tables_from_csr([0, 2, 2, 5], [7, 0, 3, 8, 3], [4, 0, 1], page_size=5)
    on = executor.array
    result = cuattn.paged_attention(on(q), on(k_pages), on(v_pages), tables, lengths)
    want = cuattn.reference.paged_attention(q, k_pages, v_pages, tables, lengths)[0]
    np.testing.assert_allclose(executor.numpy(result), want, rtol=1e-5, atol=1e-5)


def test_arrays_on_a_device(monkeypatch):
    """They come back there, and each is waited for once."""
    with installed(monkeypatch) as cupy:
        on = {name: cupy.asarray(np.array(x, np.int32)) for name, x in GOOD.items() if name != "page_size"}
        tables, lengths = block_tables_from_csr(**on, page_size=16)
        assert cupy.num_synchronizations == 3
        assert isinstance(tables, cupy.ndarray) and isinstance(lengths, cupy.ndarray)
        back = csr_from_block_tables(tables, lengths, 16)
        assert [x.get().tolist() for x in back] == [GOOD["indptr"], GOOD["indices"], GOOD["last_page_len"]]
        exported = {name: Exporter(x.get()) for name, x in on.items()}
        assert block_tables_from_csr(**exported, page_size=16)[0].get().tolist() == tables.get().tolist()
