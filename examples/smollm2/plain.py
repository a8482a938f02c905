"""The yardstick: the same model in float32 NumPy, all of it again for every token, with nothing of cuattn.

It is written apart from model.py on purpose. A pair of elements is a complex number here, so a rotation is a product;
keys are repeated for their group of query heads; masked scores are stored. N tokens, H query and G key/value heads of
D elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.special

from .weights import Block, Shape, Weights


class PlainModel:
    """A model that gives logits of the next token, computed from all tokens before it."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits [vocabulary] of the token that follows `tokens`."""
        shape = self.weights.shape
        x = self.weights.embedding[np.asarray(tokens)]
        for block in self.weights.blocks:
            x = x + attention(rms_norm(x, block.attention_norm, shape.rms_eps), block, shape)
            gate, up = np.split(rms_norm(x, block.ffn_norm, shape.rms_eps) @ block.gate_up.T, 2, axis=-1)
            x = x + (gate * scipy.special.expit(gate) * up) @ block.down.T
        return rms_norm(x[-1], self.weights.norm, shape.rms_eps) @ self.weights.embedding.T


def attention(x: np.ndarray, block: Block, shape: Shape) -> np.ndarray:
    """Attend from every token to those before it and itself, [N, width]."""
    query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts = np.split(x @ block.qkv.T, [query_width, query_width + key_width], axis=-1)
    q, k, v = (part.reshape(len(x), -1, shape.head_dim).swapaxes(0, 1) for part in parts)  # [H or G, N, D]
    q, k = rotated(q, shape.rope_base), rotated(k, shape.rope_base)
    k, v = (np.repeat(part, shape.heads // shape.kv_heads, axis=0) for part in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(shape.head_dim))
    scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
    out = scipy.special.softmax(scores, axis=-1) @ v
    return out.swapaxes(0, 1).reshape(len(x), query_width) @ block.output.T


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """Turn [..., N, D]: pair (2i, 2i + 1) of token n by n * base ** (-2i / D)."""
    seqlen, head_dim = x.shape[-2:]
    angles = np.outer(np.arange(seqlen), base ** (-np.arange(0, head_dim, 2) / head_dim))
    pairs = np.ascontiguousarray(x).view(np.complex64) * np.exp(1j * angles).astype(np.complex64)
    return pairs.view(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight
