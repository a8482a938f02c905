"""The rule for rotations accepts what float32 may do and refuses small mistakes; the cases check themselves by it."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import reference
from cuattn.testing import ToleranceError, rotary_cases
from cuattn.testing.rotary_cases import RopeCase, RopeFrequenciesCase, SplitQKVCase
from cuattn.testing.rotary_tolerance import assert_rope_close, assert_split_qkv_close
from cuattn.testing.strategies import DTYPES

POSITIONS = np.array([0, 1, 17, 4095, 10**6, 2**31 - 1, -5])


def emulated(x, positions, *, angle_error=0.0, **options):
    """A correct kernel in float32 (float64): cosines and sines of exact angles, rounded; products and sums, rounded."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    angles = (reference.rotary_angles(positions, x.shape[-1]) + angle_error).astype(np.longdouble)
    c, s = (function(angles).astype(real)[:, None] for function in (np.cos, np.sin))
    a, b = np.split(x.astype(real), 2, axis=-1)
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_arithmetic_passes(dtype):
    for seed in range(30):
        x = np.random.default_rng(seed).standard_normal((7, 3, 32)).astype(dtype)
        assert_rope_close(emulated(x, POSITIONS), x, POSITIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_mistakes_fail(dtype):
    x = np.random.default_rng(0).standard_normal((7, 3, 32)).astype(dtype)
    right = emulated(x, POSITIONS)
    few_roundings = 8 * float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)
    if dtype.itemsize > 2:
        with pytest.raises(ToleranceError):
            assert_rope_close(emulated(x, POSITIONS, angle_error=few_roundings), x, POSITIONS)
    for wrong in (
        emulated(x, POSITIONS + 1),
        emulated(x, -POSITIONS),
        np.roll(right, 1, axis=1),
        np.nextafter(np.nextafter(right, dtype.type(9)), dtype.type(9)) if dtype == np.float16 else x,
    ):
        with pytest.raises(ToleranceError):
            assert_rope_close(wrong, x, POSITIONS)


def test_what_is_not_turned_must_be_equal():
    x = np.ones((7, 1, 8), np.float32)
    out = reference.rope(x, POSITIONS, rotary_dim=4).astype(np.float32)
    assert_rope_close(out, x, POSITIONS, rotary_dim=4)
    out[3, 0, 5] = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(ToleranceError, match=r"out\[3, 0, 5\]"):
        assert_rope_close(out, x, POSITIONS, rotary_dim=4)


def test_the_rule_for_split_qkv():
    rng = np.random.default_rng(0)
    qkv, bias = rng.standard_normal((5, 48)).astype(np.float32), rng.standard_normal(48).astype(np.float32)
    options = {"num_heads": 4, "num_kv_heads": 1, "rope": {}, "positions": np.arange(5)}
    outs = [x.astype(np.float32) for x in reference.split_qkv(qkv, bias, **options)]
    assert_split_qkv_close(outs, qkv, bias, **options)
    for wrong in ([outs[0], outs[2], outs[1]], [outs[0] * 1.00001, *outs[1:]], [*outs[:2], outs[2] * 1.00001]):
        with pytest.raises(ToleranceError):
            assert_split_qkv_close(wrong, qkv, bias, **options)
    with pytest.raises(ToleranceError):
        assert_split_qkv_close(outs, qkv, None, **options)


def test_reference_angles():
    """Against float64, which multiplies exactly enough at small positions and reduces any number exactly."""
    positions = np.arange(-50, 50)
    plain = positions[:, None] * 10000.0 ** (-np.arange(8) / 8)
    for function in (np.cos, np.sin):
        np.testing.assert_allclose(function(reference.rotary_angles(positions, 16)), function(plain), atol=1e-14)
        far = function(reference.rotary_angles([2**31], 2)[0, 0])  # of pair 0: the position itself, in radians
        assert float(far) == pytest.approx(function(2.0**31), abs=1e-15)
    assert (np.abs(reference.rotary_angles([2**31 - 1], 64)) < 2 * np.pi).all()


# --- cases -----------------------------------------------------------------------------------------------------------

CASES = (
    RopeCase(2, 9, 3, 32),
    RopeCase(1, 9, 3, 40, rotary_dim=16, dtype="float32", interleaved=True, tables=True),
    SplitQKVCase(2, 6, 4, 16, num_kv_heads=2),
    SplitQKVCase(2, 6, 2, 16, bias=False, rope=False, dtype="bfloat16"),
    SplitQKVCase(3, 8, 2, 16, fill=0.5),
    *(RopeFrequenciesCase(16, 50, scaling) for scaling in (None, "linear", "ntk", "yarn", "llama3")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_pass_and_notice(executor, case, monkeypatch):
    inputs = case.make_inputs(seed=3, xp=executor.xp)
    result = case.run(inputs)
    case.check(inputs, result)
    assert case.flops >= 0 and case.num_bytes > 0
    parts = result if isinstance(result, tuple) else (result,)
    for i in range(len(parts)):
        wrong = [executor.numpy(x).copy() for x in parts]
        wrong[i].reshape(-1)[-1] += 1
        with pytest.raises(AssertionError):
            case.check(inputs, tuple(wrong) if isinstance(result, tuple) else wrong[0])


def test_names_differ():
    assert len({case.name for case in CASES}) == len(CASES)


def test_big_cases_are_checked_by_samples(executor, monkeypatch):
    monkeypatch.setattr(rotary_cases, "_MAX_ELEMENTS", 3 * 2 * 64)
    case = RopeCase(1, 30, 2, 32, dtype="float32")
    inputs = case.make_inputs()
    result = case.run(inputs)
    for token, noticed in ((0, True), (14, True), (29, True), (7, False)):
        wrong = result.copy()
        wrong[0, token] += 1
        if noticed:
            with pytest.raises(ToleranceError):
                case.check(inputs, wrong)
        else:
            case.check(inputs, wrong)


def test_bytes_are_those_that_the_kernel_moves():
    """Beside the turns of the pairs and the positions, which every group of heads reads again."""
    case = RopeCase(1, 16, 4, 64, tables=True)
    inputs = case.make_inputs()
    with cuattn.host.profile() as profile:
        case.run(inputs)
    assert profile.bytes["global"]["write"] == 16 * 4 * 64 * 2
    threads = 16 * 4  # of a token: one group of four heads, four units of eight pairs
    assert profile.bytes["global"]["read"] + profile.bytes["global"]["write"] == case.num_bytes + (threads - 16) * 4
