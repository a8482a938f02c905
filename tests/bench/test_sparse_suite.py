"""The suite of block-sparse attention: what its cases are, and what it counts."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.benchmark import Options, sparse
from cuattn.benchmark.sparse import SparseCase
from cuattn.benchmark.verify import WrongResultError

HOST = Options(executor="host", budget_s=0.01)


@pytest.mark.parametrize("executor", ["host", "cuda"])
def test_cases_have_names_of_their_own(executor: str) -> None:
    cases = sparse.cases(executor)
    assert cases[0].kept is None
    assert len({case.name for case in cases}) == len(cases)
    assert all(0 < case.density <= 0.5 for case in cases[1:])


def test_work_is_that_of_the_kept_blocks() -> None:
    case = SparseCase(1024, 2, 64, block=64, kept=4)
    mask = case.make_mask()
    assert mask is not None and mask.density == case.density == 0.25
    assert case.flops == 4 * 2 * mask.nnz * 64 * 64 * 64
    assert case.num_bytes == 4 * 1024 * 2 * 64 * 2


def test_a_case_on_the_host() -> None:
    dense: dict[str, float] = {}
    plain, blocks = SparseCase(128, 1, 64), SparseCase(128, 1, 64, block=64, kept=1)
    (first,), (second,) = ([*sparse.host_records(dense, HOST, case)] for case in (plain, blocks))
    assert first.metrics["ratio"] == 1
    assert first.metrics["kernel"] == second.metrics["kernel"] == "attention_forward"
    assert 0 < second.metrics["ratio"] < 1  # type: ignore[operator]
    assert second.metrics["mma"] * 2 == first.metrics["mma"]  # type: ignore[operator]


def test_strides_on_the_host() -> None:
    (record,) = sparse.host_records({"count": 1.0}, HOST, SparseCase(256, 1, 64, stride=4))
    assert record.metrics["density"] == 0.25
    assert record.metrics["mma"] == 4 * 256  # four sequences of 64 tokens, a tile each


def test_a_wrong_result_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseCase, "run", lambda case, arrays, mask: np.zeros_like(arrays[0]))
    with pytest.raises(WrongResultError):
        next(iter(sparse.host_records({}, HOST, SparseCase(128, 1, 64, block=64, kept=1))))
