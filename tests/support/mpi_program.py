"""What a rank does under mpiexec: `python mpi_program.py CASE`. Each rank that comes through prints a line of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np
from distributed_calls import METHODS, tensors

from cuattn import attention, attention_backward, decode_attention
from cuattn.distributed import MpiGroup, partition, ring_attention, shard, tree_decode_attention, unshard
from cuattn.errors import DistributedError, MismatchError, PeerError

TIMEOUT = 20.0


def say(group, **words):
    """Print in one write: lines of ranks do not mix."""
    os.write(1, (json.dumps({"rank": group.rank, **words}) + "\n").encode())


def together():
    """What ranks do that all come through: in one run, since starting processes takes the most time."""
    group = MpiGroup(timeout=TIMEOUT)
    results(group)
    mismatch(group)
    raises(group)


def results(group):
    """Every collective, and attention by both methods, against one device."""
    rank, size = group.rank, group.size
    received = group.send_recv(np.full(3, rank), (rank + 1) % size, np.empty(3, int), (rank - 1) % size)
    parts = [np.full(rank + 1, 10 * other + rank) for other in range(size)]
    own = [np.empty(other + 1, int) for other in range(size)]
    group.all_to_all(parts, own)
    half = group.split(rank % 2, -rank)
    found = {
        "received": received.tolist(),
        "exchanged": [x.tolist() for x in own],
        "gathered": group.all_gather(np.array([rank])).ravel().tolist(),
        "sum": group.all_reduce(np.array([rank, 1.0])).tolist(),
        "max": group.all_reduce(np.array([rank, -rank], np.int32), "max").tolist(),
        "half": [half.rank, half.size, half.all_reduce(np.array([rank])).tolist()],
    }
    q, k, v, dout, _ = tensors(seqlen_q=50)
    one, lse = attention(q, k, v, causal=True, return_lse=True)
    whole = [one, *attention_backward(dout, q, k, v, one, lse, causal=True)[:3]]
    bits = []
    for attend, differentiate in METHODS.values():
        mine = [shard(x, group) for x in (q, k, v, dout)]
        group.traffic.reset()
        out, lse = attend(*mine[:3], group, return_lse=True)
        found.setdefault("bytes", []).append(int(group.traffic.bytes))
        grads = differentiate(mine[3], *mine[:3], out, lse, group)
        errors = [np.abs(unshard(x, group) - y).max() for x, y in zip((out, *grads[:3]), whole, strict=True)]
        found.setdefault("errors", []).append(float(max(errors)))
        bits.append(out.tobytes() == attend(*mine[:3], group).tobytes())
    keys = slice(13 * rank, 13 * rank + 13)
    near = tree_decode_attention(q[:, -1:], k[:, keys], v[:, keys], [len(k[0, keys])] * 2, group)
    found["errors"].append(float(np.abs(near - decode_attention(q[:, -1:], k, v, [50, 50])).max()))
    say(group, what="results", **found, bits=bits, tokens=len(partition(50, size)[rank]))


def mismatch(group):
    """Found before anything moves; the group is good for more afterwards."""
    group.traffic.reset()
    arrays = [shard(x, group) for x in tensors(seqlen_q=16)[:3]]
    try:
        ring_attention(*arrays, group, softcap=2.0 if group.rank == 1 else None)
    except MismatchError as error:
        sent = int(group.traffic.bytes)
        say(group, what="mismatch", error=str(error), bytes=sent, shape=ring_attention(*arrays, group).shape)


def raises(group):
    """Rank 2 raises outside of a call, and says so; the others wait for it, and raise."""
    began = time.monotonic()
    try:
        with group.together():
            if group.rank == 2:
                raise ZeroDivisionError("of rank 2")
            group.all_reduce(np.zeros(1))
    except (PeerError, ZeroDivisionError) as error:
        name, seconds = type(error).__name__, time.monotonic() - began
        say(group, what="raises", error=name, text=str(error), seconds=seconds)
    time.sleep(0.5)  # who leaves first must not take the others' messages along
    os._exit(0)


def killed():
    """Rank 1 is killed in the middle; the others end with a typed error."""
    group = MpiGroup(timeout=1.5)
    arrays = [shard(x, group) for x in tensors(seqlen_q=16)[:3]]
    ring_attention(*arrays, group)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        for _ in range(1000):
            ring_attention(*arrays, group)
    except DistributedError as error:
        say(group, error=type(error).__name__, seconds=time.monotonic() - began)
    os._exit(0)


if __name__ == "__main__":
    {"together": together, "killed": killed}[sys.argv[1]]()
