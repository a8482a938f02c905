"""rope_frequencies against what the papers and the published models say."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cuattn
from cuattn import errors
from cuattn.ops.rotary.frequencies import scaled_frequencies


def frequencies(rotary_dim=128, base=10000.0, scaling=None, **options):
    return scaled_frequencies(rotary_dim, base, scaling, options)[0]


def attention(**options):
    return scaled_frequencies(64, 10000.0, "yarn", {"original_max_position": 4096, **options})[1]


def test_plain():
    """Su et al. (2021), equation 15: theta_i = 10000^(-2 (i - 1) / d)."""
    np.testing.assert_allclose(frequencies(8), [1, 0.1, 0.01, 0.001], rtol=1e-15)
    cos, sin = cuattn.rope_frequencies(8, 50)
    assert cos.shape == sin.shape == (50, 4) and cos.dtype == sin.dtype == np.float32
    for position in range(50):
        for i, theta in enumerate((1, 0.1, 0.01, 0.001)):
            assert cos[position, i] == np.float32(math.cos(position * theta))
            assert sin[position, i] == np.float32(math.sin(position * theta))


def test_far_positions_keep_float32(executor):
    """The angle of the last position in float64, rounded once: the same as with 60 digits."""
    cos, sin = cuattn.rope_frequencies(16, 131072, base=500000.0)
    angles = cuattn.reference.rotary_angles([131071], 16, 500000.0)
    for table, function in ((cos, np.cos), (sin, np.sin)):
        # An angle of 131,071 radians is off by 2^-36; that, and half an ulp of float32.
        np.testing.assert_allclose(table[-1:], function(angles).astype(np.float64), rtol=0, atol=2**-25 + 2**-36)


def test_linear():
    """Chen et al. (2023), equation 4: f'(x, m) = f(x, m L / L')."""
    plain, _ = cuattn.rope_frequencies(32, 64)
    stretched, _ = cuattn.rope_frequencies(32, 253, scaling="linear", factor=4)
    np.testing.assert_array_equal(stretched[::4], plain)


def test_ntk():
    """Peng et al. (2023), equation 16: b' = b s^(d / (d - 2)); the last pair as with linear, the first one kept."""
    for rotary_dim in (4, 64, 128):
        scaled = frequencies(rotary_dim, scaling="ntk", factor=8.0)
        plain = frequencies(rotary_dim)
        assert scaled[0] == 1
        assert scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-14)
        ratio = np.diff(np.log(scaled))
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)  # still a geometric series
    # The base that is quoted for d = 128 and s = 2: 10000 * 2^(128/126).
    assert frequencies(128, scaling="ntk", factor=2.0)[1] == pytest.approx(20221.26 ** (-1 / 64), rel=1e-7)


def llama3_by_wavelength(f, factor=8.0, low=1.0, high=4.0, original=8192):
    """The published rule, case by case."""
    wavelength = 2 * math.pi / f
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def test_llama_3_1():
    """rope_theta 500000, head dim 128: pairs 0 to 28 are kept, 35 to 63 are divided by 8, those between are blended."""
    plain, scaled = frequencies(128, 500000.0), frequencies(128, 500000.0, "llama3")
    np.testing.assert_allclose(scaled, [llama3_by_wavelength(f) for f in plain], rtol=1e-14)
    ratio = plain / scaled
    assert (ratio[:29] == 1).all()
    np.testing.assert_allclose(ratio[35:], 8, rtol=1e-15)
    assert (np.diff(ratio[28:36]) > 0).all()
    # 500000^(-1/64), 500000^(-28/64) = 0.003211..., 500000^(-63/64) / 8 = 3.0689e-07
    np.testing.assert_allclose(scaled[[0, 1, 28, 63]], [1, 0.8146172, 0.0032114, 3.0689e-07], rtol=3e-5)


def test_llama_3_2():
    """The 1B and 3B models: head dim 64 and factor 32."""
    plain, scaled = frequencies(64, 500000.0), frequencies(64, 500000.0, "llama3", factor=32.0)
    np.testing.assert_allclose(scaled, [llama3_by_wavelength(f, 32.0) for f in plain], rtol=1e-14)
    assert (plain / scaled)[-1] == pytest.approx(32)


def test_yarn_of_deepseek():
    """Head dim 64, factor 40 over 4096: pairs up to 10 are kept, from 23 on they are interpolated."""
    plain = frequencies(64)
    scaled = frequencies(64, scaling="yarn", factor=40, original_max_position=4096)
    ratio = plain / scaled
    assert (ratio[:11] == 1).all() and ratio[11] > 1
    np.testing.assert_allclose(ratio[23:], 40, rtol=1e-15)
    assert ratio[22] < 40
    np.testing.assert_allclose(scaled[:5], [1, 0.7498942, 0.56234133, 0.42169651, 0.31622776], rtol=1e-7)
    np.testing.assert_allclose(scaled[30:], [4.4456983e-06, 3.3338035e-06], rtol=1e-7)
    # between them, linear in the pair
    np.testing.assert_allclose(scaled[11:23] / plain[11:23], 1 - np.arange(1, 13) / 13 * (1 - 1 / 40), rtol=1e-14)


def test_yarn_without_rounding_of_the_range():
    """The ends of the range are then where exactly 32 and 1 turns fit into the original context."""
    scaled = frequencies(64, 150000.0, "yarn", factor=32, original_max_position=4096, truncate=False)
    plain = frequencies(64, 150000.0)
    turns = 4096 * plain / (2 * math.pi)
    kept = scaled / plain == 1
    assert (kept == (turns >= 32)).all()
    np.testing.assert_allclose((plain / scaled)[turns <= 1], 32, rtol=1e-14)
    assert (np.abs(plain / scaled - 16.5)[(turns < 32) & (turns > 1)] < 15.5).all()
    rounded = frequencies(64, 150000.0, "yarn", factor=32, original_max_position=4096)
    assert (rounded != scaled).any()


