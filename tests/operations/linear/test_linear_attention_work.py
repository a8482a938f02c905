"""How much linear attention does, counted by the host executor: it grows with the tokens, not with their square."""

from __future__ import annotations

import numpy as np
import pytest
from idle_executor import install
from linear_calls import DTYPES, F16, F32, decay_like, qkv
from resource_cases import sampled

import cuattn
from cuattn import compile as kernel_compiler
from cuattn import host
from cuattn.ops.linear.config import FmaRow, MmaRow, fma_rows, mma_rows

NO_SPILLS = [
    *(MmaRow("float16", dim, 64, 1, True, aligned=True, num_stages=1 + (dim <= 128)) for dim in (64, 128, 256)),
    MmaRow("bfloat16", 128, 64, 0, False, aligned=False, num_stages=1),
    *(FmaRow(dtype, dim, 2, True) for dtype, dim in (("float32", 128), ("float64", 256))),
]


def counted(dtype, seqlen, kind="token", **options):
    rng = np.random.default_rng(0)
    q, k, v = qkv(rng, dtype, seqlen, (2, 1, 1), (32, 32), batch=1)
    decay = decay_like(rng, k, v, kind)
    decay = None if decay is None else decay.astype(np.float32)
    with host.check(), host.profile() as profile:
        cuattn.linear_attention(q, k, v, decay=decay, **options)
    return profile


@pytest.mark.parametrize(("dtype", "kind"), [(F16, "token"), (F16, "channel"), (F32, "token")], ids=str)
def test_twice_the_tokens_are_twice_the_work(dtype, kind):
    half, whole = counted(dtype, 512, kind), counted(dtype, 1024, kind)
    assert half.launches == whole.launches == 1
    assert whole.warp_instructions / half.warp_instructions == pytest.approx(2, rel=0.05)
    for access in ("read", "write"):
        assert whole.bytes["global"][access] / half.bytes["global"][access] == pytest.approx(2, rel=0.05)


def test_each_array_is_read_once():
    """Of a slice of columns: q of each head, k, v and the decay."""
    profile = counted(F16, 640)
    assert profile.bytes["global"]["read"] == 640 * (2 * 64 + 64 + 64 + 4)
    assert profile.bytes["global"]["write"] == 640 * 2 * 64


def test_products_of_a_chunk():
    """Tensor-core instructions of 64 tokens of one state with two output heads, D = E = 32, without z."""
    profile = counted(F16, 640, normalize=False)
    depth, columns = 32 // 16, 32 // 8
    weights = sum(2 * (row + 1) for row in range(4))  # pairs of columns up to the diagonal
    of_head = depth * weights + 4 * depth * columns + weights // 2 * columns
    of_state = 4 * (32 // 16) * columns
    assert profile.instructions["mma"] == 10 * (2 * of_head + of_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_takes_no_tile(dtype):
    """Decoding: no product of tiles, and much less than a chunk of 64 takes."""
    one, chunk = counted(dtype, 1), counted(dtype, 64)
    assert not one.instructions["mma"]
    assert one.warp_instructions < chunk.warp_instructions * (0.35 if chunk.instructions["mma"] else 0.1)


def test_memory(monkeypatch):
    """Nothing but the results is allocated; without causal, the state besides."""
    for dtype, seqlen in ((F16, 2048), (F32, 2048)):
        q, k, v = (np.broadcast_to(np.zeros((), dtype), (1, seqlen, 2, 64)) for _ in range(3))
        q, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
        idle = install(monkeypatch)
        cuattn.linear_attention(q, k, v)
        assert [x.shape for x in idle.allocated] == [(1, seqlen, 2, 64)]
        idle = install(monkeypatch)
        cuattn.linear_attention(q, k, v, causal=False)
        assert sorted(x.size for x in idle.allocated) == [2 * 64, 2 * 64 * 64, seqlen * 2 * 64]
        idle = install(monkeypatch)
        state = cuattn.LinearState(np.zeros((1, 2, 64, 64), F32), np.zeros((1, 2, 64), F32))
        cuattn.linear_attention(q, k, v, out=np.empty_like(q), state_out=state)
        assert not idle.allocated


def check_resources(row, arch):
    binary = kernel_compiler.build(row.source, row.constants(), arch=arch, kind="cubin")
    for used in binary.resources.values():
        assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, (row, used)
    assert getattr(row, "num_stages", 1) > 1 or row.smem_bytes <= 99 * 1024


@pytest.mark.parametrize(
    ("row", "arch"), sampled([(row, arch) for row in NO_SPILLS for arch in ("sm_80", "sm_90a")], one_in=4), ids=str
)
def test_no_spills(row, arch):
    check_resources(row, arch)


@pytest.mark.resources
@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_no_row_spills(arch):
    for row in (*fma_rows(), *mma_rows()):
        check_resources(row, arch)
