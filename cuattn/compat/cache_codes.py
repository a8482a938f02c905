"""8-bit floats in a call with a cache: queries and new entries of the cache's own type, factors of each sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cuattn.compat.cache_tokens import Tokens
from cuattn.errors import ArgumentError, DTypeError
from cuattn.formats import numpy_dtype
from cuattn.runtime.executor import Executor
from cuattn.runtime.small_arrays import small_array

__all__ = ["Codes"]

_FORMATS = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(slots=True)
class Codes:
    """What 8-bit arrays of a call mean: ``fp8_format`` for arrays of uint8, and factors [batch, kv_heads] or None."""

    fp8_format: Any = None
    q_descale: Any = None
    k_descale: Any = None
    v_descale: Any = None

    def read(
        self, executor: Executor, arrays: dict[str, Any], queries: Tokens, options: dict[str, Any]
    ) -> Callable[[Any], Any] | None:
        """Replace 8-bit q, k and v by bfloat16, exactly, and say in ``options`` what the cache holds.

        With factors q becomes float32, for products of it with those of the logits, and what is returned multiplies the
        result by the others.
        """
        descales = {f"{x}_descale": getattr(self, f"{x}_descale") for x in "qkv"}
        given = [name for name, x in descales.items() if x is not None]
        names = {
            name: self._name(name, arrays[name]) for name in ("q", "k", "v", "k_cache", "v_cache") if name in arrays
        }
        if names["k_cache"] is None:
            if given:
                raise ArgumentError(
                    f"{given[0]} is given and k_cache has dtype {arrays['k_cache'].dtype}; "
                    "only 8-bit floats have factors"
                )
            if names["q"] is not None:
                raise DTypeError(
                    f"q has dtype {arrays['q'].dtype} and k_cache {arrays['k_cache'].dtype}; they must be the same"
                )
            return None
        options["kv_format"] = {long: short for short, long in _FORMATS.items()}[names["k_cache"]]
        for name in ("q", "k", "v"):
            if names.get(name) is not None:
                arrays[name] = _widened(executor, arrays[name], names[name])
        if not given:
            return None
        shape = queries.batch, int(arrays["k_cache"].shape[2])
        factors = {
            name: small_array(executor, name, x, (shape,), np.dtype(np.float32))
            for name, x in descales.items()
            if x is not None
        }
        of_logits = [factors[name] for name in ("q_descale", "k_descale") if name in factors]
        dtype = arrays["q"].dtype
        arrays["q"] = arrays["q"].astype(np.float32)
        for factor in of_logits:
            arrays["q"] = arrays["q"] * _of_heads(executor, factor, arrays["q"], queries)

        def descaled(out: Any) -> Any:
            if "v_descale" in factors:
                out = out * _of_heads(executor, factors["v_descale"], out, queries)
            return out.astype(dtype)

        return descaled

    def _name(self, name: str, x: Any) -> str | None:
        """The name of the 8-bit type that an array holds, or None."""
        if x.dtype == np.uint8:
            if self.fp8_format not in _FORMATS:
                raise DTypeError(f"{name} has dtype uint8; fp8_format must be one of {', '.join(_FORMATS)} for it")
            return _FORMATS[self.fp8_format]
        return x.dtype.name if x.dtype.name in _FORMATS.values() else None


def _widened(executor: Executor, x: Any, name: Any) -> Any:
    """8-bit floats as bfloat16, which holds every one of them."""
    values = np.arange(256, dtype=np.uint8).view(numpy_dtype(name)).astype(ml_dtypes.bfloat16)
    return executor.put(values, values.dtype)[x if x.dtype == np.uint8 else x.view(np.uint8)]


def _of_heads(executor: Executor, factor: Any, x: Any, queries: Tokens) -> Any:
    """Factors [batch, kv_heads] as they multiply ``x``, [batch, seqlen, heads, ...] or [tokens, heads, ...]."""
    xp, kv_heads = executor.xp, int(factor.shape[1])
    factor = xp.repeat(factor, int(x.shape[-2]) // kv_heads if kv_heads else 0, 1)
    if queries.each is not None:
        return factor[:, None, :, None]
    sequence, _ = queries.counted_from(xp, xp.zeros(queries.batch, np.int32))
    return factor[sequence][:, :, None]
