"""Options of differential attention: each, for both softmaxes of a pair or for one of them, and drawn together."""

from __future__ import annotations

import numpy as np
import pytest
from differential_calls import F16, F64, assert_right, make
from hypothesis import given, settings
from hypothesis import strategies as st

import cuattn

SHAPE = 1, 35, 70, 4, 2, 32, 32
_, N, M, H, *_ = SHAPE
RNG = np.random.default_rng(3)
MASK = RNG.random((N, M)) < 0.9
OPTIONS = {
    "scale": {"scale": -0.4},
    "window": {"causal": True, "window": (20, None)},
    "chunk": {"chunk": 16},
    "top_left": {"causal": "top_left"},
    "diagonal_offset": {"causal": True, "diagonal_offset": -7},
    "softcap": {"softcap": 1.5},
    "alibi_both": {"alibi_slopes": RNG.random(H)},
    "alibi_own": {"alibi_slopes": RNG.random((1, 2 * H))},
    "bias_both": {"bias": RNG.standard_normal((H, N, M)).astype(np.float32)},
    "bias_own": {"bias": RNG.standard_normal((1, 2 * H, N, 1)).astype(np.float32)},
    "mask_all": {"mask": RNG.random((N, M)) < 0.4},
    "mask_both": {"mask": RNG.random((1, H, 1, M)) < 0.4},
    "mask_own": {"mask": RNG.random((2 * H, 1, M)) < 0.4},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 2**40 + 3, "dropout_offset": 5},
    "bias_and_mask": {
        "bias": RNG.standard_normal((2 * H, N, M)).astype(np.float32),
        "mask": RNG.random((H, N, M)) < 0.5,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(executor, name):
    q, k, v = make(SHAPE, F16)
    options = OPTIONS[name]
    if not options.keys() & {"causal", "chunk", "scale"}:
        options = {"softcap": 40.0, "mask": MASK, **options}  # two: one kernel, that has every option, serves them all
    assert_right(executor, q, k, v, 0.6, **options)


def test_tiles_that_one_stream_does_not_see(executor):
    """Tiles are passed over where no stream of the pair sees a key of them, and not where one does."""
    q, k, v = make((1, 70, 300, 2, 1, 32, 32), F16)
    mask = np.zeros((4, 70, 300), bool)
    mask[0, :, :64] = mask[1, :, 128:192] = mask[2, :, 290:] = mask[3, :40, 100] = True
    assert_right(executor, q, k, v, 0.6, mask=mask)
    k[:, 192:256], v[:, 192:256] = np.nan, np.nan  # no stream sees one of their tiles
    q, k, v = map(executor.array, (q, k, v))
    out = cuattn.differential_attention(q, k, v, 0.6, mask=executor.array(mask))
    assert np.isfinite(executor.numpy(out)).all()


@settings(max_examples=25)
@given(data=st.data())
def test_any_options(executor, data):
    """Options together, in one variant of the kernel for each dtype."""
    dtype = data.draw(st.sampled_from((F16, F64)))
    heads, kv_heads = data.draw(st.sampled_from(((3, 1), (2, 2), (5, 1))))
    seqlen_q, seqlen_k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90))
    seed = data.draw(st.integers(0, 2**32 - 1))
    shared = data.draw(st.booleans())
    q, k, v = make((1, seqlen_q, seqlen_k, heads, kv_heads, 32, 32), dtype, shared=shared, seed=seed)
    rng = np.random.default_rng(seed)

    def logits(name):
        axis = data.draw(st.sampled_from((1, heads, 2 * heads)), name)
        return axis, data.draw(st.sampled_from((1, seqlen_q))), data.draw(st.sampled_from((1, seqlen_k)))

    options = {
        "softcap": data.draw(st.sampled_from((None, 0.5, 30.0))),
        "alibi_slopes": rng.random(data.draw(st.sampled_from((heads, 2 * heads)))),
        "bias": rng.standard_normal(logits("heads of the bias")).astype(np.float32),
        "mask": rng.random(logits("heads of the mask")) < 0.8,
        "causal": data.draw(st.sampled_from((False, True, "top_left"))),
        "window": data.draw(st.sampled_from((None, (10, 5), (None, 3)))),
        "dropout_p": data.draw(st.sampled_from((0.0, 0.3))),
        "norm": data.draw(st.booleans()),
        "output_scale": 0.8,
    }
    lam = data.draw(st.sampled_from((0.5, rng.random(heads), rng.random((1, seqlen_q, heads)))))
    assert_right(executor, q, k, v, lam, **options)
