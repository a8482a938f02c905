"""The model on cuattn: keys and values stay in a paged cache, and only new tokens are computed.

T new tokens of all sequences, one sequence behind another; H query and G key/value heads of D elements. With NumPy's
arrays the kernels run on the host executor, with CuPy's on a GPU. The code is the same: only operators, methods and
NumPy's elementwise functions appear, which CuPy's arrays take over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

import cuattn
from cuattn.kv.caches.sequence import Sequence as CachedSequence
from cuattn.kv.caches.step import Step

from .weights import Array, Weights

# (layer, x W_qkv [T, (H + 2G) D]) -> [T, H, D]
Attention = Callable[[int, Array], Array]


class CachedModel:
    """A model that gives logits of the next token of some sequences, whose earlier tokens are in `cache`.

    Parameters
    ----------
    weights : Weights
        In arrays of `array_module`, as the pages of `cache` are.
    cache : cuattn.PagedKVCache
        Of as many layers, key/value heads and elements a head as the model has.
    array_module : module
        numpy or cupy.
    """

    def __init__(self, weights: Weights, cache: cuattn.PagedKVCache, array_module: ModuleType) -> None:
        self.weights = weights
        self.cache = cache
        self.array_module = array_module
        shape = weights.shape
        # llama's GGUF files hold W_q and W_k with their rows in the order of interleaved pairs.
        self.rope = cuattn.Rotary(base=shape.rope_base, interleaved=True)
        self.heads = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads}

    def logits(self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]]) -> Array:
        """Return logits [len(sequences), vocabulary] after each sequence's new `tokens`, which the cache takes in.

        Sequences that were all empty are prompts, and see only what is passed here: `attention_varlen`. With any other
        among them, all of them read the pages, whether for one new token or for the rest of a prompt.
        """
        counts = [len(new) for new in tokens]
        prompts = all(sequence.length == 0 for sequence in sequences)
        with self.cache.reserve(sequences, counts, tokens=tokens) as step:  # an error on the way aborts it
            attention = self.attention_of_prompts(step) if prompts else self.attention_of_pages(step)
            x = self.layers(self.array_module.asarray(np.concatenate(tokens)), attention)
            last = x[self.array_module.asarray(step.cu_seqlens[1:] - 1)]
            logits = self.rms_norm(last, self.weights.norm) @ self.weights.embedding.T
            step.commit()
        return logits

    def attention_of_prompts(self, step: Step) -> Attention:
        """Attend among new tokens alone; q and k are turned where the projection is taken apart."""
        cu_seqlens = step.cu_seqlens

        def attention(layer: int, qkv: Array) -> Array:
            q, k, v = cuattn.split_qkv(qkv, rope=self.rope, cu_seqlens=cu_seqlens, **self.heads)
            step.append(layer, k, v)
            return cuattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)

        return attention

    def attention_of_pages(self, step: Step) -> Attention:
        """Attend to all that is cached; k is turned on its way into the pages, q by the kernel that reads them.

        The work is the same in every layer, and planned once.
        """
        plan = cuattn.plan_decode(
            step.seqlens_k,
            cu_seqlens_q=step.cu_seqlens,
            head_dim=self.weights.shape.head_dim,
            dtype=np.float32,
            array_module=self.array_module,
            **self.heads,
        )

        def attention(layer: int, qkv: Array) -> Array:
            q, k, v = cuattn.split_qkv(qkv, **self.heads)
            step.append(layer, k, v, rope=self.rope)
            return step.attend(layer, q, rope=self.rope, plan=plan)

        return attention

    def layers(self, tokens: Array, attention: Attention) -> Array:
        """Return the states [T, width] behind the last layer."""
        x = self.weights.embedding[tokens]
        for layer, block in enumerate(self.weights.blocks):
            attended = attention(layer, self.rms_norm(x, block.attention_norm) @ block.qkv.T)
            x = x + attended.reshape(len(x), -1) @ block.output.T
            inner = self.rms_norm(x, block.ffn_norm) @ block.gate_up.T
            gate, up = inner[:, : self.weights.shape.inner], inner[:, self.weights.shape.inner :]
            x = x + (silu(gate) * up) @ block.down.T
        return x

    def rms_norm(self, x: Array, weight: Array) -> Array:
        mean = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + np.float32(self.weights.shape.rms_eps)) * weight


def silu(x: Array) -> Array:
    """Return x / (1 + e^-x), as a hyperbolic tangent, which cannot overflow."""
    half = np.float32(0.5)
    return half * x * (1 + np.tanh(half * x))
