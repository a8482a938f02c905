"""Attention in complex arithmetic, for derivatives without a difference: f(x + ih) = f(x) + ih f'(x) up to h^2."""

from __future__ import annotations

import math

import numpy as np

import cuattn


def complex_attention(q, k, v, bias, sinks, *, options):
    """out [B, N, H, E] and lse [B, H, N] of complex q, k, v, bias and sinks: every step is an analytic function.

    Written apart from the reference: no maximum is subtracted, visibility is decided key by key.
    """
    (batch, seqlen_q, heads, head_dim), (seqlen_k, kv_heads) = q.shape, k.shape[1:3]
    scale, softcap, slopes = (options.get(name) for name in ("scale", "softcap", "alibi_slopes"))
    causal, (left, right) = options.get("causal", False), options.get("window") or (None, None)
    offsets = options.get("diagonal_offset", 0 if causal == "top_left" else seqlen_k - seqlen_q)
    offsets = np.broadcast_to(offsets, batch)
    keep = cuattn.dropout_mask(batch, heads, seqlen_q, seqlen_k, dropout_p=options.get("dropout_p", 0),
                               dropout_seed=options.get("dropout_seed", 0))  # fmt: skip
    mask = np.broadcast_to(options.get("mask", True), keep.shape)
    bias = np.broadcast_to(bias, keep.shape)
    slopes = np.broadcast_to(0 if slopes is None else slopes, (batch, heads))
    out = np.zeros((batch, seqlen_q, heads, v.shape[3]), complex)
    lse = np.zeros((batch, heads, seqlen_q), complex)
    for b, h, i in np.ndindex(batch, heads, seqlen_q):
        head = h // (heads // kv_heads)
        total = 0 if sinks is None else np.exp(sinks[h])
        for j in range(seqlen_k):
            distance = i + offsets[b] - j
            after = (causal and distance < 0) or (right is not None and -distance > right)
            if (
                after
                or (left is not None and distance > left)
                or not mask[b, h, i, j]
                or np.isneginf(bias[b, h, i, j].real)
            ):
                continue
            s = (q[b, i, h] * k[b, j, head]).sum() * (1 / math.sqrt(head_dim) if scale is None else scale)
            s = s if softcap is None else softcap * np.tanh(s / softcap)
            weight = np.exp(s - slopes[b, h] * abs(distance) + bias[b, h, i, j])
            total = total + weight
            out[b, i, h] += weight * v[b, j, head] * keep[b, h, i, j] / (1 - options.get("dropout_p", 0))
        if total != 0:
            out[b, i, h] /= total
            lse[b, h, i] = np.log(total)
    return out, lse
