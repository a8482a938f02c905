"""What is computed and allocated for the gradient of a bias, and in how many parts."""

from __future__ import annotations

from dataclasses import replace

import idle_executor
import numpy as np
import pytest
from backward_calls import after_forward, assert_right, call_backward, same_bits
from backward_formats import DIM, F16, F32
from test_attention_backward import normal
from test_attention_backward_bias import FEW_SHAPES, with_bias
from visible_keys import visible

import cuattn
from cuattn import host
from cuattn.ops.attention.backward import bias_launch
from cuattn.runtime.executor import HostExecutor, executor_for
from cuattn.testing.options import broadcast_shapes, make_bias


@pytest.fixture(params=[1, 5])
def few_ctas(request, monkeypatch):
    """As on a large problem: a CTA sums several tiles of the gradient of a bias."""
    monkeypatch.setattr(bias_launch, "ENOUGH_CTAS", request.param)
    bias_launch._cut.cache_clear()
    yield
    bias_launch._cut.cache_clear()


@pytest.mark.parametrize("bias_shape", [(1, 1, 100, 150), (4, 1, 150), (2, 1, 100, 1), (4, 1, 1), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_sums_of_several_tiles(executor, few_ctas, dtype, bias_shape):
    rng = np.random.default_rng(8)
    bias = make_bias(rng, bias_shape, F32, "normal")
    arrays = normal(dtype, 2, (100, 150), (4, 2), DIM)
    saved = after_forward(executor, *arrays, bias=bias, window=(40, 30), dlse=True)
    assert_right(executor, saved, return_dbias=True)


def test_a_dbias_of_one_number_from_many_tiles(executor):
    """More terms than one CTA takes."""
    bias = np.float32([0.25])
    saved = after_forward(executor, *normal(F16, 2, (260, 300), (2, 1), DIM), bias=bias, causal=True, dlse=True)
    assert_right(executor, saved, return_dbias=True)


@pytest.fixture
def parts(monkeypatch):
    """Sets how many CTAs are enough. Problems of tests are so small that, as it is, most parts have one term."""

    def enough(num_ctas):
        monkeypatch.setattr(bias_launch, "ENOUGH_CTAS", num_ctas)
        bias_launch._cut.cache_clear()

    yield enough
    monkeypatch.undo()
    bias_launch._cut.cache_clear()


@pytest.mark.parametrize("num_ctas", (1, 7))
def test_one_part_or_many(executor, parts, num_ctas):
    """The cuts change the order of the sums, and with it a last bit; never what is summed."""
    parts(num_ctas)
    for shape in FEW_SHAPES[1:]:
        assert_right(executor, with_bias(executor, F16, shape), return_dbias=True)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_tiles_that_are_kept_for_the_next_term(executor, parts, dtype):
    """One tile in each direction, eight heads in all: their terms differ in the query head, in the key head of every
    other one, and in the batch entry, one at a time."""
    parts(1)
    for shape in ((37, 50), (2, 1, 37, 50), (4, 1, 50), (1, 4, 37, 1)):
        saved = with_bias(executor, dtype, shape, full=(2, 4, 37, 50))
        expected = assert_right(executor, saved, return_dbias=True)
        with executor.active(asynchrony="random", seed=5):
            assert same_bits(call_backward(executor, saved, return_dbias=True), expected)


def counted(saved, **options):
    """A profile of the kernel of the bias alone."""
    profile = host.Profile()
    start = HostExecutor._start

    def only_bias(self, kernel, *launch):
        if not kernel.entry.startswith("cuattn_attention_backward_bias") or kernel.entry.endswith("sum"):
            return start(self, kernel, *launch)
        with host.profile() as one:
            start(self, kernel, *launch)
        for name in ("instructions", "opcodes"):
            getattr(profile, name).update(getattr(one, name))
        profile.bytes["global"]["write"] += one.bytes["global"]["write"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostExecutor, "_start", only_bias)
        cuattn.attention_backward(*saved.arrays, **saved.options, **options, return_dbias=True)
    return profile


@pytest.mark.parametrize("shape", [(300, 400), (300, 1), (2, 1, 400), (2, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (None, None)), (False, (40, 9))],
    ids=["all", "causal", "window"],
)
def test_only_visible_tiles_are_computed(executor, shape, causal, window):
    """The products of exactly the tiles in which some query of the warp sees some key, whatever is summed."""
    if executor.name != "host":
        pytest.skip("instructions are counted by the host executor")
    batch, heads, seqlen_q, seqlen_k = 1, 2, 300, 400
    q, k = np.ones((batch, seqlen_q, heads, 32), F16), np.ones((batch, seqlen_k, heads, 32), F16)
    options = {"causal": causal} if window == (None, None) else {"window": window}
    bias = np.zeros(shape, F32)
    lse = np.zeros((batch, heads, seqlen_q), F32)
    saved = replace(after_forward(executor, q[:, :1], k[:, :1], k[:, :1]), q=q, k=k, v=k, dout=q, out=q, lse=lse,
                    options={"bias": bias, **options})  # fmt: skip
    profile = counted(saved)
    tiles = 0
    for first in range(0, seqlen_q, 16):
        last = min(first + 16, seqlen_q) - 1
        begin = visible(first, seqlen_q, seqlen_k, causal, window)[0] // 64
        tiles += max(0, -(-visible(last, seqlen_q, seqlen_k, causal, window)[1] // 64) - begin)
    mma_per_tile = 2 * 8 * 2  # two products, 64 keys in columns of 8, 32 head dims in steps of 16
    assert profile.instructions["mma"] == batch * heads * tiles * mma_per_tile


@pytest.mark.filterwarnings("ignore::cuattn.errors.SlowHostCallWarning")
@pytest.mark.parametrize("packed", (False, True), ids=["dense", "packed"])
@pytest.mark.parametrize("seqlen", (4096, 65_536))
def test_nothing_of_queries_times_keys_is_allocated(monkeypatch, packed, seqlen):
    """Without a launch: what is allocated for a broadcast bias is less than one byte for each query and key."""
    allocated = idle_executor.install(monkeypatch).allocated
    batch, heads = 1, 2
    q = np.broadcast_to(F16.type(0), (seqlen, heads, 8) if packed else (batch, seqlen, heads, 8))
    lse = np.zeros((heads, seqlen) if packed else (batch, heads, seqlen), F32)
    starts = ([0, seqlen],) * 2 if packed else ()
    function = cuattn.attention_varlen_backward if packed else cuattn.attention_backward
    for shape in ((1, seqlen), (heads, seqlen, 1), (batch, heads, 1, 1), (batch, 1, 1, seqlen), ()):
        allocated.clear()
        bias = np.zeros(shape, F32)
        grads = function(q, q, q, q, q, lse, *starts, bias=bias, return_dbias=True)
        assert grads.dbias.shape == shape
        of_operands = 4 * lse.nbytes + 4 * q.nbytes
        size = sum(array.nbytes for array in allocated)
        assert size <= of_operands + 3 * 2**20 + 4 * bias.nbytes, shape
        assert size < heads * seqlen**2 / 2


def test_workspace_of_long_sequences():
    """A bias of queries and keys has a gradient of its own size, and from 1024 x 1024 on no workspace beside it."""

    def partial(seqlen, shape):
        q = np.broadcast_to(F16.type(0), (3, seqlen, 4, 64))
        bias = np.broadcast_to(np.float32(0), shape)
        with_it = cuattn.attention_backward_workspace_size(q, q, q, bias=bias, return_dbias=True)
        return with_it - cuattn.attention_backward_workspace_size(q, q, q, bias=bias)

    executor_for(q=np.zeros(1))
    assert partial(64, (64, 64)) == 12 * 64 * 64 * 4  # one tile: each head of each batch entry is a part
    assert partial(1024, (1024, 1024)) == partial(4096, (4, 4096, 4096)) == 0
    for seqlen in (1, 64, 100, 500, 5000, 100_000):
        for shape in broadcast_shapes((3, 4, seqlen, seqlen)):
            assert partial(seqlen, shape) <= 4 * 2**20
