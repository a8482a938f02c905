"""The decode suite on the host executor, in small."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.benchmark import Options, decode, run_suite
from cuattn.testing.decode_cases import DecodeCase

TINY = Options(executor="host", dtypes=("float16",), seqlens=(48,), head_dims=(64,), budget_s=0.01)


def test_suite() -> None:
    report = run_suite(["decode"], options=TINY)
    assert report.failures == ()
    names = [record.case for record in report.records]
    assert len(names) == len(set(names))
    calls = [record.metrics for record in report.records if record.case.startswith("decode_")]
    assert len(calls) == len(decode.decode_cases("host", TINY))
    for metrics in calls:
        assert metrics["global_read_bytes"] + metrics["global_write_bytes"] >= metrics["least_bytes"]
    generated = {
        record.case.rsplit("_", 1)[1]: record.metrics for record in report.records if "slots" in record.metrics
    }
    assert generated["paged"]["used_tokens"] == generated["contiguous"]["used_tokens"]
    assert generated["paged"]["cache_bytes"] < generated["contiguous"]["cache_bytes"]
    plans = [record.metrics for record in report.records if record.case.startswith("plan_")]
    assert all(metrics["num_ctas"] >= 1 for metrics in plans)


def test_least_bytes() -> None:
    case = DecodeCase(2, 20, 4, 2, 64, page_size=16)
    arrays = case.make_inputs()
    used = 2 * 20 * 2 * 64 * 2  # of keys, as of values: the slots behind a length are not counted
    small = sum(arrays[name].nbytes for name in ("block_tables", "seqlens_k"))
    assert case.num_bytes == 2 * used + 2 * arrays["q"].nbytes + small
    quantized = DecodeCase(2, 16, 4, 2, 64, page_size=16, kv_format="nvfp4")
    stored = quantized.make_inputs()
    codes = sum(stored[name].nbytes for name in ("k_pages", "v_pages", "k_block_scales", "v_block_scales"))
    assert quantized.kv_bytes == codes


@pytest.mark.parametrize("fault", [0.0, np.nan])
def test_a_wrong_result_is_found(fault: float) -> None:
    case = DecodeCase(2, 20, 4, 2, 64)
    arrays = case.make_inputs()
    out, lse = case.run(arrays)
    case.check(arrays, (out, lse))
    wrong = out.copy()
    wrong[-1, 0, 0] = fault
    with pytest.raises(AssertionError):
        case.check(arrays, (wrong, lse))


def test_planned() -> None:
    case = DecodeCase(2, 300, 4, 2, 64, num_splits=3)
    arrays = case.make_inputs()
    case.check(arrays, case.run(arrays, plan=case.plan()))
