"""The Hopper forward kernel: what is true whatever the numbers are, in any order and in any layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
from attention_calls import assert_same, prepare
from hopper_calls import (
    BF16,
    F16,
    SMALL,
    TURNS,
    assert_right,
    call,
    make,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import reference
from cuattn.ops.attention.forward import hopper_launch
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.testing import kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.strategies import aligned_layouts, attention_problems, examples, fill

# --- properties -------------------------------------------------------------------------------------------------------


ALIGNED = st.sampled_from([(64, 64), (40, 16), (8, 64)])
DRAWN = ("scale", "causal", "window", "chunk", "softcap", "alibi_slopes", "sinks", "diagonal_offset")


def problems(**strategies):
    """Drawn problems that tensor maps can hold."""
    given = {"head_dims": ALIGNED, "max_seqlen": 200, **strategies}
    return attention_problems(dtype=st.sampled_from([F16, BF16]), layout=aligned_layouts(), **given)


@examples(12)
@given(problem=problems(options=DRAWN))
def test_agrees_with_the_reference(executor, problem):
    before = [guarded.root.copy() for guarded in (problem.q, problem.k, problem.v)]
    assert_right(executor, problem.q, problem.k, problem.v, **problem.options)
    for guarded, content in zip((problem.q, problem.k, problem.v), before, strict=True):
        np.testing.assert_array_equal(guarded.root, content)  # inputs and their surroundings are only read


@examples(4)
@given(problem=problems(options=("scale",)), seed=st.integers(0, 999))
def test_order_of_keys_does_not_matter(executor, problem, seed):
    q, k, v = problem.arrays
    order = np.random.default_rng(seed).permutation(k.shape[1])
    permuted = call(executor, q, k[:, order], v[:, order], **problem.options)
    assert_same(permuted, call(executor, q, k, v, **problem.options), q, k, v, **problem.options)


@examples(4)
@given(problem=problems(options=("scale",)), share=st.floats(0, 1))
def test_parts_merge_by_their_lse(executor, problem, share):
    q, k, v = problem.arrays
    cut = min(max(1, int(share * k.shape[1])), k.shape[1] - 1)
    if cut == 0:
        return
    parts = [call(executor, q, k[:, part], v[:, part], **problem.options) for part in (slice(cut), slice(cut, None))]
    merged = reference.merge_states([out for out, _ in parts], [lse for _, lse in parts])
    assert_same(call(executor, q, k, v, **problem.options), merged, q, k, v, **problem.options)


def test_keys_twice_add_log_two_to_lse(executor):
    q, k, v = make((70, 150))
    out, lse = call(executor, q, k, v)
    doubled = [q, np.concatenate([k, k], axis=1), np.concatenate([v, v], axis=1)]
    assert_same(call(executor, *doubled), (out, lse + math.log(2)), *doubled)


def test_agrees_with_the_portable_kernel(executor):
    """Both are within the bound, so they differ by twice the bound at most."""
    arrays = make((150, 200), heads=(4, 2), batch=2)
    options = {"causal": True, "alibi_slopes": np.float32([0.5, 0.25, 0.125, 1])}
    portable = next(row for row in cuattn.ops.attention.forward.config.FLASH_FWD_CONFIGS if row.itemsize == 2)
    assert_same(
        call(executor, *arrays, **options), call(executor, *arrays, config=portable, **options), *arrays, **options
    )


# --- schedules, layouts, results --------------------------------------------------------------------------------------


def test_the_order_of_tiles_changes_no_bit(executor, monkeypatch):
    """One CTA for everything, or one for each tile; heads one after the other, or all of them side by side."""
    arrays = make((150, 200), heads=(4, 2), batch=2)
    expected = [call(executor, *arrays, causal=causal) for causal in (False, True)]
    for num_ctas, l2_bytes in ((1, 1), (3, 2 * 200 * 128 * 2), (1000, 1 << 30)):
        monkeypatch.setattr(hopper_launch, "HOST_CTAS", num_ctas)
        monkeypatch.setattr(hopper_launch, "L2_BYTES", l2_bytes)
        for causal in (False, True):
            assert same_bits(call(executor, *arrays, causal=causal), expected[causal])


@pytest.mark.parametrize("row", [SMALL, TURNS], ids=["one", "turns"])
def test_asynchrony_and_schedule_change_no_bit(executor, row):
    arrays = make((200, 300), heads=(2, 1))
    expected = call(executor, *arrays, config=row, causal=True)
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            found = call(executor, *arrays, config=row, causal=True)
            assert same_bits(found, expected), (asynchrony, seed)


LAYOUTS = {
    "heads_first": Layout(order=(0, 2, 1, 3)),
    "padded": Layout(pad=(1, 2, 1, 8)),
    "offset": Layout(offset=8),
    "last_axis_strided": Layout(order=(0, 3, 1, 2)),  # copied
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_change_no_bit(executor, name):
    plain = make((70, 150), heads=(2, 1), batch=2)
    arrays = make((70, 150), heads=(2, 1), batch=2, layout=LAYOUTS[name])
    expected = call(executor, *plain)
    assert same_bits(call(executor, *arrays), expected)
    target = executor.guarded(
        expected[0].shape, F16, Layout(order=LAYOUTS[name].order, pad=LAYOUTS[name].pad, offset=1)
    )
    moved, _ = prepare(executor, plain, {})
    kernels.attention(*moved, config=SMALL, out=target.array)
    target.check()
    assert same_bits([executor.numpy(target.array)], expected[:1])


def test_views_of_one_packed_projection(executor):
    packed = place(fill((2, 70, 6, 64), BF16, "normal", np.random.default_rng(0)), Layout(pad=(0, 1, 1, 0))).array
    assert_right(executor, packed[:, :, :2], packed[:, :, 2:4], packed[:, :, 4:], causal=True)
    assert_right(executor, *[packed[:, :, :2]] * 3)


def test_without_lse(executor):
    arrays = make((70, 150))
    moved, _ = prepare(executor, arrays, {})
    assert same_bits([executor.numpy(kernels.attention(*moved, config=SMALL))], call(executor, *arrays)[:1])


def test_the_public_functions_take_it(executor, monkeypatch):
    """Without a config, where kernels are compiled for sm_90a."""
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    arrays = make((70, 150), heads=(2, 1))
    moved, _ = prepare(executor, arrays, {})
    path = cuattn.forward_path(*moved, causal=True)
    assert isinstance(path.row, HopperFwdConfig)
    out = executor.numpy(cuattn.attention(*moved, causal=True))
    assert same_bits([out], call(executor, *arrays, config=path.row, causal=True)[:1])
