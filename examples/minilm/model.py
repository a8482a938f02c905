"""The BERT encoder in NumPy, with the attention passed in as a function.

Shapes: B sentences, N tokens, H heads, D = hidden / H; T tokens of a batch that are no padding. Nothing is masked. A
padded batch either attends sentence by sentence, to views that end where the sentence ends, and everything else is
computed for the padding, too; or the padding is removed once, before the first layer, every layer works on the T tokens
alone, and it is restored behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

import cuattn

# (q, k, v), each [B, N, H, D], any strides -> [B, N, H, D]
Attention = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# (q, k, v, plan), each array [T, H, D], any strides -> [T, H, D]
PackedAttention = Callable[[np.ndarray, np.ndarray, np.ndarray, cuattn.PaddingPlan], np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Token numbers of some sentences, [B, N], and how many of each row are real; the rest is padding."""

    tokens: np.ndarray
    lengths: tuple[int, ...]
    sentences: tuple[int, ...]  # the row of the result that each row of the batch belongs to

    @property
    def mask(self) -> np.ndarray:
        """The mask [B, N], True at the real tokens."""
        return np.arange(self.tokens.shape[1]) < np.array(self.lengths)[:, None]

    @property
    def padded(self) -> bool:
        return any(length != self.tokens.shape[1] for length in self.lengths)


class Encoder:
    """Sentence embeddings: token numbers in, unit vectors out.

    Parameters
    ----------
    config : mapping
        The model's ``config.json``.
    weights : mapping
        Arrays by their names in ``model.safetensors``.
    attention : callable
        ``attention(q, k, v)`` on arrays [B, N, H, D] of `attention_dtype`; may be given strided views.
    packed_attention : callable, optional
        ``packed_attention(q, k, v, plan)`` on arrays [T, H, D] of the tokens that ``plan`` says. With it, batches are
        computed without their padding, and `attention` is not used.
    dtype : dtype
        Of all arithmetic outside the attention.
    attention_dtype : dtype, optional
        What q, k and v are rounded to; `dtype` if not given.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        weights: Mapping[str, np.ndarray],
        attention: Attention,
        *,
        dtype: type[np.floating],
        attention_dtype: type[np.floating] | None = None,
        packed_attention: PackedAttention | None = None,
    ) -> None:
        self.num_layers = int(str(config["num_hidden_layers"]))
        self.num_heads = int(str(config["num_attention_heads"]))
        self.eps = float(str(config["layer_norm_eps"]))
        self.attention = attention
        self.packed_attention = packed_attention
        self.tokens_computed = 0  # rows that went through the layers, padding included where it did
        self.attention_dtype = dtype if attention_dtype is None else attention_dtype
        self.dtype = dtype
        self.weights = {
            name: array.astype(dtype) for name, array in weights.items() if np.issubdtype(array.dtype, np.floating)
        }
        for layer in range(self.num_layers):  # one matrix for all three: q, k and v are then strided views of one array
            prefix = f"encoder.layer.{layer}.attention.self"
            for kind in ("weight", "bias"):
                parts = [self.weights.pop(f"{prefix}.{name}.{kind}") for name in ("query", "key", "value")]
                self.weights[f"{prefix}.qkv.{kind}"] = np.concatenate(parts)

    def embed(self, batches: Sequence[Batch], progress: Callable[[Batch], None] = lambda batch: None) -> np.ndarray:
        """Embed all the sentences in `batches`, [sentences, hidden], each vector of length 1."""
        width = self.weights["embeddings.LayerNorm.bias"].size
        embeddings = np.empty((sum(len(batch.sentences) for batch in batches), width), self.dtype)
        for batch in batches:
            hidden = self.hidden_states(batch)
            for row, (length, sentence) in enumerate(zip(batch.lengths, batch.sentences, strict=True)):
                mean = hidden[row, :length].mean(axis=0)
                embeddings[sentence] = mean / np.sqrt(np.sum(mean * mean))
            progress(batch)
        return embeddings

    def hidden_states(self, batch: Batch) -> np.ndarray:
        """Return the last layer's states, [B, N, hidden]; rows beyond a sentence's length have no meaning."""
        if self.packed_attention is None:
            positions = np.arange(batch.tokens.shape[1])
            return self.layers(batch.tokens, positions, lambda q, k, v: self.attend(q, k, v, batch))
        attention, plan = self.packed_attention, cuattn.padding_plan(batch.mask)
        tokens = cuattn.remove_padding(batch.tokens, plan)
        x = self.layers(tokens, plan.indices % plan.seqlen, lambda q, k, v: attention(q, k, v, plan))
        return cuattn.restore_padding(x, plan)

    def layers(self, tokens: np.ndarray, positions: np.ndarray, attention: Attention) -> np.ndarray:
        """Return the states [*tokens.shape, hidden] behind the last layer; q, k and v are [*tokens.shape, H, D]."""
        w = self.weights
        self.tokens_computed += tokens.size
        x = w["embeddings.word_embeddings.weight"][tokens]
        x = x + w["embeddings.position_embeddings.weight"][positions]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self.layer_norm(x, "embeddings.LayerNorm")
        for layer in range(self.num_layers):
            prefix = f"encoder.layer.{layer}"
            qkv = self.linear(x, f"{prefix}.attention.self.qkv").astype(self.attention_dtype)
            qkv = qkv.reshape(*tokens.shape, 3, self.num_heads, x.shape[-1] // self.num_heads)
            attended = attention(*(qkv[..., i, :, :] for i in range(3))).astype(self.dtype).reshape(x.shape)
            attended = self.linear(attended, f"{prefix}.attention.output.dense")
            x = self.layer_norm(x + attended, f"{prefix}.attention.output.LayerNorm")
            inner = gelu(self.linear(x, f"{prefix}.intermediate.dense"))
            x = self.layer_norm(x + self.linear(inner, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm")
        return x

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
        """Attend within each sentence of a batch, [B, N, H, D]; zeros in the padding."""
        if not batch.padded:
            return self.attention(q, k, v)
        out = np.zeros(q.shape, self.dtype)
        for row, length in enumerate(batch.lengths):
            part = (slice(row, row + 1), slice(0, length))
            out[part] = self.attention(q[part], k[part], v[part])
        return out

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(centred * centred, axis=-1, keepdims=True)
        unit = centred / np.sqrt(variance + self.dtype(self.eps))
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact GELU, x·Φ(x)."""
    half = x.dtype.type(0.5)
    return half * x * (1 + scipy.special.erf(x * np.sqrt(half)))
