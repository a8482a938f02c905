"""Problems for linear attention and its gradients.

>>> case = LinearCase(1, 512, 8, 64, decay="token")
>>> case.name
'linear_b1_n512_h8_g8_g8_d64_e64_float16_token'
>>> sorted(case.make_inputs(seed=0))
['decay', 'k', 'q', 'v']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import cuattn
from cuattn.ops.linear.options import FeatureMap
from cuattn.reference.linear import LinearGradients
from cuattn.testing.attention_cases import normal
from cuattn.testing.linear_gradients import assert_linear_gradients_close
from cuattn.testing.linear_tolerance import assert_linear_close
from cuattn.testing.rounding import accumulation_dtype, to_numpy

__all__ = ["CHUNK", "LinearCase"]

CHUNK = 64  # tokens whose products are counted; the work of a recurrence that is computed in chunks depends on it
TAIL = 128  # tokens at the end that are compared with float64, from the state before them


@dataclass(frozen=True)
class LinearCase:
    """A call of :func:`cuattn.linear_attention`, or with ``backward`` of :func:`cuattn.linear_attention_backward`.

    ``num_heads`` are those of q; k and v have as many unless ``num_k_heads`` and ``num_v_heads`` say otherwise.
    ``decay`` is that of a token or of each channel, of about -0.05 a token.
    """

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    num_k_heads: int | None = None
    num_v_heads: int | None = None
    head_dim_v: int | None = None
    dtype: str = "float16"
    feature_map: FeatureMap | None = None
    normalize: bool = False
    decay: Literal["token", "channel"] | None = None
    backward: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows = self.batch, self.seqlen
        of_keys, of_values = self.num_k_heads or self.num_heads, self.num_v_heads or self.num_heads
        values = self.head_dim_v or self.head_dim
        found: dict[str, tuple[int, ...]] = {
            "q": (*rows, self.num_heads, self.head_dim),
            "k": (*rows, of_keys, self.head_dim),
            "v": (*rows, of_values, values),
        }
        states = max(of_keys, of_values)
        if self.decay is not None:
            found["decay"] = (*rows, states) if self.decay == "token" else (*rows, states, self.head_dim)
        if self.backward:
            found["dout"] = (*rows, max(self.num_heads, states), values)
        return found

    @property
    def name(self) -> str:
        (*_, heads, dim), (*_, of_keys, _), (*_, of_values, values) = (self.shapes[name] for name in "qkv")
        words = ["linear", *["backward"][: self.backward], f"b{self.batch}", f"n{self.seqlen}", f"h{heads}"]
        words += [f"g{of_keys}", f"g{of_values}", f"d{dim}", f"e{values}", self.dtype]
        return "_".join([*words, *filter(None, (self.feature_map, self.decay)), *["normalized"][: self.normalize]])

    @property
    def flops(self) -> int:
        """Operations of the chunked form: per state and token the update of the state, per output its reading and the
        products within a chunk; of gradients three of the former, two readings and five products.
        """
        dim, values = self.head_dim, self.shapes["v"][-1]
        states, tokens = self._num_states, self.batch * self.seqlen
        outputs = max(self.num_heads, states)
        state = 2 * dim * values
        if not self.backward:
            return tokens * (states * state + outputs * (state + 2 * CHUNK * (dim + values)))
        return tokens * (states * 3 * state + outputs * (2 * state + 2 * CHUNK * (3 * dim + 2 * values)))

    @property
    def num_bytes(self) -> int:
        """Bytes of each input read once and each output written once."""
        itemsize, sums = np.dtype(self.dtype).itemsize, accumulation_dtype(self.dtype).itemsize
        sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        inputs = sum(size * (sums if name == "decay" else itemsize) for name, size in sizes.items())
        if self.backward:
            return 2 * inputs - sizes["dout"] * itemsize
        outputs = self.batch * self.seqlen * max(self.num_heads, self._num_states) * self.shapes["v"][-1]
        return inputs + outputs * itemsize

    @property
    def _num_states(self) -> int:
        return max(self.shapes["k"][2], self.shapes["v"][2])

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the functions that are no arrays."""
        return {"feature_map": self.feature_map, "normalize": self.normalize}

    def make_inputs(self, seed: int = 0, xp: Any = np) -> dict[str, Any]:
        """Make arrays of the module ``xp``, standard normal; with normalisation but no map, q and k are positive."""
        rng = np.random.default_rng(seed)
        arrays: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            if name == "decay":
                array = -0.05 * rng.exponential(size=shape).astype(accumulation_dtype(self.dtype))
            else:
                array = normal(rng, shape, self.dtype)
            positive = self.normalize and self.feature_map is None and name in ("q", "k")
            arrays[name] = xp.asarray(np.abs(array) if positive else array)
        return arrays

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Compute the output, or the `LinearGrads`."""
        if self.backward:
            return cuattn.linear_attention_backward(**inputs, **self.options)
        return cuattn.linear_attention(**inputs, **self.options)

    def check(self, inputs: Mapping[str, Any], result: Any) -> None:
        """Assert that the last tokens of the first batch entry are right, from the state that all before them leave."""
        first = max(0, self.seqlen - TAIL)
        before, tail = slice(0, first), slice(first, None)
        own = {name: x[:1, before] for name, x in inputs.items() if name != "dout"}
        _, state = cuattn.linear_attention(**own, **self.options, return_state=True)
        arrays = {name: to_numpy(x[:1, tail]) for name, x in inputs.items()}
        initial = tuple(None if x is None else to_numpy(x) for x in state)
        options = {**self.options, "initial_state": initial, "decay": arrays.pop("decay", None)}
        if not self.backward:
            found = to_numpy(result[:1, tail]).astype(self.dtype)
            assert_linear_close(found, None, arrays["q"], arrays["k"], arrays["v"], **options)
            return
        dq, dk, dv = (to_numpy(x[:1, tail]).astype(self.dtype) for x in (result.dq, result.dk, result.dv))
        ddecay = getattr(result, "ddecay", None)
        gradients = LinearGradients(dq, dk, dv, None if ddecay is None else to_numpy(ddecay[:1, tail]), None, None)
        of = (arrays["dout"], arrays["q"], arrays["k"], arrays["v"])
        assert_linear_gradients_close(gradients, *of, part=True, **options)
