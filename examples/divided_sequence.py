"""Attention over a sequence that does not fit on one device: each rank holds a part, forward and backward.

Without MPI, ranks are threads of one process:

    python examples/divided_sequence.py --ranks 4

With MPI they are processes, on as many machines as the launcher knows, with NumPy arrays on the host executor:

    mpiexec -n 4 python examples/divided_sequence.py

and with a GPU for each rank, NCCL between them:

    mpiexec -n 8 python examples/divided_sequence.py --cuda --tokens 1048576 --heads 32 --dim 128 --dtype float16
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

import cuattn
from cuattn.distributed import (
    Group,
    MpiGroup,
    NcclGroup,
    ThreadGroup,
    ring_attention,
    ring_attention_backward,
    rope_positions,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="threads, without mpiexec")
    parser.add_argument("--cuda", action="store_true", help="a GPU for each rank")
    parser.add_argument("--tokens", type=int, default=256, help="of the whole sequence (256)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="float16, float32 or float64")
    options = parser.parse_args()
    if options.ranks is not None:
        lines = ThreadGroup.run(options.ranks, of_rank, np, options)
        print("\n".join(lines))
        return
    if options.cuda:
        group, xp = nccl_group()
    else:
        group, xp = MpiGroup(), np
    print(of_rank(group, xp, options), flush=True)


def nccl_group() -> tuple[Group, Any]:
    """Return the group of a rank that mpiexec has started, one GPU each: MPI tells NCCL who is there."""
    cupy, mpi = importlib.import_module("cupy"), importlib.import_module("mpi4py.MPI")
    nccl = importlib.import_module("cupy.cuda.nccl")
    world = mpi.COMM_WORLD
    of_node = world.Split_type(mpi.COMM_TYPE_SHARED)
    cupy.cuda.Device(of_node.rank % cupy.cuda.runtime.getDeviceCount()).use()
    name = world.bcast(nccl.get_unique_id() if world.rank == 0 else None)
    communicator = nccl.NcclCommunicator(world.size, name, world.rank)
    return NcclGroup(communicator, control=MpiGroup(world)), cupy


def of_rank(group: Group, xp: Any, options: argparse.Namespace) -> str:
    """Make this rank's tokens, attend, and take gradients; returns what it held and sent."""
    positions = rope_positions(options.tokens, group)  # of this rank's tokens in the sequence
    rng = np.random.default_rng(group.rank)
    q, k, v = (
        xp.asarray(rng.standard_normal((1, len(positions), heads, options.dim)).astype(options.dtype))
        for heads in (options.heads, options.kv_heads, options.kv_heads)
    )
    places = xp.asarray(positions[None].astype(np.int32))
    q, k = cuattn.rope(q, places), cuattn.rope(k, places)
    out, lse = ring_attention(q, k, v, group, return_lse=True)
    sent = group.traffic.bytes
    grads = ring_attention_backward(xp.ones_like(out), q, k, v, out, lse, group)
    return (
        f"rank {group.rank} of {group.size}: {len(positions)} tokens, {float(sent) / 1e6:.3f} MB sent forward, "
        f"{float(group.traffic.bytes - sent) / 1e6:.3f} MB backward, |dv| {float(abs(grads.dv).mean()):.3f}"
    )


if __name__ == "__main__":
    main()
