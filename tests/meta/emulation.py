"""A tiled flash forward in NumPy, in a kernel's precision, right or with one planted fault.

The subject of the tests of the tolerance rule. It rounds where a kernel rounds: probabilities, not yet normalised, to
the dtype of v (float16 for float8, e4m3 with precision "fp8"); everything else to float32, or float64 for float64. Its
order is not that of the naive computation, and the scale is folded into a base-2 exponent.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

import cuattn
from cuattn import reference
from cuattn.reference.narrow import output_dtype, probability_dtype, round_probabilities

FAULTS = (
    "dropped_key",
    "missing_rescale",
    "unscaled_row_sum",
    "block_max_only",
    "causal_shifted",
    "unmasked_tail",
    "wrong_head_map",
    "wrong_scale",
    "lse_base_2",
)

#: Faults in one option: its name, and what to call with.
OPTION_FAULTS = {
    "softcap_forgotten": {"softcap": 2.0},
    "softcap_after_bias": {"softcap": 2.0, "bias": "normal"},
    "alibi_shifted": {"alibi_slopes": "causal", "causal": True},
    "alibi_forgets_batch": {"alibi_slopes": "batch"},
    "bias_twice": {"bias": "normal"},
    "bias_of_next_key": {"bias": "normal"},
    "sink_in_no_sum": {"sinks": "normal"},
    "sink_of_next_head": {"sinks": "normal"},
    "dropout_in_row_sum": {"dropout_p": 0.3},
    "dropout_not_rescaled": {"dropout_p": 0.1},
    "dropout_of_next_key": {"dropout_p": 0.1},
}


def _matmul(a, b, sequential):
    """a @ b; `sequential` adds one product after the other, the worst order for rounding."""
    if not sequential:
        return a @ b
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for i in range(a.shape[-1]):
        total += a[..., i : i + 1] * b[..., i : i + 1, :]
    return total


def tiled_attention(q, k, v, *, block_n, sequential=False, fault=None, rng=None, sinks=None, out_dtype=None, **options):
    """(out, lse) like :func:`cuattn.reference.attention`, tile by tile of `block_n` keys; `fault` is one of FAULTS."""
    real = np.float64 if q.dtype == np.float64 else np.float32
    narrow, out_dtype = probability_dtype(q.dtype), output_dtype(q.dtype) if out_dtype is None else out_dtype
    precision = options.pop("precision", None)
    tf32 = precision == "tf32"
    if tf32:
        q, k, v = (reference.round_to_tf32(x) for x in (q, k, v))
    descales = [options.pop(f"{name}_descale", None) for name in "qkv"]
    (_, seqlen_q, num_heads, head_dim), (_, seqlen_k, num_kv_heads, _) = q.shape, k.shape
    scale = options.pop("scale", None)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if fault == "wrong_scale":
        scale = 1.02 * scale
    softcap, bias, slopes = (options.pop(name, None) for name in ("softcap", "bias", "alibi_slopes"))
    head_map = np.arange(num_heads) // (num_heads // num_kv_heads)
    if fault == "wrong_head_map":
        head_map = np.arange(num_heads) % num_kv_heads
    queries = q.astype(real).transpose(0, 2, 1, 3)
    keys, values = (x.astype(real)[:, :, head_map].transpose(0, 2, 1, 3) for x in (k, v))
    q_descale, k_descale, v_descale = (
        np.ones((1, 1, 1, 1), real) if x is None else x.astype(real)[:, head_map, None, None] for x in descales
    )
    scale = real(scale) * q_descale * k_descale
    dropout = {name: options.pop(name) for name in tuple(options) if name.startswith("dropout_")}
    kept = rescale_kept = np.ones((1, 1, 1, 1), real)
    if dropout.get("dropout_p"):
        kept = cuattn.dropout_mask(q.shape[0], num_heads, seqlen_q, seqlen_k, **dropout).astype(real)
        rescale_kept = real(1) if fault == "dropout_not_rescaled" else real(1 / (1 - dropout["dropout_p"]))
    if fault == "dropout_of_next_key":
        kept = np.roll(kept, 1, axis=-1)
    kept = np.broadcast_to(kept, (*queries.shape[:3], seqlen_k))

    seen = reference.visible(seqlen_q, seqlen_k, **options)
    offset = reference.diagonal(seqlen_q, seqlen_k, options.get("causal", False), options.get("diagonal_offset"))
    if fault == "causal_shifted":
        seen = reference.visible(seqlen_q, seqlen_k, **options | {"diagonal_offset": offset[:, 0, 0, 0] + 1})
    seen = np.broadcast_to(seen, (*queries.shape[:3], seqlen_k)).copy()
    if fault == "dropped_key":
        seen[..., rng.integers(seqlen_k)] = False
    log2_e = real(math.log2(math.e))

    row_max = np.full((*queries.shape[:3], 1), -np.inf, real)
    row_sum = np.zeros_like(row_max)
    if fault == "sink_of_next_head":
        sinks = np.roll(sinks, 1)
    if sinks is not None and fault != "sink_in_no_sum":
        row_max = np.broadcast_to(sinks.astype(real).reshape(1, -1, 1, 1) * log2_e, row_max.shape)
        row_sum = np.ones_like(row_max)
    acc = np.zeros((*queries.shape[:3], v.shape[3]), real)
    for start in range(0, seqlen_k, block_n):
        tile = slice(start, min(start + block_n, seqlen_k))
        s = _matmul(queries, keys[..., tile, :].swapaxes(-1, -2), sequential)
        if softcap is None and bias is None and slopes is None:
            s = s * (scale * log2_e)
        else:
            s = s * scale
            added = 0 if bias is None else np.broadcast_to(bias, seen.shape)
            if fault == "bias_of_next_key":
                added = np.roll(added, 1, axis=-1)
            if bias is not None:
                added = added[..., tile].astype(real) * (2 if fault == "bias_twice" else 1)
            if fault == "softcap_after_bias":
                s = s + added
            if softcap is not None and fault != "softcap_forgotten":
                s = real(softcap) * np.tanh(s * real(1 / softcap))
            if slopes is not None:
                distance = np.abs(offset - np.arange(seqlen_k)[tile] - (fault == "alibi_shifted")).astype(real)
                slopes = slopes[:1] if fault == "alibi_forgets_batch" else slopes
                s = s - slopes.astype(real).reshape(-1 if slopes.ndim == 2 else 1, num_heads, 1, 1) * distance
            if fault != "softcap_after_bias":
                s = s + added
            s = s * log2_e
        s = np.where(seen[..., tile], s, real(-np.inf))
        tile_values = values[..., tile, :]
        if fault == "unmasked_tail" and tile.stop == seqlen_k:  # one key of padding, of zeros
            s = np.concatenate([s, np.zeros_like(s[..., :1])], axis=-1)
            tile_values = np.concatenate([tile_values, np.zeros_like(tile_values[..., :1, :])], axis=-2)

        new_max = np.maximum(row_max, s.max(axis=-1, keepdims=True))
        if fault == "block_max_only":
            new_max = s.max(axis=-1, keepdims=True)
        shift = np.where(np.isneginf(new_max), real(0), new_max)
        rescale = np.exp2(row_max - shift)
        p = np.exp2(s - shift)
        summed = p * kept[..., tile] * rescale_kept if fault == "dropout_in_row_sum" else p
        row_sum = row_sum * (1 if fault == "unscaled_row_sum" else rescale) + summed.sum(axis=-1, keepdims=True)
        acc = acc * (1 if fault == "missing_rescale" else rescale)
        if tf32:
            p = reference.round_to_tf32(p)
        else:
            p = round_probabilities(p, ml_dtypes.float8_e4m3fn if precision == "fp8" else narrow)
        p = p if fault == "unmasked_tail" else p * kept[..., tile]
        acc = acc + _matmul(p, tile_values, sequential)
        row_max = row_max if fault == "block_max_only" and start else new_max

    out = acc / np.where(row_sum == 0, real(1), row_sum) * (rescale_kept * v_descale)
    lse = (row_max * real(math.log(2)) + np.log(row_sum))[..., 0]
    if fault == "lse_base_2":
        lse = lse / real(math.log(2))
    return out.transpose(0, 2, 1, 3).astype(out_dtype), lse
