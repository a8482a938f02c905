"""Problems for `rope`, `rope_frequencies` and `split_qkv`.

>>> case = RopeCase(batch=1, seqlen=128, num_heads=8, head_dim=64)
>>> case.name
'rope_b1_n128_h8_d64_r64_float16'
>>> case.num_bytes  # x once, the result once, a position a token
262656
>>> SplitQKVCase(batch=2, seqlen=64, num_heads=8, head_dim=64, fill=0.5).num_tokens
64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuattn
from cuattn.testing.attention_cases import normal
from cuattn.testing.rotary_tolerance import assert_rope_close, assert_split_qkv_close
from cuattn.testing.rounding import to_numpy

__all__ = ["RopeCase", "RopeFrequenciesCase", "SplitQKVCase"]

#: Beyond this many elements, check() takes the first, middle and last tokens.
_MAX_ELEMENTS = 1 << 20
_FLOPS_A_PAIR = 6  # four products, two sums


@dataclass(frozen=True)
class RopeCase:
    """A call of :func:`cuattn.rope` with positions 0, 1, ...; `rotary_dim` is head_dim when None."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    rotary_dim: int | None = None
    dtype: str = "float16"
    interleaved: bool = False
    tables: bool = False

    @property
    def turned(self) -> int:
        """Number of elements of a head that are turned."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def name(self) -> str:
        options = "".join(f"_{name}" for name in ("interleaved", "tables") if getattr(self, name))
        return (
            f"rope_b{self.batch}_n{self.seqlen}_h{self.num_heads}_d{self.head_dim}_r{self.turned}_{self.dtype}{options}"
        )

    @property
    def flops(self) -> int:
        """Operations of the rotation; its angles are not counted."""
        return self.batch * self.seqlen * self.num_heads * self.turned // 2 * _FLOPS_A_PAIR

    @property
    def num_bytes(self) -> int:
        """Bytes of x once, the result once, the positions, and of tables the rows in use."""
        heads = 2 * self.batch * self.seqlen * self.num_heads * self.head_dim * np.dtype(self.dtype).itemsize
        return heads + 4 * self.seqlen + self.tables * 2 * self.seqlen * self.turned // 2 * 4

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"x", "positions"} and, for tables, {"cos", "sin"}: arrays of the module `xp` (numpy or cupy)."""
        shape = self.batch, self.seqlen, self.num_heads, self.head_dim
        inputs = {
            "x": xp.asarray(normal(np.random.default_rng(seed), shape, self.dtype)),
            "positions": xp.asarray(np.arange(self.seqlen, dtype=np.int32)),
        }
        if self.tables:
            inputs["cos"], inputs["sin"] = cuattn.rope_frequencies(self.turned, self.seqlen, array_module=xp)
        return inputs

    def _options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        tables = {name: inputs[name] for name in ("cos", "sin") if name in inputs}
        return {"interleaved": self.interleaved, "rotary_dim": self.turned, **tables}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Turn the array."""
        return cuattn.rope(inputs["x"], inputs["positions"], **self._options(inputs))

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right; of a big one, the first, middle and last tokens."""
        tokens = _sample(self.seqlen, self.batch * self.num_heads * self.head_dim)
        positions = to_numpy(inputs["positions"])[tokens]
        assert_rope_close(result[:, tokens], inputs["x"][:, tokens], positions, **self._options(inputs))


