"""The suite of attention over ranks: what it counts, and that it checks what it measures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuattn import distributed as ranks
from cuattn.benchmark import Options, distributed
from cuattn.benchmark.verify import WrongResultError


def small(case):
    return replace(case, seqlen=128, head_dim=32)


def test_records():
    metrics = {}
    for case in distributed.cases():
        (record,) = distributed.records(Options(executor="host"), small(case))
        metrics[case.method, case.partition] = record.metrics
        assert record.metrics["sent_bytes"] == record.metrics["formula_bytes"]
    balance = {kind: metrics["ring", kind]["balance"] for kind in ("zigzag", "striped", "contiguous")}
    assert balance["contiguous"] < balance["zigzag"]
    assert len({case.name for case in distributed.cases()}) == len(distributed.cases())


def test_a_wrong_result_is_not_measured(monkeypatch):
    right = ranks.ring_attention
    monkeypatch.setattr(ranks, "ring_attention", lambda *a, **o: right(*a, **o) * np.float16(1.1))
    with pytest.raises(WrongResultError, match="ring_zigzag"):
        next(distributed.records(Options(executor="host"), small(distributed.cases()[0])))
