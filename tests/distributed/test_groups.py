"""Groups of threads: what collectives return and count, and how the failure of one rank becomes that of all."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from distributed_calls import on_ranks

from cuattn.distributed import MpiGroup, NcclGroup, ThreadGroup
from cuattn.distributed.agreement import agree, agree_checked
from cuattn.errors import (
    ArgumentError,
    ArrayTypeError,
    DistributedError,
    DTypeError,
    GroupTimeoutError,
    MismatchError,
    PeerError,
)


def test_collectives(executor):
    xp = executor.xp

    def of_rank(group):
        rank, size = group.rank, group.size
        ahead, behind = (rank + 1) % size, (rank - 1) % size
        received = group.send_recv(xp.full(3, rank, np.int16), ahead, xp.empty(3, np.int16), behind)
        assert executor.numpy(received).tolist() == [behind] * 3
        send = [xp.full(other + 1, 10 * rank + other, np.float32) for other in range(size)]
        receive = [xp.empty(rank + 1, np.float32) for _ in range(size)]
        group.all_to_all(send, receive)
        assert [executor.numpy(x).tolist() for x in receive] == [[10 * i + rank] * (rank + 1) for i in range(size)]
        gathered = group.all_gather(xp.full((2, 1), rank, np.float64))
        assert executor.numpy(gathered).tolist() == [[[i], [i]] for i in range(size)]
        assert executor.numpy(group.all_reduce(xp.arange(4.0) * rank)).tolist() == [0.0, 3.0, 6.0, 9.0]
        assert executor.numpy(group.all_reduce(xp.array([rank, -rank], np.int32), "max")).tolist() == [2, 0]
        group.barrier()
        return dict(group.traffic.calls), [group.traffic[name] for name in group.traffic.calls], group.traffic.bytes

    for rank, (calls, counted, total) in enumerate(on_ranks(3, of_rank)):
        assert calls == {"send_recv": 1, "all_to_all": 1, "all_gather": 1, "all_reduce": 2}
        to_others = 4 * sum(other + 1 for other in range(3) if other != rank)
        assert counted == [6, to_others, 2 * 16, Fraction(2 * 2 * (32 + 8), 3)]
        assert total == sum(counted)


def test_bytes_of_any_dtype():
    """Numbers of 16 and 8 bits travel as they are, NaN with its payload."""
    x = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)

    def of_rank(group):
        gathered = group.all_gather(x)
        return gathered.dtype == x.dtype and (gathered.view(np.uint8) == x.view(np.uint8)).all()

    assert all(on_ranks(2, of_rank))


def test_what_was_sent_may_change_afterwards():
    def of_rank(group):
        x, y = np.full(4, group.rank), np.empty(4, int)
        transfer = group.start_send_recv(x, 1 - group.rank, y, 1 - group.rank)
        group.barrier()
        transfer.wait()
        x[:] = -1
        transfer.wait()  # nothing more happens
        return y.tolist()

    assert on_ranks(2, of_rank) == [[1] * 4, [0] * 4]


def test_one_way():
    def of_rank(group):
        if group.rank:
            return group.send_recv(None, None, np.empty(2), 0).tolist()
        return group.send_recv(np.array([1.0, 2.0]), 1, None, None)

    assert on_ranks(2, of_rank) == [None, [1.0, 2.0]]


def test_messages_arrive_in_the_order_of_their_starts():
    """Whatever the order in which they are waited for."""

    def of_rank(group):
        other, received = 1 - group.rank, [np.empty(1, int) for _ in range(3)]
        transfers = [group.start_send_recv(np.array([i]), other, received[i], other) for i in range(3)]
        for transfer in (transfers[2], transfers[0], transfers[1]):
            transfer.wait()
        return [int(x[0]) for x in received]

    assert on_ranks(2, of_rank) == [[0, 1, 2]] * 2


def test_sums_have_the_same_bits_on_every_rank_and_every_time():
    values = np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)

    def of_rank(group):
        return group.all_reduce(values[group.rank]).tobytes()

    assert len({*on_ranks(4, of_rank), *on_ranks(4, of_rank)}) == 1


def test_split():
    def of_rank(group):
        part = group.split(group.rank % 2, -group.rank)
        return part.rank, part.size, part.all_reduce(np.array([group.rank])).tolist()

    assert on_ranks(5, of_rank) == [(2, 3, [6]), (1, 2, [4]), (1, 3, [6]), (0, 2, [4]), (0, 3, [6])]


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_makes_all_raise():
    seen = {}

    def of_rank(group):
        if group.rank == 2:
            raise ZeroDivisionError("of rank 2")
        try:
            group.all_reduce(np.zeros(1))
        except PeerError as error:
            seen[group.rank] = error
            raise

    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="of rank 2"):
        on_ranks(4, of_rank)
    assert time.monotonic() - began < 10
    assert sorted(seen) == [0, 1, 3]
    assert {error.rank for error in seen.values()} == {2}
    assert all("ZeroDivisionError: of rank 2" in str(error) for error in seen.values())


def test_a_rank_that_does_not_come():
    def of_rank(group):
        if group.rank == 0:
            return None
        with pytest.raises((GroupTimeoutError, PeerError)) as caught:  # who is late first tells the other
            group.all_gather(np.zeros(1))
        with pytest.raises(PeerError, match="the group has failed"):
            group.barrier()
        return type(caught.value)

    began = time.monotonic()
    found = on_ranks(3, of_rank, timeout=0.2)
    assert GroupTimeoutError in found
    assert 0.2 <= time.monotonic() - began < 10
    assert issubclass(GroupTimeoutError, TimeoutError)


def test_a_failure_reaches_ranks_that_wait_in_a_part_of_the_group():
    def of_rank(group):
        part = group.split(group.rank // 2)
        if group.rank == 0:
            raise KeyError("gone")
        with pytest.raises(PeerError):
            (part if group.rank == 1 else group).barrier()

    with pytest.raises(KeyError, match="gone"):
        on_ranks(4, of_rank)


def test_ranks_in_different_calls():
    def of_rank(group):
        with pytest.raises(MismatchError, match="different calls"):
            group.all_reduce(np.zeros(1)) if group.rank else group.all_gather(np.zeros(1))
        return True

    assert on_ranks(2, of_rank) == [True, True]


def test_sizes_that_do_not_fit():
    def of_rank(group):
        with pytest.raises(MismatchError, match="bytes"):
            group.send_recv(np.zeros(2), 1 - group.rank, np.zeros(3), 1 - group.rank)
        return True

    assert on_ranks(2, of_rank) == [True, True]


def test_agreement_names_what_differs():
    def of_rank(group):
        assert agree(group, "call", {"a": 1, "x": np.ones(3)}, group.rank) == [0, 1]
        with pytest.raises(MismatchError, match=r"call: ranks differ in x"):
            agree(group, "call", {"a": 1, "x": np.full(3, group.rank)})
        with pytest.raises(MismatchError, match=r"ranks differ in call"):
            agree(group, f"call{group.rank}", {})
        assert group.traffic.bytes == 0
        assert group.traffic.control_bytes > 0
        return agree(group, "again", {})

    assert on_ranks(2, of_rank) == [[None, None]] * 2


def test_arguments_that_one_rank_refuses():
    def check(group):
        if group.rank == 1:
            raise ArgumentError("not this")

    def of_rank(group):
        with pytest.raises(ArgumentError if group.rank == 1 else PeerError, match="not this"):
            agree_checked(group, "call", lambda: check(group), lambda _: ({}, None))
        group.barrier()  # nothing was sent: the group is good for more
        return True

    assert on_ranks(3, of_rank) == [True] * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda group: group.send_recv(np.zeros(1), 1, np.zeros(1), 0),
        lambda group: group.send_recv(np.zeros(1), -1, np.zeros(1), 0),
        lambda group: group.send_recv([1], 0, np.zeros(1), 0),
        lambda group: group.all_to_all([], []),
        lambda group: group.all_gather(np.zeros((4, 4)).T[:2]),
        lambda group: group.all_reduce(np.zeros(1, np.float16)),
        lambda group: group.all_reduce(np.zeros(1), "mean"),
        lambda group: ThreadGroup.create(0),
        lambda group: ThreadGroup.create(1, timeout=0),
        lambda group: MpiGroup("world"),
        lambda group: NcclGroup(None),
    ],
)
def test_refusals(call):
    (group,) = ThreadGroup.create(1)
    with pytest.raises((ArgumentError, ArrayTypeError, DistributedError, DTypeError)):
        call(group)


def test_groups_for_threads_of_ones_own():
    groups, results = ThreadGroup.create(2), [None, None]

    def work(group):
        results[group.rank] = group.all_reduce(np.array([1.0])).tolist()

    threads = [threading.Thread(target=work, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[2.0], [2.0]]
