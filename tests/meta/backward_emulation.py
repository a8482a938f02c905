"""A tiled flash backward in NumPy, in a kernel's precision, right or with one planted fault.

The subject of the tests of the tolerance rule for gradients. It rounds where a kernel rounds: P, without the factor of
dropout, and dS to the dtype of q; everything else to float32, or float64 for float64. Its order is not that of the
naive computation: tile by tile, head after head of a group, exponents in base 2 where nothing is added to a logit.
"""

from __future__ import annotations

import math

import numpy as np

import cuattn
from cuattn import reference
from cuattn.reference import Gradients
from cuattn.reference.narrow import round_probabilities

#: Faults, and the options that a call must have for them to matter.
FAULTS = {
    "dropped_key": {},
    "dropped_query": {},
    "dropped_pair": {},
    "delta_forgotten": {},
    "delta_of_next_row": {},
    "dq_unscaled": {},
    "dk_unscaled": {},
    "scale_twice": {},
    "last_tile_of_dq": {},
    "last_tile_of_dk": {},
    "first_tile_of_dv": {},
    "v_of_next_key": {},
    "k_of_next_key": {},
    "lse_of_next_row": {},
    "head_dropped": {"heads": (4, 2)},
    "head_map": {"heads": (4, 2)},
    "kv_head_of_dk": {"heads": (4, 2)},
    "dlse_sign": {"dlse": True},
    "dlse_forgotten": {"dlse": True},
    "causal_shifted": {"causal": True},
    "mask_of_next_key": {"mask": True},
    "alibi_forgotten": {"alibi_slopes": True},
    "bias_forgotten": {"bias": "full"},
    "softcap_slope_forgotten": {"softcap": 2.0},
    "softcap_slope_twice": {"softcap": 2.0},
    "softcap_slope_of_capped": {"softcap": 2.0},
    "dropout_not_rescaled_in_ds": {"dropout_p": 0.1},
    "dropout_not_rescaled_in_dv": {"dropout_p": 0.1},
    "dropout_forgotten_in_dv": {"dropout_p": 0.1},
    "dropout_of_delta": {"dropout_p": 0.1},
    "dropout_of_next_key": {"dropout_p": 0.1},
    "dbias_without_a_batch_entry": {"bias": "one_batch"},
    "dbias_without_a_head": {"bias": "one_head"},
    "dbias_without_last_rows": {"bias": "one_row"},
    "dbias_twice": {"bias": "full"},
    "dbias_scaled": {"bias": "full"},
    "dbias_with_softcap": {"bias": "full", "softcap": 2.0},
    "sink_sign": {"sinks": True},
    "sink_of_next_head": {"sinks": True},
    "sink_without_dlse": {"sinks": True, "dlse": True},
    "sink_without_last_row": {"sinks": True},
}


def _matmul(a, b, sequential):
    """a @ b; `sequential` adds one product after the other, the worst order for rounding."""
    if not sequential:
        return a @ b
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for i in range(a.shape[-1]):
        total += a[..., i : i + 1] * b[..., i : i + 1, :]
    return total


