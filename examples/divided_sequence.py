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
    parser.add_argument("--ranks", type=positive, help="threads, without mpiexec")
    parser.add_argument("--cuda", action="store_true", help="a GPU for each rank of mpiexec")
    parser.add_argument("--tokens", type=positive, default=256, help="of the whole sequence (256)")
    parser.add_argument("--heads", type=positive, default=4, help="of queries (4)")
    parser.add_argument("--kv-heads", type=positive, default=2, help="of keys and values (2)")
    parser.add_argument("--dim", type=positive, default=32, help="of a head, even (32)")
    parser.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32")
    options = parser.parse_args()
    if options.heads % options.kv_heads:
        parser.error(f"{options.heads} query heads are no multiple of {options.kv_heads} key/value heads")
    if options.dim % 2:
        parser.error(f"a head dim of {options.dim} has no halves to rotate")
    if options.cuda and options.ranks is not None:
        parser.error("--cuda is for the ranks of mpiexec, --ranks for threads")
    if options.cuda and not importlib.import_module("cupy").cuda.is_available():
        parser.error("no GPU answers, or no driver")
    if options.ranks is not None:
        lines = ThreadGroup.run(options.ranks, of_rank, np, options)
        print("\n".join(lines))
        return
    if options.cuda:
        group, xp = nccl_group()
    else:
        group, xp = MpiGroup(), np
    print(of_rank(group, xp, options), flush=True)


def positive(text: str) -> int:
    """Return a number from 1 on; argparse makes a message of the error."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return number


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
    size = float(abs(grads.dv).mean()) if grads.dv.size else 0.0  # with few tokens a rank may have none
    return (
        f"rank {group.rank} of {group.size}: {len(positions)} tokens, {float(sent) / 1e6:.3f} MB sent forward, "
        f"{float(group.traffic.bytes - sent) / 1e6:.3f} MB backward, |dv| {size:.3f}"
    )


if __name__ == "__main__":
    main()
