"""Attention over ranks: what each sends, beside the formula, and how evenly work is divided. Counts, not times.

Ranks are threads on the host executor, also where there is a GPU: bytes and instructions are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from cuattn import distributed, host, reference
from cuattn.benchmark.option_costs import HOST_METHOD
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step
from cuattn.benchmark.verify import WrongResultError
from cuattn.runtime.timer import significant
from cuattn.testing.attention_cases import normal

__all__ = ["DistributedCase", "cases", "distributed_steps"]

_MOST = 2.0**-7  # of the largest number, that a result may be wrong: several times what 16 bits lose

Method = Literal["ring", "ulysses", "tree"]


@dataclass(frozen=True, slots=True)
class DistributedCase:
    """A causal call of one batch entry on some ranks; of a tree, one query over as many keys."""

    method: Method
    partition: str = "zigzag"
    ranks: int = 4
    seqlen: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float16"

    @property
    def name(self) -> str:
        where = "" if self.method == "tree" else f"_{self.partition}"
        return f"{self.method}{where}_r{self.ranks}_n{self.seqlen}_h{self.heads}_g{self.kv_heads}_d{self.head_dim}"

    @property
    def flops(self) -> int:
        """Count the products that all ranks make together."""
        pairs = self.seqlen if self.method == "tree" else self.seqlen * (self.seqlen + 1) // 2
        return 4 * self.heads * pairs * self.head_dim

    @property
    def num_bytes(self) -> float:
        """Return what a rank sends, by the formula of its method."""
        size, tokens = np.dtype(self.dtype).itemsize, self.seqlen // self.ranks
        if self.method == "ring":
            return (self.ranks - 1) * tokens * self.kv_heads * 2 * self.head_dim * size
        if self.method == "tree":
            return 2 * (self.ranks - 1) * self.heads * (self.head_dim + 2) * 4 / self.ranks
        of_token = 2 * (self.heads + self.kv_heads) * self.head_dim
        return (self.ranks - 1) * tokens * of_token * size / self.ranks

    def make(self, seed: int) -> list[Any]:
        """Draw q, k and v."""
        rng, heads = np.random.default_rng(seed), (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (normal(rng, (1, self.seqlen, h, self.head_dim), self.dtype) for h in heads)
        return [q[:, -1:] if self.method == "tree" else q, k, v]

    def of_rank(self, group: distributed.Group, arrays: list[Any]) -> tuple[Any, float, int, int]:
        """Return the whole result, the bytes that the rank sent, its instructions, and those on tensor cores."""
        q, k, v = arrays
        if self.method == "tree":
            mine = slice(group.rank * self.seqlen // group.size, (group.rank + 1) * self.seqlen // group.size)
            arguments = q, k[:, mine], v[:, mine], [mine.stop - mine.start], group
            with host.profile() as profile:
                out = distributed.tree_decode_attention(*arguments)
            return out, float(group.traffic.bytes), profile.warp_instructions, profile.instructions["mma"]
        where: Any = {"partition": self.partition}
        attend: Any = distributed.ring_attention if self.method == "ring" else distributed.ulysses_attention
        parts = [distributed.shard(x, group, **where) for x in arrays]
        with host.profile() as profile:
            out = attend(*parts, group, **where)
        sent = float(group.traffic.bytes)
        whole = distributed.unshard(out, group, **where)
        return whole, sent, profile.warp_instructions, profile.instructions["mma"]


def cases() -> list[DistributedCase]:
    """Return rings with every partition, Ulysses, and decoding over ranks."""
    rings = [DistributedCase("ring", kind) for kind in ("zigzag", "striped", "contiguous")]
    return [*rings, DistributedCase("ulysses", kv_heads=4), DistributedCase("tree")]


def distributed_steps(options: Options) -> list[Step]:
    """One step for each case."""
    return [Step("distributed", case.name, 3.0, partial(records, options, case)) for case in cases()]


def records(options: Options, case: DistributedCase) -> Iterator[Record]:
    """Count what ranks send and do, after a check of the result."""
    arrays = case.make(options.seed)
    results = distributed.ThreadGroup.run(case.ranks, case.of_rank, arrays)
    outs, sent, counts, products = zip(*results, strict=True)
    wanted = reference.attention(*arrays, causal=True)[0]
    error = float(np.abs(outs[0].astype(np.float64) - wanted).max() / np.abs(wanted).max())
    if not error <= _MOST:
        raise WrongResultError(f"{case.name}: wrong by {error:.2g} of the largest number")
    balance = sum(products) / len(products) / max(products)  # merging a share costs the same everywhere
    metrics: dict[str, Value] = {"flops": case.flops, "sent_bytes": max(sent), "formula_bytes": case.num_bytes}
    metrics |= {"warp_instructions": sum(counts), "balance": significant(balance, 4)}
    yield Record("distributed", case.name, metrics, executor="host", method=HOST_METHOD)
