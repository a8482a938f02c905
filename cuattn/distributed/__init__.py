"""Attention over several GPUs: sequences and heads divided among ranks, by MPI, by NCCL, or among threads."""

from cuattn.distributed.group import Group, Transfer
from cuattn.distributed.head_parallel import head_parallel, head_parallel_backward, heads_of_rank
from cuattn.distributed.linear import linear_attention, linear_attention_backward
from cuattn.distributed.mpi import MpiGroup
from cuattn.distributed.nccl import NcclGroup
from cuattn.distributed.nested import Usp, usp
from cuattn.distributed.partitions import partition, rope_positions, shard, unshard
from cuattn.distributed.ring import ring_attention
from cuattn.distributed.ring_gradients import ring_attention_backward
from cuattn.distributed.threads import ThreadGroup
from cuattn.distributed.traffic import Event, Traffic
from cuattn.distributed.tree import tree_decode_attention
from cuattn.distributed.ulysses import ulysses_attention, ulysses_attention_backward

__all__ = [
    "Event",
    "Group",
    "MpiGroup",
    "NcclGroup",
    "ThreadGroup",
    "Traffic",
    "Transfer",
    "Usp",
    "head_parallel",
    "head_parallel_backward",
    "heads_of_rank",
    "linear_attention",
    "linear_attention_backward",
    "partition",
    "ring_attention",
    "ring_attention_backward",
    "rope_positions",
    "shard",
    "tree_decode_attention",
    "ulysses_attention",
    "ulysses_attention_backward",
    "unshard",
    "usp",
]
