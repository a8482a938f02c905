"""split_qkv against its formula and against the steps it fuses; its work; what is refused."""

from __future__ import annotations

import importlib
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import Rotary, errors, host
from cuattn.testing import kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.rotary_tolerance import assert_split_qkv_close
from cuattn.testing.strategies import DTYPES, examples, fill, layouts

#: (heads, kv_heads, head dim, rotary dim): a rotary dim of 0 is none at all.
SHAPES = ((1, 1, 64, 64), (4, 2, 64, 32), (6, 1, 32, 32), (3, 3, 20, 10), (5, 1, 7, 4), (2, 2, 128, 0), (3, 1, 9, 0))


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def lengths_of(num_tokens, rng):
    """Sequences, some without a token, that make up `num_tokens`."""
    cuts = np.sort(rng.integers(0, num_tokens + 1, 4))
    return np.concatenate([[0, 0], cuts, [num_tokens]])


def on(executor, plan):
    arrays = {name: executor.array(getattr(plan, name)) for name in ("indices", "padding", "cu_seqlens")}
    return replace(plan, **arrays)


@st.composite
def problems(draw):
    """qkv and bias in any layout, and keywords of the call (with `rope` as a dict)."""
    num_heads, kv_heads, head_dim, rotary_dim = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options = {"num_heads": num_heads, "num_kv_heads": kv_heads}
    if draw(st.booleans()):
        mask = rng.random((draw(st.integers(1, 3)), draw(st.integers(1, 9)))) < draw(st.sampled_from((0.0, 0.5, 1.0)))
        options["plan"] = cuattn.padding_plan(mask)
        num_tokens = options["plan"].num_tokens
    else:
        num_tokens = draw(st.integers(0, 20))
    if rotary_dim:
        options["rope"] = {"interleaved": draw(st.booleans()), "rotary_dim": rotary_dim}
        if draw(st.booleans()):
            cos, sin = cuattn.rope_frequencies(rotary_dim, 40, base=100.0)
            options["rope"] |= {"cos": cos, "sin": sin}
        source = draw(st.sampled_from(("positions", "plan" if "plan" in options else "cu_seqlens")))
        if source == "positions":
            options["positions"] = rng.integers(0, 40, num_tokens, dtype=draw(st.sampled_from((np.int32, np.int64))))
        elif source == "cu_seqlens":
            options["cu_seqlens"] = lengths_of(num_tokens, rng)
    dtype = draw(st.sampled_from(DTYPES))
    width = (num_heads + 2 * kv_heads) * head_dim
    qkv = place(fill((num_tokens, width), dtype, "normal", rng), draw(layouts(ndim=2)))
    bias = place(fill((width,), dtype, "normal", rng), draw(layouts(ndim=1))) if draw(st.booleans()) else None
    return qkv, bias, options


