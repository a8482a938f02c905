"""Problems for the attention functions, with every option.

>>> case = AttentionCase(batch=1, seqlen_q=128, num_heads=8, head_dim=64, causal=True)
>>> case.name
'attention_b1_n128_m128_h8_g8_d64_e64_float16_causal'
>>> case.flops
16777216
>>> {name: x.shape for name, x in case.make_inputs(seed=0).items()}["q"]
(1, 128, 8, 64)
>>> AttentionCase(1, 128, 8, 64, window=(32, 0), bias="hnm").name
'attention_b1_n128_m128_h8_g8_d64_e64_float16_window_32_0_bias_hnm'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy the names of the narrow formats
import numpy as np
from numpy.typing import NDArray

import cuattn
from cuattn.errors import ArgumentError
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.tolerance import assert_attention_close, assert_varlen_close

__all__ = ["AttentionCase", "VarlenCase", "normal"]

#: Beyond this many logits, check() takes samples: the float64 reference would take longer than the kernel's user has.
_MAX_LOGITS = 1 << 22
_AXES = "bhnm"
_MASKS = ("random", "open", "half", "padding")
_DROPOUT_SEED = 1234


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Draw standard normal values of a dtype, narrow floats included."""
    real = np.dtype(dtype)
    return rng.standard_normal(shape, np.float64 if real == np.float64 else np.float32).astype(real)


