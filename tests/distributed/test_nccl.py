"""`NcclGroup`, with a stand-in for CuPy and NCCL that is as late as streams allow."""

from __future__ import annotations

import numpy as np
import pytest
from distributed_calls import METHODS, on_ranks, tensors
from simulated_nccl import Wires, nccl, world

from cuattn.distributed import NcclGroup, shard, tree_decode_attention
from cuattn.errors import ArgumentError, GroupTimeoutError, MismatchError, PeerError


def on_nccl(size, function, **keywords):
    wires = Wires(size)

    def of_rank(threads):
        control = threads if keywords.get("control") else None
        return function(world(wires, threads.rank, **{**keywords, "control": control}))

    return on_ranks(size, of_rank)


def test_collectives():
    def of_rank(group):
        rank, size = group.rank, group.size
        received = group.send_recv(np.full(3, rank), (rank + 1) % size, np.empty(3, int), (rank - 1) % size)
        own = [np.empty(rank + 1, np.int16) for _ in range(size)]
        group.all_to_all([np.full(other + 1, 10 * rank + other, np.int16) for other in range(size)], own)
        assert received.tolist() == [(rank - 1) % size] * 3
        assert [x.tolist() for x in own] == [[10 * other + rank] * (rank + 1) for other in range(size)]
        assert group.all_gather(np.array([[rank]], np.float16)).tolist() == [[[i]] for i in range(size)]
        for dtype in (np.float32, np.float64, np.int32, np.int64):
            total = group.all_reduce(np.array([rank, 1], dtype))
            assert (total.tolist(), total.dtype) == ([3, 3], dtype)
            assert group.all_reduce(np.array([rank, -rank], dtype), "max").tolist() == [2, 0]
        group.barrier()
        group.synchronize()
        return dict(group.traffic.calls)

    assert on_nccl(3, of_rank)[0] == {"send_recv": 1, "all_to_all": 1, "all_gather": 1, "all_reduce": 8}


@pytest.mark.parametrize("control", [True, False])
def test_attention_is_that_of_threads(control):
    """The same bits: buffers are neither read too late nor written too early."""
    q, k, v, dout, _ = tensors(seqlen_q=30)

    def of_rank(group):
        found = []
        for attend, differentiate in METHODS.values():
            mine = [shard(x, group) for x in (q, k, v, dout)]
            out, lse = attend(*mine[:3], group, return_lse=True)
            grads = differentiate(mine[3], *mine[:3], out, lse, group)
            found += [out, lse, *grads[:3]]
        mine = slice(10 * group.rank, 10 * group.rank + 10)
        found.append(tree_decode_attention(q[:, -1:], k[:, mine], v[:, mine], [10, 10], group))
        with pytest.raises(MismatchError, match="scale"):
            attend(*[shard(x, group) for x in (q, k, v)], group, scale=1.0 + group.rank)
        return [x.tobytes() for x in found[:-1]], found[-1]

    on_streams = on_nccl(3, of_rank, control=control)
    on_threads = on_ranks(3, of_rank)
    for (bits, near), (others, other) in zip(on_streams, on_threads, strict=True):
        assert bits == others
        np.testing.assert_allclose(near, other, atol=1e-6)


def test_nothing_is_agreed_on_unless_asked_for():
    def of_rank(group):
        parts = [shard(x, group) for x in tensors(seqlen_q=16)[:3]]
        out = METHODS["ring"][0](*parts, group)
        return out.shape, group.traffic.control_bytes

    assert on_nccl(2, of_rank, checked=False) == [((2, 8, 4, 32), 0)] * 2


def test_failures():
    (group,) = on_nccl(1, lambda group: group, timeout=0.05)
    communicator = group._communicator

    class Never:
        done = False

    with pytest.raises(GroupTimeoutError, match="NCCL"):
        group._wait_for([Never()])
    assert communicator.aborted
    with pytest.raises(PeerError, match="has failed"):
        group.all_reduce(np.zeros(1))
    (group,) = on_nccl(1, lambda group: group)
    group._communicator.error = RuntimeError("unhandled system error")
    with pytest.raises(PeerError, match="unhandled system error"):
        group._wait_for([Never()])
    (group,) = on_nccl(1, lambda group: group)
    group._communicator.send = lambda *_: 1 / 0
    with pytest.raises(PeerError, match="division"):
        group.send_recv(np.zeros(1), 0, np.zeros(1), 0)


def test_a_control_group_of_other_ranks():
    def of_rank(threads):
        with pytest.raises(ArgumentError, match="control"):
            world(Wires(3), threads.rank, control=threads)
        with pytest.raises(ArgumentError, match="NcclCommunicator"):
            NcclGroup(nccl)
        return True

    assert on_ranks(2, of_rank) == [True, True]
