"""How attention over a divided sequence scales with the number of GPUs, on paper: arithmetic against wires.

What is assumed: kernels reach ``flops_per_s`` whatever the shape; a GPU sends and receives at once, with
``link_bytes_per_s`` inside a node and ``network_bytes_per_s`` to another one, without latency; every rank has as much
to do (zig-zag, for a causal mask); a ring sends while it computes, Ulysses exchanges before and after; merging is free.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from cuattn.errors import ArgumentError
from cuattn.estimate.numbers import count

__all__ = ["Scaling", "ring_hides_from", "scaling"]

Method = Literal["ring", "ulysses", "usp"]


class Scaling(NamedTuple):
    """One layer of attention on some ranks, forward.

    Attributes
    ----------
    ranks : int
    method : str
    bytes : int
        That a rank sends, by the formula of the method.
    compute_s, transfer_s : float
        What a rank takes for its arithmetic, and for its transfers if nothing else went on.
    time_s : float
        Of both, with what hides behind the other.
    efficiency : float
        The time of 1 / ranks of the arithmetic, over ``time_s``.
    hidden : bool
        Whether the transfers of the ring take no longer than the steps that they go along with; False without a ring.
    """

    ranks: int
    method: str
    bytes: int
    compute_s: float
    transfer_s: float
    time_s: float
    efficiency: float
    hidden: bool


def scaling(
    ranks: int,
    *,
    seqlen: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    batch: int = 1,
    itemsize: int = 2,
    causal: bool = True,
    method: Method = "ring",
    flops_per_s: float = 600e12,
    link_bytes_per_s: float = 400e9,
    network_bytes_per_s: float = 50e9,
    ranks_per_node: int = 8,
) -> Scaling:
    """Estimate the time of one forward of attention over a sequence that is divided among ``ranks`` GPUs.

    Parameters
    ----------
    ranks : int
        GPUs; ``ranks_per_node`` of them share the fast links.
    seqlen, batch, heads, kv_heads, head_dim, head_dim_v, itemsize, causal
        The call, of all ranks together.
    method : {"ring", "ulysses", "usp"}
        "usp": Ulysses among the largest number of ranks that divides ``ranks``, ``ranks_per_node`` and ``heads``, a
        ring across.
    flops_per_s, link_bytes_per_s, network_bytes_per_s : float
        What kernels reach, and what a GPU sends in a second inside its node and out of it. By default an H200 with
        NVLink, and a network card of 400 Gbit/s for each GPU.

    Returns
    -------
    Scaling

    Raises
    ------
    ArgumentError
        Numbers that are no extents or no rates, an unknown method.

    Examples
    --------
    >>> from cuattn import estimate
    >>> call = {"seqlen": 2**20, "heads": 32, "kv_heads": 8, "head_dim": 128}
    >>> for ranks in (8, 64, 1024):
    ...     found = estimate.scaling(ranks, **call)
    ...     print(ranks, found.hidden, round(found.efficiency, 2))
    8 True 1.0
    64 True 1.0
    1024 False 0.17
    """
    ranks, per_node = count("ranks", ranks, 1), count("ranks_per_node", ranks_per_node, 1)
    n, b, h, g = count("seqlen", seqlen, 1), count("batch", batch, 1), count("heads", heads, 1), kv_heads
    dims = count("head_dim", head_dim, 1) + count("head_dim_v", head_dim if head_dim_v is None else head_dim_v, 1)
    itemsize = count("itemsize", itemsize, 1)
    if h % count("kv_heads", g, 1):
        raise ArgumentError(f"heads is {heads}, which is no multiple of kv_heads, {kv_heads}")
    if method not in ("ring", "ulysses", "usp"):
        raise ArgumentError(f"method is {method!r}; allowed are 'ring', 'ulysses' and 'usp'")
    link, network = _rate("link_bytes_per_s", link_bytes_per_s), _rate("network_bytes_per_s", network_bytes_per_s)
    pairs = n * (n + 1) / 2 if causal else float(n) * n
    ideal = 2 * b * h * pairs * dims / _rate("flops_per_s", flops_per_s) / ranks
    inside = {"ring": 1, "ulysses": ranks, "usp": math.gcd(ranks, per_node, h)}[method]
    outside = ranks // inside

    # Ulysses among `inside` ranks: q, k and v go out, results come back
    of_token = (h + g) * dims * itemsize
    exchanged = b * n * of_token * (inside - 1) // (ranks * inside)
    near = min(inside, per_node)
    to_near = exchanged * (near - 1) / max(inside - 1, 1)
    exchange_s = max(to_near / link, (exchanged - to_near) / network)
    compute_s = ideal * math.ceil(h / inside) * inside / h  # the rank with the most heads

    # a ring among `outside` ranks, of the key/value heads that a rank has then
    shared = math.ceil(g / inside) if inside > 1 else g
    step_bytes = b * -(-n // outside) * shared * dims * itemsize
    step_s = step_bytes / (link if ranks <= per_node else network)
    of_step = compute_s / outside
    moving = (outside - 1) * max(of_step, step_s) + of_step
    time_s = exchange_s + moving
    sent = exchanged + (outside - 1) * step_bytes
    hidden = outside > 1 and step_s <= of_step
    transfer_s = exchange_s + (outside - 1) * step_s
    return Scaling(ranks, method, sent, compute_s, transfer_s, time_s, ideal / time_s, hidden)


def ring_hides_from(
    *, heads: int, kv_heads: int, flops_per_s: float, bytes_per_s: float, itemsize: int = 2, causal: bool = True
) -> float:
    """Return from how many tokens a rank on a ring hides its transfers: (G / H) · (F / W) · itemsize / 2, causal twice.

    >>> from cuattn import estimate
    >>> estimate.ring_hides_from(heads=8, kv_heads=8, flops_per_s=600e12, bytes_per_s=400e9, causal=False)
    1500.0
    """
    shared = count("kv_heads", kv_heads, 1) / count("heads", heads, 1)
    rates = _rate("flops_per_s", flops_per_s) / _rate("bytes_per_s", bytes_per_s)
    return shared * rates * count("itemsize", itemsize, 1) / 2 * (2 if causal else 1)


def _rate(name: str, value: float) -> float:
    if isinstance(value, bool | str) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} is {value!r}; a positive number is needed")
    return float(value)
