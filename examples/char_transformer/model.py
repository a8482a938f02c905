"""The transformer: pre-norm blocks between an embedding and a linear map to the logits of the next character.

Shapes: B sequences, N characters each, C = width, H heads, V characters in the vocabulary.

Positions enter in one of three ways: as a learned vector for each, added to that of the character; as sines and cosines
of them, added likewise (Vaswani et al., 2017); or not here, but by turning q and k ("rope": `KernelAttention`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from . import layers
from .attention import Attention
from .layers import Array, Saved, array_module

Arrays = dict[str, Array]
Positions = Literal["learned", "sincos", "rope"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `context` is the longest sequence; `width` is a multiple of `heads`.

    Attention takes `gates` numbers for each token besides q, k and v.
    """

    vocabulary: int
    context: int = 64
    width: int = 64
    heads: int = 2
    blocks: int = 2
    positions: Positions = "learned"
    gates: int = 0

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is {self.positions!r}; allowed are {', '.join(get_args(Positions))}")
        for name in ("vocabulary", "context", "width", "heads", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


EMBEDDING_STD = 0.1


def sines(context: int, width: int) -> np.ndarray:
    """Return sines and cosines of each position, [context, width], of the size of learned embeddings.

    Column 2i is the sine and 2i + 1 the cosine of ``position · 10000^(-2i / width)`` (Vaswani et al., 2017).
    """
    column = np.arange(width)
    angles = np.arange(context)[:, None] * 10000.0 ** (-(column - column % 2) / width)
    return EMBEDDING_STD * math.sqrt(2) * np.where(column % 2 == 0, np.sin(angles), np.cos(angles))


def initial_weights(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """float32 arrays by name: normal numbers that keep the size of what they multiply, gains of 1."""
    rng = np.random.default_rng(seed)
    c = shape.width
    deep = math.sqrt(2 * shape.blocks)  # so many branches are added to the stream (GPT-2's initialization)
    matrices = {"characters": ((shape.vocabulary, c), EMBEDDING_STD)}
    if shape.positions == "learned":
        matrices["positions"] = ((shape.context, c), EMBEDDING_STD)
    for block in range(shape.blocks):
        matrices[f"{block}.qkv"] = ((c, 3 * c), c**-0.5)
        matrices[f"{block}.out"] = ((c, c), c**-0.5 / deep)
        matrices[f"{block}.expand"] = ((c, 4 * c), c**-0.5)
        matrices[f"{block}.contract"] = ((4 * c, c), (4 * c) ** -0.5 / deep)
        if shape.gates:
            matrices[f"{block}.gates"] = ((c, shape.gates), c**-0.5)
    matrices["logits"] = ((c, shape.vocabulary), c**-0.5 / 4)  # small: the first guess is close to uniform
    weights = {name: rng.normal(0, std, extents).astype(np.float32) for name, (extents, std) in matrices.items()}
    gains = [f"{block}.{norm}" for block in range(shape.blocks) for norm in ("norm_attention", "norm_mlp")]
    return weights | {name: np.ones(c, np.float32) for name in (*gains, "norm")}


class CharTransformer:
    """The model: logits of the next character, and the gradients of their cross entropy.

    Parameters
    ----------
    shape : Shape
    weights : mapping
        Arrays with the names of `initial_weights`, NumPy's or CuPy's; all arithmetic outside of attention has their
        dtype. They are not copied, so that an optimizer may change them in place.
    attention : Attention
        Computes attention and its backward.
    dropout_p, dropout_seed
        Of attention; `cuattn.dropout_mask` says what is kept.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, Array],
        attention: Attention,
        *,
        dropout_p: float = 0.0,
        dropout_seed: int = 0,
    ) -> None:
        self.shape = shape
        self.weights = dict(weights)
        self.attention = attention
        self.dropout_p = dropout_p
        self.dropout_seed = dropout_seed
        characters = self.weights["characters"]
        self.sines = None
        if shape.positions == "sincos":
            self.sines = array_module(characters).asarray(sines(shape.context, shape.width).astype(characters.dtype))

    def logits(self, tokens: np.ndarray) -> Array:
        """Return the logits [B, N, V] for `tokens` [B, N], without dropout."""
        return self._forward(self._checked(tokens), step=None)[0]

    def loss_and_grads(self, tokens: np.ndarray, targets: np.ndarray, step: int = 0) -> tuple[Array, Arrays]:
        """Return the mean cross entropy in nats, and its gradient with respect to each weight, by name.

        `tokens` and `targets` are integers [B, N]. With dropout, each `step` and block has its own mask.
        """
        if np.shape(targets) != np.shape(tokens):
            raise ValueError(f"targets have shape {np.shape(targets)}, tokens {np.shape(tokens)}; they must be equal")
        logits, saved = self._forward(self._checked(tokens), step)
        loss, saved_loss = layers.cross_entropy(logits, self._checked(targets, "targets"))
        return loss, self._backward(layers.cross_entropy_backward(saved_loss), saved)

    def _checked(self, tokens: np.ndarray, name: str = "tokens") -> Array:
        """Return `tokens` where the weights are; refused if they are not indices of what the model knows."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers [batch, seqlen], not {tokens.dtype} {list(tokens.shape)}")
        if not 1 <= tokens.shape[1] <= self.shape.context or not tokens.size:
            shape = list(tokens.shape)
            raise ValueError(
                f"{name} have shape {shape}; this model reads 1 to {self.shape.context} characters at a time"
            )
        if tokens.min() < 0 or tokens.max() >= self.shape.vocabulary:
            raise ValueError(
                f"{name} are {tokens.min()} to {tokens.max()}; the vocabulary is 0 to {self.shape.vocabulary - 1}"
            )
        return array_module(self.weights["characters"]).asarray(tokens)

    def _dropout(self, step: int | None, block: int) -> dict[str, Any]:
        """Return the dropout options of attention: none outside of training."""
        if step is None or not self.dropout_p:
            return {}
        offset = step * self.shape.blocks + block
        return {"dropout_p": self.dropout_p, "dropout_seed": self.dropout_seed, "dropout_offset": offset}

    def _forward(self, tokens: Array, step: int | None) -> tuple[Array, Saved]:
        w = self.weights
        x, saved_characters = layers.embedding(tokens, w["characters"])
        added = w["positions"] if self.shape.positions == "learned" else self.sines
        if added is not None:
            x = x + added[: tokens.shape[1]]
        saved_blocks = []
        for block in range(self.shape.blocks):
            x, saved = self._block(x, block, self._dropout(step, block))
            saved_blocks.append(saved)
        x, saved_norm = layers.rms_norm(x, w["norm"])
        logits, saved_logits = layers.linear(x, w["logits"])
        return logits, (saved_characters, saved_blocks, saved_norm, saved_logits)

    def _backward(self, dlogits: Array, saved: Saved) -> Arrays:
        saved_characters, saved_blocks, saved_norm, saved_logits = saved
        grads: Arrays = {}
        dx, grads["logits"] = layers.linear_backward(dlogits, saved_logits)
        dx, grads["norm"] = layers.rms_norm_backward(dx, saved_norm)
        for block in reversed(range(self.shape.blocks)):
            dx = self._block_backward(dx, block, saved_blocks[block], grads)
        if self.shape.positions == "learned":
            grads["positions"] = array_module(dx).zeros_like(self.weights["positions"])
            grads["positions"][: dx.shape[1]] = dx.sum(axis=0)
        grads["characters"] = layers.embedding_backward(dx, saved_characters)
        return grads

    def _block(self, x: Array, block: int, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        """Compute two branches, each normalized first and added to what it was given."""
        w, width, heads = self.weights, self.shape.width, self.shape.heads
        y, saved_norm_attention = layers.rms_norm(x, w[f"{block}.norm_attention"])
        qkv, saved_qkv = layers.linear(y, w[f"{block}.qkv"])
        qkv = qkv.reshape(*x.shape[:2], 3, heads, width // heads)
        gates, saved_gates = layers.linear(y, w[f"{block}.gates"]) if self.shape.gates else (None, None)
        attended, saved_attention = self.attention.forward(qkv, gates, dropout)
        y, saved_out = layers.linear(attended.reshape(x.shape), w[f"{block}.out"])
        x = x + y

        y, saved_norm_mlp = layers.rms_norm(x, w[f"{block}.norm_mlp"])
        y, saved_expand = layers.linear(y, w[f"{block}.expand"])
        y, saved_gelu = layers.gelu(y)
        y, saved_contract = layers.linear(y, w[f"{block}.contract"])
        saved = (saved_norm_attention, saved_qkv, saved_gates, saved_attention, saved_out)
        return x + y, (*saved, saved_norm_mlp, saved_expand, saved_gelu, saved_contract)

    def _block_backward(self, dx: Array, block: int, saved: Saved, grads: Arrays) -> Array:
        """Return the gradient with respect to the block's input; those of its weights are added to `grads`."""
        saved_norm_attention, saved_qkv, saved_gates, saved_attention, saved_out = saved[:5]
        saved_norm_mlp, saved_expand, saved_gelu, saved_contract = saved[5:]
        dy, grads[f"{block}.contract"] = layers.linear_backward(dx, saved_contract)
        dy = layers.gelu_backward(dy, saved_gelu)
        dy, grads[f"{block}.expand"] = layers.linear_backward(dy, saved_expand)
        dy, grads[f"{block}.norm_mlp"] = layers.rms_norm_backward(dy, saved_norm_mlp)
        dx = dx + dy

        dy, grads[f"{block}.out"] = layers.linear_backward(dx, saved_out)
        dqkv, dgates = self.attention.backward(dy, saved_attention)
        dy, grads[f"{block}.qkv"] = layers.linear_backward(dqkv.reshape(*dx.shape[:2], -1), saved_qkv)
        if self.shape.gates:
            more, grads[f"{block}.gates"] = layers.linear_backward(dgates, saved_gates)
            dy = dy + more
        dy, grads[f"{block}.norm_attention"] = layers.rms_norm_backward(dy, saved_norm_attention)
        return dx + dy