@dataclass(frozen=True)
class SplitQKVCase:
    """A call of :func:`cuattn.split_qkv`; with `fill` below 1, that part of a padded batch is tokens (to the left)."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    dtype: str = "float16"
    bias: bool = True
    rope: bool = True
    fill: float | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def width(self) -> int:
        """Number of elements of a token."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def num_tokens(self) -> int:
        length = self.seqlen if self.fill is None else round(self.fill * self.seqlen)
        return self.batch * length

    @property
    def name(self) -> str:
        options = "".join(f"_{name}" for name in ("bias", "rope") if getattr(self, name))
        padding = "" if self.fill is None else f"_padded_{round(100 * self.fill)}"
        sizes = f"b{self.batch}_n{self.seqlen}_h{self.num_heads}_g{self.kv_heads}_d{self.head_dim}"
        return f"split_qkv_{sizes}_{self.dtype}{options}{padding}"

    @property
    def flops(self) -> int:
        """Operations of the sums with the bias and of the rotations; angles are not counted."""
        turned = (self.num_heads + self.kv_heads) * self.head_dim // 2 * _FLOPS_A_PAIR
        return self.num_tokens * (self.bias * self.width + self.rope * turned)

    @property
    def num_bytes(self) -> int:
        """Bytes of qkv and bias once, the results once, padding included, and the index of every slot."""
        slots = self.num_tokens if self.fill is None else self.batch * self.seqlen
        elements = (self.num_tokens + slots + self.bias) * self.width
        return elements * np.dtype(self.dtype).itemsize + (0 if self.fill is None else 4 * slots)

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"qkv"}, and {"bias"}, {"plan"} or {"cu_seqlens"} as asked for: arrays of the module `xp`."""
        rng = np.random.default_rng(seed)
        inputs: dict[str, Any] = {"qkv": xp.asarray(normal(rng, (self.num_tokens, self.width), self.dtype))}
        if self.bias:
            inputs["bias"] = xp.asarray(normal(rng, (self.width,), self.dtype))
        if self.fill is not None:
            mask = np.zeros((self.batch, self.seqlen), bool)
            mask[:, : self.num_tokens // self.batch] = True
            inputs["plan"] = cuattn.padding_plan(mask, array_module=xp)
        elif self.rope:
            inputs["cu_seqlens"] = xp.asarray(np.arange(self.batch + 1, dtype=np.int32) * self.seqlen)
        return inputs

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Split the projection; returns (q, k, v)."""
        return cuattn.split_qkv(
            inputs["qkv"],
            inputs.get("bias"),
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            rope=cuattn.Rotary() if self.rope else None,
            cu_seqlens=inputs.get("cu_seqlens"),
            plan=inputs.get("plan"),
        )

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that `result` is right; of a big one, the first, middle and last tokens of its sequences."""
        length = self.num_tokens // self.batch
        tokens = _sample(length, self.batch * self.width)
        rows = (np.arange(self.batch)[:, None] * length + tokens).ravel()
        options: dict[str, Any] = {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads}
        if self.rope:
            options |= {"rope": {}, "positions": np.tile(tokens, self.batch)}
        slots = rows if self.fill is None else (np.arange(self.batch)[:, None] * self.seqlen + tokens).ravel()
        flat = [to_numpy(x).reshape(-1, *x.shape[-2:])[slots] for x in result]
        assert_split_qkv_close(flat, to_numpy(inputs["qkv"])[rows], inputs.get("bias"), **options)
        if self.fill is not None:
            for x in result:
                assert not to_numpy(x)[:, length:].any(), "padding is not zero"


@dataclass(frozen=True)
class RopeFrequenciesCase:
    """A call of :func:`cuattn.rope_frequencies`, which runs in NumPy: work of a model's start, not of its steps."""

    rotary_dim: int
    max_seqlen: int
    scaling: str | None = None

    @property
    def name(self) -> str:
        return f"rope_frequencies_r{self.rotary_dim}_n{self.max_seqlen}_{self.scaling or 'plain'}"

    @property
    def flops(self) -> int:
        """Operations: a product, a cosine and a sine an angle, each counted as one."""
        return 3 * self.max_seqlen * self.rotary_dim // 2

    @property
    def num_bytes(self) -> int:
        return 2 * 4 * self.max_seqlen * self.rotary_dim // 2

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make {"options", "array_module"}: the call has no arrays."""
        options: dict[str, Any] = {} if self.scaling is None else {"scaling": self.scaling, "factor": 8.0}
        if self.scaling == "yarn":
            options["original_max_position"] = 4096
        return {"options": options, "array_module": xp}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Compute the tables; returns (cos, sin)."""
        module = inputs["array_module"]
        return cuattn.rope_frequencies(self.rotary_dim, self.max_seqlen, array_module=module, **inputs["options"])

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert what holds under every scaling: position 0, and one radius everywhere."""
        cos, sin = (to_numpy(x).astype(np.float64) for x in result)
        radius = cos[0, 0]
        assert radius == 1 or self.scaling == "yarn"
        assert (sin[0] == 0).all()
        np.testing.assert_allclose(np.hypot(cos, sin), radius, rtol=2**-22)


def _sample(num_tokens: int, elements_a_token: int) -> np.ndarray[Any, Any]:
    """Choose all tokens, or those that a check has time for: from the start, the middle and the end."""
    size = max(1, _MAX_ELEMENTS // max(1, elements_a_token) // 3)
    if num_tokens <= 3 * size:
        return np.arange(num_tokens)
    starts = (0, (num_tokens - size) // 2, num_tokens - size)
    return np.unique(np.concatenate([np.arange(start, start + size) for start in starts]))
