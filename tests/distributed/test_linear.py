"""Linear attention over ranks: states are all that moves."""

from __future__ import annotations

import numpy as np
import pytest
from distributed_calls import on_ranks

import cuattn
from cuattn.distributed import linear_attention, linear_attention_backward
from cuattn.errors import ArgumentError, MismatchError
from cuattn.testing.linear_gradients import assert_linear_gradients_close
from cuattn.testing.linear_tolerance import assert_linear_close

CUTS = (0, 17, 17, 60)  # one rank has no tokens


def problem(seed=0, decay=None, *, state=False, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((2, CUTS[-1], heads, 32)).astype(dtype) for heads in (4, 2, 2, 4))
    shape = {None: None, "head": (2,), "token": (2, CUTS[-1], 2), "channel": (2, CUTS[-1], 2, 32)}[decay]
    decays = None if shape is None else -np.exp(rng.standard_normal(shape) - 2).astype(dtype)
    if decay == "token":
        decays[0, 30, 1] = -np.inf
    initial = None
    if state:
        initial = cuattn.LinearState(rng.standard_normal((2, 2, 32, 32)).astype(dtype),
                                     np.abs(rng.standard_normal((2, 2, 32))).astype(dtype))  # fmt: skip
    return q, k, v, dout, decays, initial


def on_parts(executor, q, k, v, dout, decay, initial, *, causal=True, dstate=None, **options):
    """Results of all ranks, put together."""
    states = [x and cuattn.LinearState(*(executor.array(part) for part in x)) for x in (initial, dstate)]

    def of_rank(group):
        mine = slice(CUTS[group.rank], CUTS[group.rank + 1])
        parts = [executor.array(x[:, mine]) for x in (q, k, v)]
        of = decay if decay is None or decay.ndim == 1 else decay[:, mine]
        given = {**options, "causal": causal, "initial_state": states[0]}
        given["decay"] = None if of is None else executor.array(of)
        out, state = linear_attention(*parts, group, return_state=True, **given)
        sent = group.traffic.bytes
        grads = linear_attention_backward(executor.array(dout[:, mine]), *parts, group, dstate=states[1], **given)
        found = [out, *grads[:4], *state, *(grads.dinitial_state or (None, None))]
        return [None if x is None else executor.numpy(x) for x in found], sent

    results = on_ranks(len(CUTS) - 1, of_rank)
    parts = [found for found, _ in results]
    for part in parts[1:]:  # states are the same everywhere
        for one, other in zip(part[5:], parts[0][5:], strict=True):
            assert one is None or one.tobytes() == other.tobytes()
    joined = [np.concatenate([part[i] for part in parts], axis=1) for i in range(4)]
    ddecay = parts[0][4]
    if ddecay is not None and ddecay.ndim > 1:
        ddecay = np.concatenate([part[4] for part in parts], axis=1)
    s, z, ds, dz = parts[0][5:]
    dinitial = None if ds is None else cuattn.LinearState(ds, dz)
    grads = cuattn.LinearGrads(*joined[1:], ddecay, None, dinitial)
    return joined[0], cuattn.LinearState(s, z), grads, results[0][1]


@pytest.mark.parametrize("decay", [None, "head", "token", "channel"])
def test_causal(executor, decay):
    q, k, v, dout, decays, initial = problem(decay=decay, state=decay is not None)
    dstate = None if decay != "head" else problem(1, state=True)[-1]
    out, state, grads, sent = on_parts(executor, q, k, v, dout, decays, initial, dstate=dstate)
    options = {"decay": decays, "initial_state": initial}
    assert_linear_close(out, state, q, k, v, factor=2, **options)
    assert_linear_gradients_close(grads, dout, q, k, v, dstate=dstate, **options)
    total = 32 if decay == "channel" else 1
    assert sent == 2 * 2 * 2 * (total + 32 * 32 + 32) * 4  # R - 1 ranks, 2 x 2 states


@pytest.mark.parametrize("normalize", [True, False])
def test_not_causal(executor, normalize):
    q, k, v, dout, _, initial = problem(state=True)
    options = {"causal": False, "normalize": normalize, "initial_state": initial}
    out, state, grads, _ = on_parts(executor, q, k, v, dout, None, initial, causal=False, normalize=normalize)
    assert_linear_close(out, state, q, k, v, factor=2, **options)
    assert_linear_gradients_close(grads, dout, q, k, v, **options)


def test_the_same_bits_every_time(executor):
    arrays = problem(decay="head")
    first, second = (on_parts(executor, *arrays) for _ in range(2))
    for one, other in zip((first[0], *first[2][:4]), (second[0], *second[2][:4]), strict=True):
        assert one.tobytes() == other.tobytes()


def test_refusals():
    q, k, v, *_ = problem()

    def of_rank(group):
        with pytest.raises(MismatchError, match="normalize"):
            linear_attention(q, k, v, group, normalize=group.rank == 0)
        with pytest.raises(ArgumentError, match="decay"):
            linear_attention(q, k, v, group, causal=False, decay=[-1.0, -1.0])
        return group.traffic.bytes

    assert on_ranks(2, of_rank) == [0, 0]
