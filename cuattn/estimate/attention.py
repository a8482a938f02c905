"""FLOPs, traffic and memory of one attention call, fused into tiles and unfused."""

from __future__ import annotations

from typing import NamedTuple

from cuattn.errors import ArgumentError
from cuattn.estimate.numbers import count

__all__ = ["AttentionMemory", "AttentionTraffic", "attention_flops", "attention_memory", "attention_traffic"]


class AttentionTraffic(NamedTuple):
    """Bytes between a kernel and global memory for one head: `least` is each input and output once."""

    standard: int
    flash: int
    least: int


class AttentionMemory(NamedTuple):
    """Bytes that a call takes, inputs and outputs included: unfused, fused, and of the logits alone."""

    standard: int
    flash: int
    scores: int

    @property
    def saved_percent(self) -> float:
        """What the fused call saves of the unfused one."""
        return 100 * (1 - self.flash / self.standard) if self.standard else 0.0


def attention_flops(
    N: int, M: int, D: int, E: int | None = None, *, batch: int = 1, heads: int = 1, causal: bool = False
) -> int:
    """Count the FLOPs of both products: 2 (D + E) for each visible pair, a causal mask being aligned at the end.

    >>> attention_flops(4, 4, 8) == 4 * 4 * 4 * 8, attention_flops(4, 4, 8, causal=True) == 4 * 10 * 8
    (True, True)
    """
    head_dim, seqlen_q, seqlen_k = count("D", D), count("N", N), count("M", M)
    head_dim_v = head_dim if E is None else count("E", E)
    pairs = seqlen_q * seqlen_k
    if causal:  # query i sees the first i + 1 + M - N keys
        short = min(seqlen_q, seqlen_k)
        pairs = short * (2 * seqlen_k - short + 1) // 2
    return 2 * count("batch", batch) * count("heads", heads) * pairs * (head_dim + head_dim_v)


def attention_traffic(
    N: int,
    M: int,
    D: int,
    E: int,
    itemsize: int,
    block_m: int,
    *,
    causal: bool = False,
    lse_bytes: int = 0,
) -> AttentionTraffic:
    """Count the bytes that one head of attention moves: unfused, in tiles of `block_m` queries, and at least.

    * least: q, k, v and out once, and lse;
    * standard: besides, logits and probabilities are written and read once each, 4 N M numbers;
    * flash: q and out once, keys and values once for every tile of queries. That is what the fused kernels of this
      package ask memory for, exactly.

    Parameters
    ----------
    N, M : int
        Queries and keys.
    D, E : int
        Head dims of queries and keys, and of values.
    itemsize : int
        Bytes of a number.
    block_m : int
        Queries of a tile.
    causal : bool
        Keys that all queries of a tile come before are not read (bottom-right alignment). For standard, which computes
        all, it changes nothing.
    lse_bytes : int
        Bytes of a row's lse, if it is written.

    Returns
    -------
    AttentionTraffic
        (standard, flash, least).

    Examples
    --------
    >>> attention_traffic(512, 512, 64, 64, 2, 128)
    AttentionTraffic(standard=2359296, flash=655360, least=262144)
    """
    seqlen_q, seqlen_k, item = count("N", N), count("M", M), count("itemsize", itemsize, 1)
    width, rows = count("D", D) + count("E", E), count("block_m", block_m, 1)
    lse = count("lse_bytes", lse_bytes) * seqlen_q
    keys = -(-seqlen_q // rows) * seqlen_k
    if causal:
        keys = 0
        for first in range(0, seqlen_q, rows):
            keys += max(0, min(seqlen_q, first + rows) + seqlen_k - seqlen_q)
    queries = seqlen_q * width * item + lse  # q and out
    least = queries + seqlen_k * width * item
    return AttentionTraffic(least + 4 * seqlen_q * seqlen_k * item, queries + keys * width * item, least)


def attention_memory(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    itemsize: int = 2,
    *,
    kv_heads: int | None = None,
) -> AttentionMemory:
    """Count the bytes that a call has allocated at its peak: q, k, v, out, lse; unfused, logits and probabilities too.

    Logits and lse are float32, float64 beside inputs of 8 bytes; probabilities are of the inputs' size.

    Parameters
    ----------
    batch, heads, seqlen_q, seqlen_k, head_dim : int
        Shape of the call.
    head_dim_v : int, optional
        That of values, where it is not `head_dim`.
    itemsize : int
        Bytes of a number.
    kv_heads : int, optional
        Heads of keys and values, where they are fewer.

    Returns
    -------
    AttentionMemory
        (standard, flash, scores), scores being the logits alone.

    Examples
    --------
    The matrices of two heads of 4096 tokens are 128 MiB, so those of 16 heads of 16 sequences are 16 GiB:

    >>> attention_memory(2, 1, 4096, 4096, 64, itemsize=4).scores == 128 * 2**20
    True
    >>> attention_memory(16, 16, 4096, 4096, 64, itemsize=4).scores == 16 * 2**30
    True
    """
    batch, heads = count("batch", batch), count("heads", heads)
    queries, keys, item = count("seqlen_q", seqlen_q), count("seqlen_k", seqlen_k), count("itemsize", itemsize, 1)
    width = count("head_dim", head_dim)
    width += width if head_dim_v is None else count("head_dim_v", head_dim_v)
    groups = heads if kv_heads is None else count("kv_heads", kv_heads, 1)
    if heads % groups:
        raise ArgumentError(f"heads is {heads}, no multiple of kv_heads, {groups}")
    wide = max(item, 4)
    rows = batch * heads * queries
    flash = (rows + batch * groups * keys) * width * item + rows * wide
    scores = rows * keys * wide
    return AttentionMemory(flash + scores + rows * keys * item, flash, scores)