def test_yarn_of_a_range_without_width():
    """A tiny context: no pair turns even once in it, so that all are interpolated; beyond the last pair likewise."""
    scaled = frequencies(16, scaling="yarn", factor=4, original_max_position=4)
    np.testing.assert_allclose(frequencies(16)[1:] / scaled[1:], 4, rtol=1e-12)


def test_attention_factor():
    """Peng et al. (2023), equation 22: sqrt(1/t) = 0.1 ln(s) + 1; and the ratio that DeepSeek takes."""
    assert attention(factor=16) == pytest.approx(0.1 * math.log(16) + 1)
    assert attention(factor=1) == 1
    assert attention(factor=16, attention_factor=1.5) == 1.5
    expected = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * 2 * math.log(40) + 1)
    assert attention(factor=40, mscale=0.707, mscale_all_dim=2) == pytest.approx(expected)
    assert attention(factor=40, mscale=0.707, mscale_all_dim=0.707) == 1
    cos, sin = cuattn.rope_frequencies(8, 5, scaling="yarn", factor=16, original_max_position=64)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(16) + 1, rtol=1e-6)


def test_a_factor_of_1_changes_nothing():
    plain = frequencies(64)
    for scaling in ("linear", "ntk", "llama3"):
        np.testing.assert_allclose(frequencies(64, scaling=scaling, factor=1), plain, rtol=1e-15)
    np.testing.assert_allclose(frequencies(64, scaling="yarn", factor=1, original_max_position=4096), plain, rtol=1e-15)


def test_empty_and_module(executor):
    cos, sin = cuattn.rope_frequencies(6, 0, array_module=executor.xp)
    assert cos.shape == sin.shape == (0, 3)
    assert isinstance(cos, executor.xp.ndarray)


def test_tables_feed_rope(executor):
    """A scaled table and rope agree with frequencies computed by hand."""
    cos, sin = cuattn.rope_frequencies(4, 9, scaling="linear", factor=2, array_module=executor.xp)
    x = np.array([[[1.0, 1.0, 0.0, 0.0]]], np.float32)
    result = executor.numpy(cuattn.rope(executor.array(x), [8], cos=cos, sin=sin))[0, 0]
    np.testing.assert_allclose(result, [math.cos(4), math.cos(0.04), math.sin(4), math.sin(0.04)], rtol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------

YARN = {"scaling": "yarn", "factor": 2, "original_max_position": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "dynamic"}, "scaling is 'dynamic'; allowed are None, 'linear', 'ntk', 'yarn' and 'llama3'"),
        ({"scaling": 2}, "scaling is 2"),
        ({"factor": 2}, "factor is 2, which scaling=None does not use"),
        ({"scaling": "linear"}, "scaling='linear' needs factor"),
        ({"scaling": "yarn"}, "scaling='yarn' needs factor and original_max_position"),
        ({"scaling": "linear", "factor": 2, "beta_fast": 3}, "beta_fast is 3, which scaling='linear' does not use"),
        ({"scaling": "llama3", "mscale": 1.0}, "mscale is 1.0, which"),
        ({"scaling": "linear", "factor": 0.5}, "factor is 0.5; a finite number of at least 1"),
        ({"scaling": "linear", "factor": math.nan}, "factor is nan"),
        ({"scaling": "linear", "factor": "2"}, "factor is '2' of type str"),
        ({"scaling": "linear", "factor": True}, "factor is True of type bool"),
        ({"scaling": "llama3", "original_max_position": 0}, "original_max_position is 0; an integer from 1"),
        ({"scaling": "llama3", "low_freq_factor": 4.0}, "low_freq_factor is 4.0 and high_freq_factor 4.0"),
        ({**YARN, "beta_slow": 32.0}, "beta_slow is 32.0 and beta_fast 32.0"),
        ({**YARN, "mscale": 1.0}, "mscale and mscale_all_dim go together"),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}, "the same twice"),
        ({**YARN, "mscale": -1.0, "mscale_all_dim": 1.0}, "mscale is -1.0; a finite number of at least 0"),
        ({**YARN, "truncate": 1}, "truncate is 1"),
        ({**YARN, "base": 1.0}, "base is 1"),
        ({"base": 0.9}, "base is 0.9"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(errors.ArgumentError, match=message):
        cuattn.rope_frequencies(8, 4, **options)


def test_ntk_needs_two_pairs():
    with pytest.raises(errors.ArgumentError, match="rotary_dim is 2; scaling='ntk'"):
        cuattn.rope_frequencies(2, 4, scaling="ntk", factor=2)


@pytest.mark.parametrize("rotary_dim", [0, 3, 514, 8.0, None])
def test_bad_rotary_dim(rotary_dim):
    with pytest.raises(errors.ArgumentError, match="rotary_dim is"):
        cuattn.rope_frequencies(rotary_dim, 4)


@pytest.mark.parametrize("max_seqlen", [-1, 4.0, True, None, "4"])
def test_bad_max_seqlen(max_seqlen):
    with pytest.raises(errors.ArgumentError, match="max_seqlen is"):
        cuattn.rope_frequencies(8, max_seqlen)


def test_too_many_positions():
    with pytest.raises(errors.ShapeError, match="max_seqlen is 2147483648; at most 2147483647"):
        cuattn.rope_frequencies(8, 2**31)
