"""Problems of dual-chunk attention: prompts, chunks of prompts, and decoding over pages.

>>> DualChunkCase(1, 1024, 2, 64, chunk_size=320, local_size=64).name
'dual_chunk_b1_n1024_m1024_h2_g2_d64_float16_c320_w64_turned'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuattn
from cuattn.testing.attention_cases import normal
from cuattn.testing.dual_chunk_tolerance import assert_dual_chunk_close
from cuattn.testing.rounding import to_numpy

__all__ = ["DualChunkCase", "DualChunkDecodeCase"]

_CHECKED_QUERIES = 8  # the last ones, of one batch entry: the oracle takes memory for each query and key


@dataclass(frozen=True)
class DualChunkCase:
    """A call of `cuattn.dual_chunk_attention`; `seqlen_k` 0 is that of the queries."""

    batch: int
    seqlen_q: int
    num_heads: int
    head_dim: int
    chunk_size: int
    local_size: int
    seqlen_k: int = 0
    num_kv_heads: int = 0
    dtype: str = "float16"
    keys_rotated: bool = True

    @property
    def keys(self) -> int:
        return self.seqlen_k or self.seqlen_q

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def name(self) -> str:
        shape = f"b{self.batch}_n{self.seqlen_q}_m{self.keys}_h{self.num_heads}_g{self.kv_heads}_d{self.head_dim}"
        chunks = f"c{self.chunk_size}_w{self.local_size}"
        return f"dual_chunk_{shape}_{self.dtype}_{chunks}{'_turned' * self.keys_rotated}"

    @property
    def flops(self) -> int:
        """Operations of the two products over the pairs of a query and a key that it sees."""
        pairs = self.seqlen_q * self.keys - self.seqlen_q * (self.seqlen_q - 1) // 2
        return 4 * self.batch * self.num_heads * pairs * self.head_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of q, k and v read once, and the result written once."""
        rows = 2 * self.seqlen_q * self.num_heads + 2 * self.keys * self.kv_heads
        return self.batch * rows * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def options(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "local_size": self.local_size, "keys_rotated": self.keys_rotated}

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make q, k and v, standard normal."""
        rng = np.random.default_rng(seed)
        lengths = {"q": (self.seqlen_q, self.num_heads), **dict.fromkeys("kv", (self.keys, self.kv_heads))}
        shapes = {name: (self.batch, *sizes, self.head_dim) for name, sizes in lengths.items()}
        return {name: xp.asarray(normal(rng, shape, self.dtype)) for name, shape in shapes.items()}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Call the function."""
        return cuattn.dual_chunk_attention(**inputs, **self.options)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that the last queries of the last batch entry are right."""
        q, k, v = (to_numpy(inputs[name][-1:]) for name in "qkv")
        last = slice(max(0, self.seqlen_q - _CHECKED_QUERIES), None)
        assert_dual_chunk_close(to_numpy(result[-1:])[:, last], q[:, last], k, v, **self.options)


@dataclass(frozen=True)
class DualChunkDecodeCase:
    """A call of `cuattn.dual_chunk_decode`: one token for each of `batch` sequences of `context` keys on pages."""

    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int
    local_size: int
    dtype: str = "float16"
    page_size: int = 16

    @property
    def name(self) -> str:
        shape = f"b{self.batch}_m{self.context}_h{self.num_heads}_g{self.num_kv_heads}_d{self.head_dim}"
        chunks = f"c{self.chunk_size}_w{self.local_size}"
        return f"dual_chunk_decode_{shape}_{self.dtype}_page{self.page_size}_{chunks}"

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.num_heads * self.context * self.head_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and queries read once, and the result written once."""
        rows = 2 * self.context * self.num_kv_heads + 2 * self.num_heads
        return self.batch * rows * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> dict[str, int]:
        return {"chunk_size": self.chunk_size, "local_size": self.local_size}

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make queries and pages, standard normal; lengths and tables stay on the host, which knows them."""
        rng = np.random.default_rng(seed)
        pages = self.batch * -(-self.context // self.page_size)
        slots = pages, self.page_size, self.num_kv_heads, self.head_dim
        shapes = {"q": (self.batch, 1, self.num_heads, self.head_dim), "k_pages": slots, "v_pages": slots}
        arrays = {name: xp.asarray(normal(rng, shape, self.dtype)) for name, shape in shapes.items()}
        tables = rng.permutation(pages).reshape(self.batch, -1).astype(np.int32)
        return {**arrays, "block_tables": tables, "seqlens_k": np.full(self.batch, self.context, np.int32)}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Call the function."""
        keywords: dict[str, Any] = {**inputs, **self.chunks}
        return cuattn.dual_chunk_decode(**keywords)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that the last sequence is right."""
        table = inputs["block_tables"][-1]
        k, v = (
            to_numpy(inputs[f"{name}_pages"])[table].reshape(1, -1, self.num_kv_heads, self.head_dim) for name in "kv"
        )
        of_sequence = k[:, : self.context], v[:, : self.context]
        q = to_numpy(inputs["q"][-1:])
        assert_dual_chunk_close(to_numpy(result[-1:]), q, *of_sequence, keys_rotated=True, **self.chunks)