@dataclass(frozen=True)
class _Options:
    """Fields that a case of equal and one of packed sequences share. All of them are keywords of the call."""

    dtype: str = "float16"
    causal: bool | str = False
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: bool = False  # slopes 2^(-8 h / H)
    sinks: bool = False
    dropout_p: float = 0.0
    precision: str | None = None
    diagonal_offset: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the call and of its reference; those that are arrays are among the inputs."""
        options = {"causal": self.causal, "scale": self.scale}
        for name in ("window", "chunk", "softcap", "precision", "diagonal_offset"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "dropout_seed": _DROPOUT_SEED}
        return options

    @property
    def _option_name(self) -> str:
        causal = "_causal" * bool(self.causal) + (f"_{self.causal}" if isinstance(self.causal, str) else "")
        parts = [causal]
        if self.window is not None:
            parts.append("_window_" + "_".join("inf" if side is None else str(side) for side in self.window))
        for name in ("scale", "chunk", "softcap", "dropout_p", "diagonal_offset"):
            value = getattr(self, name)
            if value:
                parts.append(f"_{name.removesuffix('_p')}_{value:g}".replace(".", "p").replace("-", "m"))
        parts += [f"_{name}" for name in ("alibi", "sinks") if getattr(self, name)]
        return "".join(parts) + (f"_{self.precision}" if self.precision else "")

    def _head_arrays(self, rng: np.random.Generator, num_heads: int) -> dict[str, NDArray[Any]]:
        """Make alibi_slopes and sinks [H]."""
        real = accumulation_dtype(self.dtype)
        arrays: dict[str, NDArray[Any]] = {}
        if self.alibi:
            arrays["alibi_slopes"] = (2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)).astype(real)
        if self.sinks:
            arrays["sinks"] = rng.standard_normal(num_heads).astype(real)
        return arrays

    def _out_itemsize(self) -> int:
        return max(2, np.dtype(self.dtype).itemsize)  # of 8-bit floats the result is bfloat16


@dataclass(frozen=True)
class _Shape:
    batch: int
    seqlen_q: int
    num_heads: int
    head_dim: int
    seqlen_k: int | None = None
    num_kv_heads: int | None = None
    head_dim_v: int | None = None


@dataclass(frozen=True)
class AttentionCase(_Options, _Shape):
    """A call of :func:`cuattn.attention`; `seqlen_k`, `num_kv_heads` and `head_dim_v` are as those of q when None.

    `bias` and `mask` name the axes that these have, the others being broadcast: "nm" is one [N, M] for all, "bm" hides
    keys of each sequence. `mask_kind` is "random", "open" (hides nothing), "half" (every second block of 128 keys) or
    "padding" (the ends of sequences).
    """

    bias: str | None = None
    mask: str | None = None
    mask_kind: str = "random"

    def __post_init__(self) -> None:
        for name in ("bias", "mask"):
            axes = getattr(self, name)
            if axes is not None and (set(axes) - set(_AXES) or list(axes) != sorted(set(axes), key=_AXES.find)):
                raise ArgumentError(f"{name} is {axes!r}; a part of {_AXES!r}, in this order, is allowed")
        if self.mask_kind not in _MASKS:
            raise ArgumentError(f"mask_kind is {self.mask_kind!r}; allowed are {', '.join(map(repr, _MASKS))}")

    @property
    def num_keys(self) -> int:
        return self.seqlen_q if self.seqlen_k is None else self.seqlen_k

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Shapes of q [B, N, H, D], k [B, M, G, D] and v [B, M, G, E]."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        return {
            "q": (self.batch, self.seqlen_q, self.num_heads, self.head_dim),
            "k": (self.batch, self.num_keys, kv_heads, self.head_dim),
            "v": (self.batch, self.num_keys, kv_heads, head_dim_v),
        }

    @property
    def name(self) -> str:
        kv_heads, head_dim_v = self.shapes["v"][2:]
        kind = "" if self.mask_kind == "random" else f"_{self.mask_kind}"
        return (
            f"attention_b{self.batch}_n{self.seqlen_q}_m{self.num_keys}_h{self.num_heads}_g{kv_heads}"
            f"_d{self.head_dim}_e{head_dim_v}_{self.dtype}{self._option_name}"
            + (f"_bias_{self.bias}" if self.bias is not None else "")
            + (f"_mask_{self.mask}{kind}" if self.mask is not None else "")
        )

    @property
    def flops(self) -> int:
        """Two matmuls, ``2 (D + E)`` for each query and key: all B H N M of them, half of that when causal (by
        convention, whatever N and M are), and with a window or a chunk those that it shows.
        """
        counted = bool(self.window or self.chunk)
        pairs = self.batch * self.num_heads * (self._visible() if counted else self.seqlen_q * self.num_keys)
        total = 2 * pairs * (self.head_dim + self.shapes["v"][3])
        return total // 2 if self.causal and not counted else total

    def _visible(self) -> int:
        """Count the pairs of one head that causal mask, window and chunk leave."""
        begin, end = self.visible_keys()
        return int(np.maximum(end - begin, 0).sum())

    def visible_keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first key of each query that causal mask, window and chunk leave, and the one after the last."""
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        aligned = np.arange(self.seqlen_q) + self.diagonal
        begin = np.zeros_like(aligned) if left is None else np.clip(aligned - left, 0, self.num_keys)
        end = np.full_like(aligned, self.num_keys) if right is None else np.clip(aligned + right + 1, 0, self.num_keys)
        if self.chunk is not None:
            first = aligned // self.chunk * self.chunk
            begin, end = np.maximum(begin, first), np.minimum(end, first + self.chunk)
        return begin, end

    @property
    def diagonal(self) -> int:
        """The key that query 0 is aligned with."""
        if self.diagonal_offset is not None:
            return self.diagonal_offset
        return 0 if self.causal == "top_left" else self.num_keys - self.seqlen_q

    @property
    def num_bytes(self) -> int:
        """Each input read once, as it lies in memory; each output written once."""
        out = self.batch * self.seqlen_q * self.num_heads * self.shapes["v"][3] * self._out_itemsize()
        arrays = sum(int(np.prod(shape)) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize
        lse = self.batch * self.num_heads * self.seqlen_q * accumulation_dtype(self.dtype).itemsize
        mask = 0 if self.mask is None else int(np.prod(self._logit_shape(self.mask)))
        return out + arrays + lse + self.bias_bytes + mask

    @property
    def bias_bytes(self) -> int:
        """Bytes of the bias, as it lies in memory."""
        return 0 if self.bias is None else int(np.prod(self._logit_shape(self.bias))) * self._bias_dtype.itemsize

    @property
    def _bias_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype) if np.dtype(self.dtype).itemsize > 1 else np.dtype(np.float16)

    def _logit_shape(self, axes: str) -> tuple[int, int, int, int]:
        extents = dict(zip(_AXES, (self.batch, self.num_heads, self.seqlen_q, self.num_keys), strict=True))
        b, h, n, m = (extents[axis] if axis in axes else 1 for axis in _AXES)
        return b, h, n, m

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make q, k, v, and options that are arrays: standard normal, arrays of the module `xp` (numpy or cupy)."""
        rng = np.random.default_rng(seed)
        arrays = {name: normal(rng, shape, self.dtype) for name, shape in self.shapes.items()}
        return {name: xp.asarray(x) for name, x in (arrays | self.option_inputs(rng)).items()}

    def option_inputs(self, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Make the options that are arrays."""
        arrays = self._head_arrays(rng, self.num_heads)
        if self.bias is not None:
            arrays["bias"] = rng.standard_normal(self._logit_shape(self.bias)).astype(self._bias_dtype)
        if self.mask is not None:
            arrays["mask"] = self._make_mask(rng, self._logit_shape(self.mask))
        return arrays

    def _make_mask(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
        if self.mask_kind == "random":
            return rng.random(shape) < 0.7
        keys = np.arange(shape[3])
        if self.mask_kind == "half":
            return np.broadcast_to(keys // 128 % 2 == 0, shape).copy()
        if self.mask_kind == "padding":
            lengths = rng.integers(max(1, shape[3] // 2), shape[3] + 1, (*shape[:3], 1))
            return np.asarray(keys < lengths)
        return np.ones(shape, np.bool_)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Call :func:`cuattn.attention` on the inputs; returns (out, lse)."""
        return cuattn.attention(**inputs, return_lse=True, **self.options)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result`, an (out, lse) pair, is right; of a big one, the first, middle and last rows."""
        out, lse = result
        if self.batch * self.num_heads * self.seqlen_q * self.num_keys <= _MAX_LOGITS:
            assert_attention_close(out, **inputs, lse=lse, **self.options)
            return
        for b, h, rows in self.samples(_MAX_LOGITS // self.num_keys):
            arrays, options = self.sample(inputs, b, h, rows)
            heads = slice(h, h + 1)
            part = lse[b : b + 1, heads, rows]
            assert_attention_close(out[b : b + 1, rows, heads], **arrays, lse=part, **options)

    def samples(self, max_rows: int = 64) -> Iterator[tuple[int, int, slice]]:
        """Batch entry, head and rows of the parts that stand for the whole. A dropout mask depends on all three, so
        with dropout it is the first rows of the first head.
        """
        size = max(1, min(self.seqlen_q, 64, max_rows))
        if self.dropout_p:
            yield 0, 0, slice(0, size)
            return
        starts = {0, (self.seqlen_q - size) // 2, self.seqlen_q - size}
        for b in sorted({0, self.batch - 1}):
            for h in sorted({0, self.num_heads - 1}):
                for start in sorted(starts):
                    yield b, h, slice(start, start + size)

    def sample(self, inputs: Mapping[str, Any], b: int, h: int, rows: slice) -> tuple[dict[str, Any], dict[str, Any]]:
        """Cut out inputs and options of a problem of its own: some rows of one head."""
        q, k, v = (inputs[name] for name in "qkv")
        heads = slice(h, h + 1)
        kv_head = h // (self.num_heads // k.shape[2])
        kv_heads = slice(kv_head, kv_head + 1)
        arrays = {
            "q": q[b : b + 1, rows, heads],
            "k": k[b : b + 1, :, kv_heads],
            "v": v[b : b + 1, :, kv_heads],
        }
        for name in ("alibi_slopes", "sinks"):
            if name in inputs:
                arrays[name] = inputs[name][heads]
        for name in ("bias", "mask"):
            if name in inputs:
                parts = (slice(b, b + 1), heads, rows, slice(None))
                axes = zip(parts, inputs[name].shape, strict=True)
                arrays[name] = inputs[name][tuple(slice(None) if extent == 1 else part for part, extent in axes)]
        return arrays, {**self.options, "diagonal_offset": self.diagonal + rows.start}


@dataclass(frozen=True)
class _Packed:
    seqlens_q: tuple[int, ...]
    num_heads: int
    head_dim: int
    seqlens_k: tuple[int, ...] | None = None
    num_kv_heads: int | None = None
    head_dim_v: int | None = None


@dataclass(frozen=True)
class VarlenCase(_Options, _Packed):
    """A call of :func:`cuattn.attention_varlen` on sequences of these lengths; `seqlens_k` are those of q when None."""

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of q [T, H, D], k [Tk, G, D] and v [Tk, G, E]."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        tokens_q, tokens_k = sum(self.seqlens_q), sum(self._keys)
        return {
            "q": (tokens_q, self.num_heads, self.head_dim),
            "k": (tokens_k, kv_heads, self.head_dim),
            "v": (tokens_k, kv_heads, head_dim_v),
        }

    @property
    def _keys(self) -> tuple[int, ...]:
        return self.seqlens_q if self.seqlens_k is None else self.seqlens_k

    @property
    def name(self) -> str:
        (tokens, heads, head_dim), (_, kv_heads, head_dim_v) = self.shapes["q"], self.shapes["v"]
        return (
            f"varlen_b{len(self.seqlens_q)}_t{tokens}_max{max(self.seqlens_q, default=0)}_h{heads}_g{kv_heads}"
            f"_d{head_dim}_e{head_dim_v}_{self.dtype}{self._option_name}"
        )

    @property
    def flops(self) -> int:
        """Operations of all sequences together: see `AttentionCase.flops`."""
        total = 2 * self.num_pairs * (self.head_dim + self.shapes["v"][2])
        return total // 2 if self.causal else total

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key of the same sequence, over all heads."""
        return self.num_heads * sum(n * m for n, m in zip(self.seqlens_q, self._keys, strict=True))

    @property
    def max_seqlens(self) -> dict[str, Any]:
        """Return the longest sequence on either side, as keywords of the call."""
        return {
            "max_seqlen_q": max(self.seqlens_q, default=0),
            "max_seqlen_k": max(self._keys, default=0),
        }

    @property
    def num_bytes(self) -> int:
        """Each input read once, each output written once."""
        tokens = sum(self.seqlens_q) * self.num_heads
        arrays = sum(int(np.prod(shape)) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize
        out = tokens * self.shapes["v"][2] * self._out_itemsize()
        return arrays + out + tokens * accumulation_dtype(self.dtype).itemsize

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make q, k, v, cu_seqlens_q and cu_seqlens_k, and slopes and sinks where wanted."""
        rng = np.random.default_rng(seed)
        arrays = {name: normal(rng, shape, self.dtype) for name, shape in self.shapes.items()}
        return {name: xp.asarray(x) for name, x in (arrays | self.option_inputs(rng)).items()}

    def option_inputs(self, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Say where sequences begin and end, and make the options that are arrays."""
        lengths = {"cu_seqlens_q": self.seqlens_q, "cu_seqlens_k": self._keys}
        arrays = {name: np.cumsum((0, *values), dtype=np.int32) for name, values in lengths.items()}
        return arrays | self._head_arrays(rng, self.num_heads)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Call :func:`cuattn.attention_varlen` on the inputs; returns (out, lse)."""
        return cuattn.attention_varlen(**inputs, **self.max_seqlens, return_lse=True, **self.options)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result`, an (out, lse) pair, is right."""
        out, lse = result
        assert_varlen_close(out, **inputs, lse=lse, **self.options)