@examples(80)
@given(problem=problems(), data=st.data())
def test_against_the_formula(executor, problem, data):
    qkv, bias, options = problem
    arguments = {**options}
    if "rope" in options:
        tables = {name: executor.array(x) for name, x in options["rope"].items() if name in ("cos", "sin")}
        arguments["rope"] = Rotary(**{**options["rope"], **tables})
    plan, tokens = options.get("plan"), (qkv.array.shape[0],)
    leading = tokens if plan is None else (plan.batch, plan.seqlen)
    heads = options["num_heads"], options["num_kv_heads"], options["num_kv_heads"]
    head_dim = qkv.array.shape[1] // sum(heads)
    outs = [
        executor.guarded((*leading, n, head_dim), qkv.array.dtype, data.draw(layouts(ndim=len(leading) + 2)))
        for n in heads
    ]
    arrays = [executor.array(x) if x is not None else None for x in (qkv, bias)]
    results = cuattn.split_qkv(*arrays, **arguments, out=tuple(x.array for x in outs))
    for result, out in zip(results, outs, strict=True):
        assert result is out.array
        out.check()
    results = [executor.numpy(x) for x in results]
    assert_split_qkv_close(results, qkv.array, None if bias is None else bias.array, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_same_bits_as_its_steps(executor, dtype, interleaved):
    """Without a bias, which the steps would round on the way: split, then rope, then restore_padding."""
    plan = cuattn.padding_plan(np.random.default_rng(3).random((3, 9)) < 0.6)
    qkv = executor.array(normal(plan.num_tokens, 8 * 48, dtype=dtype))
    rotary = Rotary(interleaved=interleaved, rotary_dim=32)
    fused = cuattn.split_qkv(qkv, num_heads=4, num_kv_heads=2, rope=rotary, plan=on(executor, plan))
    positions = np.concatenate([np.arange(n) for n in np.diff(plan.cu_seqlens)])
    heads = qkv.reshape(plan.num_tokens, 8, 48)
    for result, part, turned in zip(fused, (heads[:, :4], heads[:, 4:6], heads[:, 6:]), (1, 1, 0), strict=True):
        if turned:
            part = cuattn.rope(part, positions, interleaved=interleaved, rotary_dim=32)
        expected = cuattn.restore_padding(part, on(executor, plan))
        np.testing.assert_array_equal(executor.numpy(result), executor.numpy(expected))


def test_plain_split_copies_bits(executor):
    """No bias, no rotation: NaN and infinities, signed zeros and denormals pass through untouched."""
    bits = np.random.default_rng(0).integers(0, 2**16, (5, 6 * 20), dtype=np.uint16)
    qkv = bits.view(np.float16)
    q, k, v = (executor.numpy(x) for x in cuattn.split_qkv(executor.array(qkv), num_heads=4, num_kv_heads=1))
    joined = np.concatenate([np.ascontiguousarray(x).reshape(5, -1) for x in (q, k, v)], axis=1)
    np.testing.assert_array_equal(joined.view(np.uint16), bits)
    assert q.shape == (5, 4, 20) and k.shape == v.shape == (5, 1, 20)


def test_the_sum_with_the_bias_is_rounded_once(executor):
    """(1 + 2^-11) - 1 in float16: rounded before it is turned, the sum would be 0."""
    qkv, bias = np.zeros((1, 6), np.float16), np.zeros(6, np.float16)
    qkv[0, :2], bias[:2] = [1, 1], [2**-11, -1]
    q, _, _ = cuattn.split_qkv(executor.array(qkv), executor.array(bias), num_heads=1, rope=Rotary(), positions=[1])
    c, s = np.cos(1.0), np.sin(1.0)
    exact = np.array([(1 + 2**-11) * c, (1 + 2**-11) * s])
    np.testing.assert_array_equal(executor.numpy(q)[0, 0], exact.astype(np.float16))
    assert (exact.astype(np.float16) != np.array([c, s]).astype(np.float16)).any()


def test_padding_is_zero_whatever_the_bias(executor):
    mask = np.array([[0, 1, 0], [0, 0, 0]])
    plan = on(executor, cuattn.padding_plan(mask))
    qkv, bias = np.full((1, 24), np.nan, np.float32), np.full(24, np.inf, np.float32)
    for result in cuattn.split_qkv(executor.array(qkv), executor.array(bias), num_heads=1, rope=Rotary(), plan=plan):
        values = executor.numpy(result)
        assert np.isnan(values[mask == 1]).all() and (values[mask == 0] == 0).all()


@pytest.mark.parametrize("lengths", [[5, 0, 0, 3], [0, 0, 8], [8], [1] * 8, [0, 7, 0, 1, 0]])
def test_positions_start_again_in_every_sequence(executor, lengths):
    qkv = np.broadcast_to(normal(1, 48), (8, 48)).copy()
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    for starts in (cu_seqlens, cu_seqlens.tolist(), executor.array(cu_seqlens)):
        q, _, _ = cuattn.split_qkv(executor.array(qkv), num_heads=2, rope=Rotary(), cu_seqlens=starts)
        positions = np.concatenate([np.arange(n) for n in lengths])
        expected = executor.numpy(cuattn.rope(executor.array(qkv[:, :16].reshape(8, 2, 8)), positions))
        np.testing.assert_array_equal(executor.numpy(q), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_strided_positions(executor, dtype):
    """Every other one, and from the end."""
    qkv, positions = normal(4, 24), np.arange(8, dtype=dtype) * 3
    for step in (2, -2):
        given = executor.array(positions)[::step]
        results = cuattn.split_qkv(executor.array(qkv), num_heads=1, rope=Rotary(), positions=given)
        results = [executor.numpy(x) for x in results]
        assert_split_qkv_close(results, qkv, num_heads=1, rope={}, positions=positions[::step])


def test_positions_in_a_plan_count_tokens_not_slots(executor):
    """Padding to the left or between: the first real token is at position 0."""
    plan = cuattn.padding_plan(np.array([[0, 1, 0, 1], [1, 1, 0, 0]]))
    qkv = np.broadcast_to(normal(1, 24), (4, 24)).copy()
    q, _, _ = cuattn.split_qkv(executor.array(qkv), num_heads=1, rope=Rotary(), plan=on(executor, plan))
    q = executor.numpy(q)[:, :, 0]
    np.testing.assert_array_equal(q[0, [1, 3]], q[1, [0, 1]])
    assert (q[0, 1] == qkv[0, :8]).all()


@pytest.mark.parametrize("num_tokens", [0, 4])
@pytest.mark.parametrize("slots", [0, 6])
def test_nothing_to_split(executor, num_tokens, slots):
    """No token, with and without padding to fill; and no slot at all."""
    num_tokens = min(num_tokens, slots)
    plan = on(executor, cuattn.padding_plan(np.arange(slots).reshape(1, slots) < num_tokens))
    results = cuattn.split_qkv(executor.array(normal(num_tokens, 12)), num_heads=1, rope=Rotary(), plan=plan)
    for result in results:
        assert result.shape == (1, slots, 1, 4)
        assert (executor.numpy(result)[0, num_tokens:] == 0).all()
    for result in cuattn.split_qkv(executor.xp.empty((0, 12), np.float32), num_heads=1):
        assert result.shape == (0, 1, 4)


def test_no_batch(executor):
    plan = on(executor, cuattn.padding_plan(np.zeros((0, 5), bool)))
    q, _, _ = cuattn.split_qkv(executor.xp.empty((0, 12), np.float32), num_heads=1, plan=plan)
    assert q.shape == (0, 5, 1, 4)


def test_strided_and_unaligned_inputs(executor):
    """A last axis that is not contiguous, of every argument: through copies."""
    qkv, bias = normal(5, 24), normal(24)
    results = cuattn.split_qkv(
        executor.array(np.asfortranarray(qkv)), executor.array(np.repeat(bias, 2))[::2], num_heads=1, num_kv_heads=1
    )
    assert_split_qkv_close([executor.numpy(x) for x in results], qkv, bias, num_heads=1)
    outs = [executor.guarded((5, 1, 8), np.float32, Layout(order=(2, 0, 1), pad=(1, 0, 1))) for _ in range(3)]
    cuattn.split_qkv(executor.array(qkv), num_heads=1, out=tuple(x.array for x in outs))
    for out in outs:
        out.check()
    assert_split_qkv_close([executor.numpy(x.array) for x in outs], qkv, num_heads=1)


def test_unaligned_elements():
    qkv, bias = normal(5, 24), normal(24)
    odd = [np.zeros(x.shape, np.dtype([("byte", np.uint8), ("number", np.float32)])) for x in (qkv, bias)]
    odd[0]["number"], odd[1]["number"] = qkv, bias
    results = cuattn.split_qkv(odd[0]["number"], odd[1]["number"], num_heads=1)
    assert_split_qkv_close(results, qkv, bias, num_heads=1)


@pytest.mark.parametrize("position", [-1, 8, 2**40, -(2**40)])
def test_a_position_that_only_the_kernel_sees(executor, position):
    """NaN in q and k of that token, never an access beside the tables (the mem checker is on)."""
    qkv, positions = normal(3, 24), np.array([1, position, 2])
    cos, sin = (executor.array(place(x)) for x in cuattn.rope_frequencies(8, 8))
    rotary = Rotary(cos=cos, sin=sin)
    parts = kernels.split_qkv(executor.array(qkv), num_heads=1, rope=rotary, positions=positions, look=False)
    q, k, v = (executor.numpy(x) for x in parts)
    for x in (q, k):
        assert np.isnan(x[1]).all() and np.isfinite(x[[0, 2]]).all()
    np.testing.assert_array_equal(v.reshape(3, 8), qkv[:, 16:])


@pytest.mark.parametrize("wrong", [6, 2**31 - 1, -1])
def test_a_plan_of_other_slots_writes_nothing_elsewhere(executor, wrong):
    """As a device might hold it, where nobody looks; what is right is still right."""
    plan = cuattn.padding_plan(np.array([[1, 1, 0], [1, 0, 0]]))
    for name, index in (("indices", 1), ("padding", 0)):
        changed = getattr(plan, name).copy()
        changed[index] = wrong
        outs = [executor.guarded((2, 3, 1, 4), np.float32) for _ in range(3)]
        broken = on(executor, replace(plan, **{name: changed}))
        cuattn.split_qkv(executor.array(normal(3, 12)), num_heads=1, plan=broken, out=tuple(x.array for x in outs))
        for out in outs:
            out.check()
            values = executor.numpy(out.array)
            assert np.isfinite(values[1]).all() and np.isnan(values).any()


# --- work ------------------------------------------------------------------------------------------------------------


def test_one_launch_one_read_one_write():
    """Counted bytes, in the plain case and with everything on."""
    qkv, bias = np.zeros((6, 8 * 64), np.float32), np.zeros(8 * 64, np.float32)
    with host.profile() as profile:
        cuattn.split_qkv(qkv, num_heads=4, num_kv_heads=2)
    assert profile.launches == 1
    assert profile.bytes["global"] == {"read": qkv.nbytes, "write": qkv.nbytes}
    plan = cuattn.padding_plan(np.array([[1, 1, 1, 0], [0, 1, 1, 1]]))
    with host.profile() as profile:
        outs = cuattn.split_qkv(qkv, bias, num_heads=4, num_kv_heads=2, rope=Rotary(), plan=plan)
    assert profile.launches == 1
    threads = 8 // 4 * (32 // 4)  # of a slot: two groups of heads, eight 16-byte units of pairs
    token = bias.nbytes + threads * (4 + 4 + 4 * 8)  # bias, index, cu_seqlens, turns of four pairs
    assert profile.bytes["global"]["read"] == qkv.nbytes + 6 * token + 2 * threads * 4
    assert profile.bytes["global"]["write"] == sum(x.nbytes for x in outs)


def test_fewer_ctas_than_work_take_turns(executor, monkeypatch):
    """As they would beyond 2^31 CTAs."""
    monkeypatch.setattr(importlib.import_module("cuattn.ops.rotary.split_launch"), "MAX_GRID", (2, 1, 1))
    plan = cuattn.padding_plan(np.random.default_rng(3).random((4, 40)) < 0.6)
    qkv, options = normal(plan.num_tokens, 96), {"num_heads": 4, "num_kv_heads": 2, "plan": plan}
    results = cuattn.split_qkv(executor.array(qkv), **options)
    assert_split_qkv_close([executor.numpy(x) for x in results], qkv, **options)


def test_same_bits_every_time(executor):
    qkv = executor.array(normal(40, 8 * 32, dtype=ml_dtypes.bfloat16))
    options = dict(num_heads=4, num_kv_heads=2, rope=Rotary(), cu_seqlens=[0, 17, 40])
    first = cuattn.split_qkv(qkv, **options)
    with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=1):
        for again, before in zip(cuattn.split_qkv(qkv, **options), first, strict=True):
            np.testing.assert_array_equal(executor.numpy(again), executor.numpy(before))


# --- what is refused -------------------------------------------------------------------------------------------------

PLAN = cuattn.padding_plan(np.array([[1, 1, 0], [1, 0, 0]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 0}, errors.ArgumentError, "num_heads is 0"),
        ({"num_heads": 2.0}, errors.ArgumentError, "num_heads is 2.0"),
        ({"num_heads": True}, errors.ArgumentError, "num_heads is True"),
        ({"num_kv_heads": -1}, errors.ArgumentError, "num_kv_heads is -1"),
        ({"num_heads": 3, "num_kv_heads": 2}, errors.ArgumentError, "num_heads is 3 and num_kv_heads 2; a multiple"),
        ({"num_heads": 5}, errors.ShapeError, r"rows of 48 elements; a multiple of .* = 15"),
        ({"rope": True}, errors.ArrayTypeError, "rope is a bool"),
        ({"rope": Rotary()}, errors.ArgumentError, "positions are not known"),
        ({"positions": [0, 1, 2]}, errors.ArgumentError, "positions is given without rope"),
        ({"cu_seqlens": [0, 3]}, errors.ArgumentError, "cu_seqlens is given without rope"),
        ({"rope": Rotary(), "cu_seqlens": [0, 3], "plan": PLAN}, errors.ArgumentError, "beside positions or plan"),
        ({"rope": Rotary(), "cu_seqlens": [0, 3], "positions": [1, 2, 3]}, errors.ArgumentError, "beside positions"),
        ({"rope": Rotary(), "positions": [0, 1]}, errors.ShapeError, r"positions has shape \(2,\); \(3,\) fit"),
        ({"rope": Rotary(), "cu_seqlens": [0, 2]}, errors.ArgumentError, "from 0 to 2; from 0 to 3"),
        ({"rope": Rotary(), "cu_seqlens": [1, 3]}, errors.ArgumentError, "from 1 to 3; from 0 to 3"),
        ({"rope": Rotary(), "cu_seqlens": [0, 2, 1, 3]}, errors.ArgumentError, "from 2 to 1 at index 2"),
        ({"rope": Rotary(), "cu_seqlens": [[0, 3]]}, errors.ShapeError, r"cu_seqlens has shape \(1, 2\)"),
        ({"rope": Rotary(), "cu_seqlens": []}, errors.ShapeError, r"cu_seqlens has shape \(0,\)"),
        ({"rope": Rotary(), "cu_seqlens": [0.0, 3.0]}, errors.DTypeError, "cu_seqlens has dtype float64"),
        ({"rope": Rotary(rotary_dim=10), "positions": [0] * 3}, errors.ArgumentError, "rotary_dim is 10"),
        ({"plan": "right"}, errors.ArrayTypeError, "plan is a str"),
        ({"plan": cuattn.padding_plan(np.ones((1, 2)) > 0)}, errors.ShapeError, "3 tokens and the plan 2"),
        ({"plan": replace(PLAN, padding=PLAN.padding[1:])}, errors.ShapeError, r"plan.padding is int32 of shape \(2,"),
        ({"plan": replace(PLAN, indices=PLAN.indices * 1.0)}, errors.DTypeError, "plan.indices has dtype float64"),
        (
            {"plan": replace(PLAN, cu_seqlens=PLAN.cu_seqlens.astype(np.int64))},
            errors.ShapeError,
            "cu_seqlens is int64",
        ),
        ({"out": np.zeros((3, 2, 8))}, errors.ArgumentError, "out is ndarray; a tuple of three"),
        ({"out": (np.zeros((3, 2, 8)),) * 2}, errors.ArgumentError, "out is tuple"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        cuattn.split_qkv(normal(3, 48), **{"num_heads": 2, **change})


@pytest.mark.parametrize(
    ("qkv", "bias", "error", "message"),
    [
        (normal(48), None, errors.ShapeError, r"qkv has shape \(48,\)"),
        (normal(3, 6, 8), None, errors.ShapeError, "qkv has shape"),
        (normal(3, 48, dtype=np.int32), None, errors.DTypeError, "qkv: dtype int32"),
        ([[0.0] * 48], None, errors.ArrayTypeError, "qkv"),
        (normal(3, 0), None, errors.ShapeError, "head dim 0"),
        (normal(3, 6 * 513), None, errors.ShapeError, "head dim 513"),
        (normal(3, 48), normal(47), errors.ShapeError, r"bias has shape \(47,\); \(48,\) is needed"),
        (normal(3, 48), normal(1, 48), errors.ShapeError, "bias has shape"),
        (normal(3, 48), normal(48, dtype=np.float64), errors.DTypeError, "bias has dtype float64 and qkv"),
    ],
)
def test_bad_arrays(qkv, bias, error, message):
    with pytest.raises(error, match=message):
        cuattn.split_qkv(qkv, bias, num_heads=2)


def test_extent_beyond_32_bits():
    with pytest.raises(errors.ShapeError, match=r"2147483648.*at most 2147483647"):
        cuattn.split_qkv(np.broadcast_to(np.zeros(1, np.float16), (2**31, 6)), num_heads=1)


def test_a_sequence_longer_than_the_tables():
    cos, sin = cuattn.rope_frequencies(8, 2)
    with pytest.raises(errors.ArgumentError, match="a sequence of 3 tokens; cos and sin hold 2 positions"):
        cuattn.split_qkv(normal(3, 48), num_heads=2, rope=Rotary(cos=cos, sin=sin), cu_seqlens=[0, 3])
    with pytest.raises(errors.ArgumentError, match=r"positions\[1\] is 2"):
        cuattn.split_qkv(normal(3, 48), num_heads=2, rope=Rotary(cos=cos, sin=sin), positions=[0, 2, 1])
    with pytest.raises(errors.ArgumentError, match="a sequence of 2 tokens; cos and sin hold 1"):
        short = Rotary(cos=cos[:1], sin=sin[:1])
        cuattn.split_qkv(normal(3, 48), num_heads=2, rope=short, plan=PLAN)


def test_bad_outs(executor):
    qkv = executor.array(normal(3, 48))

    def outs(**changes):
        arrays = {name: executor.xp.empty((3, 2, 8), np.float32) for name in "qkv"}
        return tuple({**arrays, **changes}.values())

    empty = executor.xp.empty
    with pytest.raises(errors.ShapeError, match=r"out\[1\] has shape \(3, 1, 8\); the result has shape \(3, 2, 8\)"):
        cuattn.split_qkv(qkv, num_heads=2, out=outs(k=empty((3, 1, 8), np.float32)))
    with pytest.raises(errors.DTypeError, match=r"out\[2\] has dtype float16"):
        cuattn.split_qkv(qkv, num_heads=2, out=outs(v=empty((3, 2, 8), np.float16)))
    with pytest.raises(errors.OverlapError, match=r"out\[0\] lies in the memory range of qkv"):
        cuattn.split_qkv(qkv, num_heads=2, out=outs(q=qkv.reshape(3, 6, 8)[:, :2]))
    same = empty((3, 2, 8), np.float32)
    with pytest.raises(errors.OverlapError, match=r"out\[\d\] and out\[\d\]"):
        cuattn.split_qkv(qkv, num_heads=2, out=outs(k=same, v=same))
    with pytest.raises(errors.ArrayTypeError, match=r"out\[1\]"):
        cuattn.split_qkv(qkv, num_heads=2, out=outs(k=[0.0]))
