"""The suite of differential attention: what it counts, and that it checks what it measures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import cuattn
from cuattn.benchmark import Options, differential
from cuattn.benchmark.verify import WrongResultError


def test_cases():
    first, *others = differential.cases("host")
    assert first.kind == "two calls"
    assert [case.flops for case in others] == [first.flops, first.flops, first.flops * 5 // 2, first.flops * 5 // 2]
    v1, v2 = others[:2]
    assert v1.num_bytes - v2.num_bytes == v1.seqlen * v1.num_heads * v1.head_dim * 2
    assert len(differential.cases("cuda")) == 5


def test_records():
    first = {}
    run = partial(differential.host_records, first, Options(executor="host"))
    records = [next(run(replace(case, seqlen=64, head_dim=32))) for case in differential.cases("host")]
    ratios = [record.metrics["read_ratio"] for record in records]
    assert ratios[0] == 1.0 and ratios[2] < ratios[1] < 1
    assert len({record.case for record in records}) == 5


def test_a_wrong_result_is_not_measured(monkeypatch):
    case = replace(differential.cases("host")[1], seqlen=32, head_dim=32)
    right = cuattn.differential_attention
    monkeypatch.setattr(cuattn, "differential_attention", lambda *a, **o: right(*a, **o) * np.float16(1.1))
    with pytest.raises(WrongResultError, match="v1"):
        next(differential.host_records({}, Options(executor="host"), case))
