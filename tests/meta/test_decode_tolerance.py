"""The tolerance rule of decoding passes every correct low-precision computation and no planted error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from decode_emulation import FAULTS, INPUT_FAULTS, split_decode, spoilt

import cuattn
from cuattn.testing import ToleranceError, assert_decode_close, assert_paged_close, assert_paged_varlen_close
from cuattn.testing.decode_problems import SCALE_KINDS, cached_problem
from cuattn.testing.options import make_sinks, make_slopes
from cuattn.testing.strategies import DTYPES, VALUE_KINDS, fill

F16, BF16, F32 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32))

#: dtype of q, and format of the cache: plain where there is none.
FORMATS = {
    **{str(dtype): (dtype, None) for dtype in DTYPES},
    "float16_e4m3fn": (F16, "e4m3fn"),
    "bfloat16_e5m2": (BF16, "e5m2"),
    "float32_int8": (F32, "int8"),
    "bfloat16_int8": (BF16, "int8"),
    "float16_nvfp4": (F16, "nvfp4"),
    "bfloat16_mxfp4": (BF16, "mxfp4"),
    "float16_mxfp4": (F16, "mxfp4"),
}
formats = pytest.mark.parametrize("form", FORMATS)
CHECKS = {"decode": assert_decode_close, "paged": assert_paged_close, "varlen": assert_paged_varlen_close}


def check(problem, out, lse=None, **changes):
    CHECKS[problem.kind](out, *problem.arrays, lse=lse, **{**problem.options, **changes})


def random_options(rng, batch, heads, largest):
    values = {
        "scale": float(rng.choice([1.0, 0.3, -0.1, 0.0])),
        "causal": [False, "top_left", "bottom_right"][rng.integers(3)],
        "window": (int(rng.integers(0, largest + 1)), None),
        "softcap": float(rng.choice([1.0, 20.0])),
        "alibi_slopes": make_slopes(rng, (heads,) if rng.random() < 0.5 else (batch, heads)),
        "sinks": make_sinks(rng, heads),
        "rope": cuattn.Rotary(interleaved=bool(rng.integers(2)), base=float(rng.choice([10.0, 10000.0]))),
        "rotate_keys": True,
    }
    chosen = {name: value for name, value in values.items() if rng.random() < 0.25}
    if "rope" not in chosen:
        chosen.pop("rotate_keys", None)
    return chosen


def random_problem(rng, form, kind, largest):
    dtype, kv_format = FORMATS[form]
    heads = [(1, 1), (2, 1), (6, 3), (5, 1)][rng.integers(4)]
    lengths = [int(rng.choice([0, 1, 2, rng.integers(1, largest + 1)])) for _ in range(int(rng.integers(1, 4)))]
    packed = rng.random() < 0.3
    seqlens_q = [int(rng.integers(0, 6)) for _ in lengths] if packed else int(rng.integers(1, 6))
    return cached_problem(
        rng,
        lengths=lengths,
        seqlens_q=seqlens_q,
        heads=heads,
        head_dims=tuple(2 * int(n) for n in rng.integers(1, 40, 2)),
        dtype=dtype,
        kv_format=kv_format,
        scales=SCALE_KINDS[rng.integers(3)],
        page_size=int(rng.choice([1, 3, 16])) if packed or rng.random() < 0.5 else None,
        fill=lambda shape, real, of: fill(shape, real, kind, of),
        **random_options(rng, len(lengths), heads[0], largest),
    )


@pytest.mark.parametrize("seed", range(2))
@formats
def test_correct_emulations_pass(form, seed):
    rng = np.random.default_rng(seed)
    for number in range(40):
        kind = VALUE_KINDS[number % len(VALUE_KINDS)]
        problem = random_problem(rng, form, kind, 50 if number % 10 else 250)
        num_splits, block_n = int(rng.choice([1, 2, 3, 7, 20])), int(rng.choice([1, 8, 16, 64]))
        with np.errstate(all="ignore"):
            out, lse = split_decode(problem, num_splits=num_splits, block_n=block_n, sequential=bool(number % 2))
        try:
            check(problem, out, lse)
        except AssertionError as error:
            raise AssertionError(f"problem {number}: {kind}, {num_splits=}, {block_n=}, {problem}") from error


@pytest.mark.parametrize("fault", FAULTS)
@formats
def test_planted_faults_fail(form, fault):
    rng = np.random.default_rng(7)
    dtype, kv_format = FORMATS[form]
    for number in range(10):
        options = {"sinks": np.float32([2, 3])} if fault.startswith("sink") else {}
        problem = cached_problem(
            rng, lengths=[int(n) for n in rng.integers(8, 65, 2)], seqlens_q=1, heads=(2, 1), head_dims=(32, 32),
            dtype=dtype, kv_format=kv_format, scales="head", **options,
        )  # fmt: skip
        with np.errstate(all="ignore"):
            right = split_decode(problem, num_splits=3, block_n=8)
            wrong = split_decode(problem, num_splits=3, block_n=8, fault=fault, rng=rng)
        check(problem, *right)
        if all((a == b).all() for a, b in zip(right, wrong, strict=True)):
            assert fault in ("key_twice", "last_maximum")  # the split was the first; its maximum was the largest
            continue
        with pytest.raises(ToleranceError, match=r"sequence \d of length \d+: (out|lse)\[\d"):
            check(problem, *wrong)
            pytest.fail(f"{fault} passed as problem {number}: {problem}", pytrace=False)


def _is_possible(form, fault):
    kv_format = FORMATS[form][1]
    if "scale_of" in fault:
        return kv_format is not None and not kv_format.endswith("fp4")
    return kv_format is None or "rotated" not in fault


@pytest.mark.parametrize(
    ("form", "fault"), [(form, fault) for form in FORMATS for fault in INPUT_FAULTS if _is_possible(form, fault)]
)
def test_answers_to_another_problem_fail(form, fault):
    """By out alone: lse may be right where a value is not."""
    rng = np.random.default_rng(17)
    dtype, kv_format = FORMATS[form]
    for number in range(8):
        options = {"causal": False}
        if "fp4" in form:  # random codes reach far: one key would outweigh all others
            options["scale"] = 0.02
        if "next_head" in fault:
            scales = np.float32([0.6, 1.2]) / (40 if kv_format == "int8" else 1)
            options |= {"k_scale": scales, "v_scale": scales}
        if "rotated" in fault:
            options |= {"rope": cuattn.Rotary(base=10.0), "rotate_keys": True}
        short = 4 * int(rng.integers(2, 8))
        problem = cached_problem(
            rng, lengths=[short, short + 4 * int(rng.integers(1, 5))], seqlens_q=2, heads=(4, 2), head_dims=(32, 32),
            dtype=dtype, kv_format=kv_format, scales="slot" if fault.endswith("slot") else "head", **options,
        )  # fmt: skip
        if fault in ("wrong_page", "wrong_slot"):
            problem = problem.in_pages(rng, 4)
        else:  # what is beyond the lengths would be a number in another sequence's place: NaN were too easy
            slots = (x for x in problem.options.values() if np.ndim(x) >= 3)
            for x in (problem.k.array, problem.v.array, *slots):
                for b, length in enumerate(problem.seqlens_k):
                    x[b, length:] = x[b, :1]
        check(problem, *split_decode(problem, num_splits=2, block_n=8))
        out, _ = split_decode(spoilt(problem, fault, rng), num_splits=2, block_n=8)
        with pytest.raises(ToleranceError, match=r"sequence \d of length \d+: out\[\d"):
            check(problem, out)
            pytest.fail(f"{fault} passed as problem {number}: {problem}", pytrace=False)
