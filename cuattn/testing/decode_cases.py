"""Problems for decoding over a cache of keys and values, contiguous or on pages.

>>> case = DecodeCase(batch=4, context=1000, num_heads=32, num_kv_heads=8, head_dim=128)
>>> case.name
'decode_b4_n1_m1000_h32_g8_d128_float16_page16'
>>> case.kv_bytes == 2 * 4 * 1000 * 8 * 128 * 2
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuattn
from cuattn.formats import KV_FORMATS, KVFormat
from cuattn.testing.attention_cases import normal
from cuattn.testing.decode_problems import fill_codes, make_scales
from cuattn.testing.decode_tolerance import assert_paged_close
from cuattn.testing.rounding import accumulation_dtype, to_numpy

__all__ = ["DecodeCase"]


@dataclass(frozen=True)
class DecodeCase:
    """A call of `cuattn.paged_attention`, or of `cuattn.decode_attention` with `page_size` 0.

    Every sequence has `context` keys, the last `seqlen_q` of them those of the queries. Physical pages are in random
    order. `planned` passes a plan made before, which is not part of the call.
    """

    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float16"
    kv_format: str | None = None
    page_size: int = 16
    seqlen_q: int = 1
    num_splits: int | None = None
    planned: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    @property
    def name(self) -> str:
        cache = f"page{self.page_size}" if self.page_size else "contiguous"
        marks = f"_{self.kv_format}" * bool(self.kv_format) + f"_splits{self.num_splits}" * bool(self.num_splits)
        if self.window is not None:
            marks += "_window_" + "_".join("inf" if side is None else str(side) for side in self.window)
        if self.softcap:
            marks += f"_softcap_{self.softcap:g}".replace(".", "p")
        marks += "_sinks" * self.sinks
        shape = f"b{self.batch}_n{self.seqlen_q}_m{self.context}_h{self.num_heads}_g{self.num_kv_heads}"
        return f"decode_{shape}_d{self.head_dim}_{self.dtype}_{cache}{marks}{'_planned' * self.planned}"

    @property
    def format(self) -> KVFormat:
        return KV_FORMATS[self.kv_format or self.dtype]

    @property
    def num_pages(self) -> int:
        """Pages of all sequences together."""
        return self.batch * -(-self.context // self.page_size) if self.page_size else self.batch

    @property
    def flops(self) -> int:
        """Operations of the two products; what a causal mask hides among the last keys is left in."""
        return 4 * self.batch * self.num_heads * self.seqlen_q * self.context * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values in use, with their scales."""
        slots = self.batch * self.context * self.num_kv_heads
        per_head = self.format.bytes_per_head(self.head_dim)
        if self.format.quantized and not self.format.block_size:
            per_head += 4  # a scale of its own
        return 2 * slots * per_head

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and queries read once, the result written once, tables and lengths."""
        rows = self.batch * self.seqlen_q * self.num_heads
        tables = 4 * self.num_pages if self.page_size else 0
        return self.kv_bytes + 2 * rows * self.head_dim * np.dtype(self.dtype).itemsize + tables + 4 * self.batch

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make the arguments of the call by name; lengths and tables stay on the host, which knows them."""
        rng = np.random.default_rng(seed)
        inputs: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            if name == "q" or self.kv_format is None:
                values = normal(rng, shape, self.dtype)
            else:
                values = fill_codes(shape, self.kv_format, rng)
            inputs[name] = xp.asarray(_bytes(values))
        if self.kv_format is not None:
            slots = self.shapes["k_pages" if self.page_size else "k_cache"][:3]
            scales = make_scales(rng, self.kv_format, "slot", slots, (self.head_dim, self.head_dim))
            inputs |= {name: xp.asarray(_bytes(x)) if np.ndim(x) else x for name, x in scales.items()}
        inputs |= self.host_inputs(rng)
        if self.sinks:
            inputs["sinks"] = xp.asarray(rng.standard_normal(self.num_heads).astype(accumulation_dtype(self.dtype)))
        return inputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the queries and the cache, one number an item, by name."""
        kind = "pages" if self.page_size else "cache"
        slots = self.num_pages, self.page_size or self.context, self.num_kv_heads, self.head_dim
        return {
            "q": (self.batch, self.seqlen_q, self.num_heads, self.head_dim),
            f"k_{kind}": slots,
            f"v_{kind}": slots,
        }

    def host_inputs(self, rng: np.random.Generator) -> dict[str, Any]:
        """Make lengths and tables, which stay on the host."""
        inputs: dict[str, Any] = {"seqlens_k": np.full(self.batch, self.context, np.int32)}
        if self.page_size:
            inputs["block_tables"] = rng.permutation(self.num_pages).reshape(self.batch, -1).astype(np.int32)
        return inputs

    @property
    def options(self) -> dict[str, Any]:
        """Return the keywords of the call that are no arrays, where they are not the default."""
        names = ("window", "softcap", "scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def plan(self, array_module: Any = np) -> cuattn.DecodePlan:
        """Make a plan for the call."""
        return cuattn.plan_decode(
            np.full(self.batch, self.context),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=np.dtype(self.dtype),
            kv_format=self.kv_format,
            seqlen_q=self.seqlen_q,
            num_splits=self.num_splits,
            array_module=array_module,
            window=self.window,
        )

    def run(self, inputs: Mapping[str, Any], *, plan: cuattn.DecodePlan | None = None) -> Any:
        """Call the function; returns out and lse."""
        keywords = dict(inputs, kv_format=self.kv_format, return_lse=True, **self.options)
        if plan is not None:
            keywords["plan"] = plan
        elif self.num_splits is not None:
            keywords["num_splits"] = self.num_splits
        return (cuattn.paged_attention if self.page_size else cuattn.decode_attention)(**keywords)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result`, (out, lse), is right, by the first and the last sequence."""
        arrays = {name: to_numpy(x) if np.ndim(x) else x for name, x in inputs.items()}
        tables = arrays.pop("block_tables", np.arange(self.batch)[:, None])
        q, seqlens = arrays.pop("q"), arrays.pop("seqlens_k")
        kind = "pages" if self.page_size else "cache"
        k, v = (arrays.pop(f"{name}_{kind}") for name in "kv")
        out, lse = (to_numpy(x) for x in result)
        for b in {0, self.batch - 1}:
            one = slice(b, b + 1)
            cache = k, v, tables[one], seqlens[one]
            keywords = arrays | self.options | {"kv_format": self.kv_format}
            assert_paged_close(out[one], q[one], *cache, lse=lse[one], **keywords)


def _bytes(x: Any) -> Any:
    """Return numbers of one byte as uint8, which every array module has; int8 stays."""
    return x.view(np.uint8) if x.dtype.itemsize == 1 and x.dtype != np.int8 else x