def _tiles(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _next(x, axis):
    return np.roll(x, -1, axis=axis)


def tiled_backward(dout, q, k, v, out, lse, *, block_m, block_n, sequential=False, fault=None, dlse=None, sinks=None,
                   precision=None, operand_dtype=None, **options):  # fmt: skip
    """Gradients like :func:`cuattn.reference.attention_backward`, by tiles of `block_m` queries and `block_n` keys.

    `fault` is one of FAULTS; `operand_dtype`, what operands are rounded to, is that of q in a right kernel.
    """
    real = np.float64 if q.dtype == np.float64 else np.float32
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads

    def operand(x):
        return reference.round_to_tf32(x) if precision == "tf32" else x.astype(operand_dtype or q.dtype).astype(real)

    def probability(x):
        return operand(x) if precision == "tf32" else round_probabilities(x, operand_dtype or q.dtype)

    scale, softcap, bias, slopes = (options.pop(name, None) for name in ("scale", "softcap", "bias", "alibi_slopes"))
    scale = real(1 / math.sqrt(head_dim) if scale is None else scale)
    natural = softcap is not None or bias is not None or slopes is not None
    log2_e = real(math.log2(math.e))
    dropout = {name: options.pop(name) for name in tuple(options) if name.startswith("dropout_")}
    kept, rescale = np.ones((1, 1, 1, 1), bool), real(1)
    if dropout.get("dropout_p"):
        kept = cuattn.dropout_mask(batch, num_heads, seqlen_q, seqlen_k, **dropout)
        rescale = real(1 / (1 - dropout["dropout_p"]))
    offset = reference.diagonal(seqlen_q, seqlen_k, options.get("causal", False), options.get("diagonal_offset"))
    if fault == "causal_shifted":
        options["diagonal_offset"] = offset[:, 0, 0, 0] + 1
    if fault == "mask_of_next_key":
        options["mask"] = _next(options["mask"], -1)
    seen = reference.visible(seqlen_q, seqlen_k, **options)
    full = batch, num_heads, seqlen_q, seqlen_k
    kept, seen = (np.broadcast_to(x, full).copy() for x in (kept, seen))
    if fault == "dropped_key":
        seen[..., seqlen_k // 2] = False
    if fault == "dropped_query":
        seen[..., seqlen_q // 2, :] = False
    if fault == "dropped_pair":
        seen[:, :, seqlen_q // 2, seqlen_k // 2] = False
    if fault == "dropout_of_next_key":
        kept = _next(kept, -1)
    added = None if bias is None else np.broadcast_to(bias, full).astype(real)
    if bias is not None and fault == "bias_forgotten":
        added = np.where(np.isinf(added), added, 0)

    head_map = np.arange(num_heads) // group
    if fault == "head_map":
        head_map = np.arange(num_heads) % num_kv_heads
    queries, dy = (operand(x.astype(real)).transpose(0, 2, 1, 3) for x in (q, dout))
    keys, values = (operand(x.astype(real))[:, :, head_map].transpose(0, 2, 1, 3) for x in (k, v))
    if fault == "v_of_next_key":
        values = _next(values, 2)

    # The kernel over rows: delta, and lse ready for exponents.
    products = dout.astype(real) * out.astype(real)
    delta = products.sum(axis=-1) if not sequential else np.cumsum(products, axis=-1)[..., -1]
    delta = np.where(np.isnan(lse), real(0), delta.transpose(0, 2, 1))
    if fault == "dropout_of_delta":
        delta = delta * rescale
    if fault == "delta_forgotten":
        delta = delta * 0
    without_dlse = delta
    if dlse is not None and fault != "dlse_forgotten":
        delta = delta + dlse if fault == "dlse_sign" else delta - dlse
    ready = np.where(np.isneginf(lse), real(np.inf), lse * (1 if natural else log2_e)).astype(real)
    if fault == "delta_of_next_row":
        delta = _next(delta, -1)
    if fault == "lse_of_next_row":
        ready = _next(ready, -1)

    dq = np.zeros((batch, num_heads, seqlen_q, head_dim), real)
    dk, dv = (np.zeros((batch, num_kv_heads, seqlen_k, x.shape[3]), real) for x in (k, v))
    logit_gradients = np.zeros(full, real)
    row_tiles, column_tiles = _tiles(seqlen_q, block_m), _tiles(seqlen_k, block_n)
    for step in range(group):  # the query heads of a group, one after the other
        heads = slice(step, None, group)
        for rows in row_tiles:
            for columns in column_tiles:
                part = (slice(None), heads, rows, columns)
                k_tile, v_tile = keys[:, heads, columns], values[:, heads, columns]
                q_tile, dy_tile = queries[:, heads, rows], dy[:, heads, rows]
                s = _matmul(q_tile, k_tile.swapaxes(-1, -2), sequential)
                slope = real(1)
                if natural:
                    s = s * scale
                    if softcap is not None:
                        e = np.exp2(np.abs(s * real(1 / softcap)) * (-2 * log2_e))
                        slope = 4 * e / ((1 + e) * (1 + e))
                        s = np.copysign(real(softcap) * ((1 - e) / (1 + e)), s)
                        if fault == "softcap_slope_of_capped":
                            slope = 1 - np.square(np.tanh(s * real(1 / softcap)))
                    if slopes is not None and fault != "alibi_forgotten":
                        distance = np.abs(offset[:, :, rows] - np.arange(seqlen_k)[columns]).astype(real)
                        of_heads = slopes.astype(real).reshape(-1 if slopes.ndim == 2 else 1, num_heads, 1, 1)
                        s = s - of_heads[:, heads] * distance
                    if added is not None:
                        s = s + added[part]
                    exponent = (s - ready[:, heads, rows, None]) * log2_e
                else:
                    exponent = s * (scale * log2_e) - ready[:, heads, rows, None]
                visible = seen[part] & ~np.isneginf(s)
                p = np.where(visible, np.exp2(exponent), real(0))
                drop = ~kept[part]

                p_kept = p if fault == "dropout_forgotten_in_dv" else np.where(drop, real(0), p)
                if fault != "first_tile_of_dv" or rows.start:
                    dv[:, :, columns] += _matmul(probability(p_kept).swapaxes(-1, -2), dy_tile, sequential)
                dp = _matmul(dy_tile, v_tile.swapaxes(-1, -2), sequential)
                z = np.where(drop, real(0), real(1) if fault == "dropout_not_rescaled_in_ds" else rescale)
                ds = p * (z * dp - delta[:, heads, rows, None])
                logit_gradients[part] = ds
                if fault == "softcap_slope_twice":
                    slope = slope * slope
                if fault != "softcap_slope_forgotten":
                    ds = ds * slope
                if fault == "dbias_with_softcap":
                    logit_gradients[part] = ds
                ds = operand(ds)
                if fault != "last_tile_of_dq" or columns is not column_tiles[-1]:
                    other = _next(k_tile, 2) if fault == "k_of_next_key" else k_tile
                    dq[:, heads, rows] += _matmul(ds, other, sequential)
                if (fault != "last_tile_of_dk" or rows is not row_tiles[-1]) and (fault != "head_dropped" or not step):
                    product = _matmul(ds.swapaxes(-1, -2), q_tile, sequential)
                    dk[:, :, columns] += _next(product, 1) if fault == "kv_head_of_dk" else product

    dq = dq if fault == "dq_unscaled" else dq * scale
    dk = dk if fault == "dk_unscaled" else dk * scale
    dq = dq * scale if fault == "scale_twice" else dq
    dv = dv if fault == "dropout_not_rescaled_in_dv" else dv * rescale
    dq, dk, dv = (x.transpose(0, 2, 1, 3).astype(q.dtype) for x in (dq, dk, dv))
    of_sinks = without_dlse if fault == "sink_without_dlse" else delta
    dbias = _bias_gradient(logit_gradients, bias, scale, fault)
    return Gradients(dq, dk, dv, dbias, _sink_gradient(lse, of_sinks, sinks, fault))


def _bias_gradient(ds, bias, scale, fault):
    if bias is None:
        return None
    if fault == "dbias_without_a_batch_entry":
        ds = ds[1:]
    if fault == "dbias_without_a_head":
        ds = ds[:, 1:]
    if fault == "dbias_without_last_rows":
        ds = ds[:, :, :-1]
    ds = ds * ds.dtype.type({"dbias_twice": 2, "dbias_scaled": scale}.get(fault, 1))
    shape = (1,) * (4 - bias.ndim) + bias.shape
    for axis in (axis for axis in range(4) if shape[axis] == 1):
        none = np.zeros_like(ds, shape=[1 if i == axis else n for i, n in enumerate(ds.shape)])
        ds = np.cumsum(np.concatenate([none, ds], axis=axis), axis=axis).take([-1], axis=axis)
    return ds.reshape(bias.shape).astype(bias.dtype)


def _sink_gradient(lse, delta, sinks, fault):
    if sinks is None:
        return None
    sink = (_next(sinks, 0) if fault == "sink_of_next_head" else sinks).astype(lse.dtype).reshape(1, -1, 1)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(sink), 0, np.exp(sink - lse) * delta)
    if fault == "sink_without_last_row":
        terms = terms[..., :-1]
    return (terms if fault == "sink_sign" else -terms).sum(axis=(0, 2)).astype(lse.dtype)
