"""The calls of `bench.same_bits` on several ranks: threads, and what each of them returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cuattn import distributed

__all__ = ["distributed_calls"]

RANKS = 3


def distributed_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    rng = np.random.default_rng(5)
    for dtype in (np.float16, np.float32):
        q, k, v = (rng.standard_normal((1, 50, heads, 32)).astype(dtype) for heads in (4, 2, 2))
        for name in ("ring", "ulysses"):
            for partition in ("zigzag", "striped"):

                def attend(a: Any = (q, k, v), name: str = name, partition: Any = partition) -> Any:
                    return distributed.ThreadGroup.run(RANKS, _of_rank, a, name, partition)

                yield f"{name} of {RANKS} ranks {np.dtype(dtype)} {partition}", attend

        def decode(q: Any = q[:, -1:], k: Any = k, v: Any = v) -> Any:
            return distributed.ThreadGroup.run(2, lambda group: _tree(group, q, k, v))

        def linear(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return distributed.ThreadGroup.run(2, lambda group: _linear(group, q, k, v))

        yield f"tree decode of 2 ranks {np.dtype(dtype)}", decode
        yield f"linear of 2 ranks {np.dtype(dtype)}", linear


def _of_rank(group: distributed.Group, arrays: tuple[Any, ...], name: str, partition: Any) -> Any:
    attend: Any = getattr(distributed, f"{name}_attention")
    differentiate: Any = getattr(distributed, f"{name}_attention_backward")
    parts = [distributed.shard(x, group, partition=partition) for x in arrays]
    options: dict[str, Any] = {"partition": partition, "dropout_p": 0.2, "alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}
    out, lse = attend(*parts, group, return_lse=True, **options)
    return out, lse, differentiate(out, *parts, out, lse, group, **options)


def _tree(group: distributed.Group, q: Any, k: Any, v: Any) -> Any:
    mine = slice(25 * group.rank, 25 * group.rank + 25)
    return distributed.tree_decode_attention(q, k[:, mine], v[:, mine], [25], group, return_lse=True)


def _linear(group: distributed.Group, q: Any, k: Any, v: Any) -> Any:
    mine = slice(25 * group.rank, 25 * group.rank + 25)
    return distributed.linear_attention(q[:, mine], k[:, mine], v[:, mine], group, return_state=True)
