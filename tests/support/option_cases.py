"""Options of attention by name: each alone, at its edges, and all of them together."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from cuattn.testing.options import make_bias, make_descale, make_mask, make_sinks, make_slopes

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
E4M3, E5M2 = map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))

FORMATS = (F16, BF16, F32, F64, E4M3, E5M2)
#: One of each kind: 16 bits, 64 bits, and 8 bits that are widened.
FEW_FORMATS = (F16, F64, E4M3)


def _everything(rng, batch, heads, seqlen_q, seqlen_k):
    return {
        "scale": -0.6,
        "causal": True,
        "window": (20, None),
        "diagonal_offset": np.int32([2, seqlen_k - 1])[:batch],
        "softcap": 3.0,
        "alibi_slopes": make_slopes(rng, (batch, heads)),
        "bias": make_bias(rng, (heads, seqlen_q, seqlen_k), F32, "normal"),
        "mask": make_mask(rng, (batch, 1, seqlen_q, seqlen_k), "random"),
        "sinks": make_sinks(rng, heads),
        "dropout_p": 0.3,
        "dropout_seed": 2**40 + 5,
        "dropout_offset": 3,
    }


#: What a case passes, of (generator, batch, heads, seqlen_q, seqlen_k).
OPTION_CASES = {
    "none": lambda rng, b, h, n, m: {},
    "scale": lambda rng, b, h, n, m: {"scale": -0.4},
    "scale_of_0": lambda rng, b, h, n, m: {"scale": 0.0},
    "causal": lambda rng, b, h, n, m: {"causal": True},
    "top_left": lambda rng, b, h, n, m: {"causal": "top_left"},
    "window": lambda rng, b, h, n, m: {"window": (4, 2)},
    "window_left": lambda rng, b, h, n, m: {"window": (0, None), "causal": "top_left"},
    "window_right": lambda rng, b, h, n, m: {"window": (None, 3), "diagonal_offset": -4},
    "diagonal_offsets": lambda rng, b, h, n, m: {"causal": True, "diagonal_offset": np.int32([m, -3])[:b]},
    "softcap": lambda rng, b, h, n, m: {"softcap": 0.5},
    "alibi": lambda rng, b, h, n, m: {"alibi_slopes": make_slopes(rng, (h,))},
    "alibi_of_batch": lambda rng, b, h, n, m: {"alibi_slopes": -make_slopes(rng, (b, h)), "diagonal_offset": 5},
    "bias": lambda rng, b, h, n, m: {"bias": make_bias(rng, (b, h, n, m), F32, "infinities")},
    "bias_lowest": lambda rng, b, h, n, m: {"bias": make_bias(rng, (n, m), BF16, "lowest")},
    "bias_of_keys": lambda rng, b, h, n, m: {"bias": make_bias(rng, (b, 1, 1, m), F16, "normal")},
    "bias_double": lambda rng, b, h, n, m: {"bias": make_bias(rng, (h, n, 1), F64, "normal")},
    "mask": lambda rng, b, h, n, m: {"mask": make_mask(rng, (b, 1, n, m), "sparse")},
    "mask_of_keys": lambda rng, b, h, n, m: {"mask": make_mask(rng, (m,), "random")},
    "mask_of_everything": lambda rng, b, h, n, m: {"mask": np.zeros((), bool)},
    "sinks": lambda rng, b, h, n, m: {"sinks": make_sinks(rng, h)},
    "sinks_and_mask": lambda rng, b, h, n, m: {"sinks": make_sinks(rng, h), "mask": make_mask(rng, (n, m), "sparse")},
    "dropout": lambda rng, b, h, n, m: {"dropout_p": 0.4, "dropout_seed": 2**63 + 1, "dropout_offset": 2**32 - 1},
    "everything": _everything,
}
FOR_EVERY_DTYPE = ("none", "everything")
#: A bias of another type than float32 is a kernel of its own, with each type of q.
OF_ONE_DTYPE = ("bias_lowest", "bias_of_keys", "bias_double")


def formats_of(case):
    """The dtypes of q that a case is tried with."""
    return FORMATS if case in FOR_EVERY_DTYPE else FEW_FORMATS[: 1 if case in OF_ONE_DTYPE else None]


def option_case(case, shape, dtype):
    """The options of a case for shape (B, N, M, H, G, D, E); 8-bit floats get descales as well."""
    batch, seqlen_q, seqlen_k, heads, kv_heads = shape[:5]
    rng = np.random.default_rng(0)
    options = OPTION_CASES[case](rng, batch, heads, seqlen_q, seqlen_k)
    if dtype.itemsize == 1:
        options |= {f"{name}_descale": make_descale(rng, (batch, kv_heads)) for name in "qkv"}
    return options
