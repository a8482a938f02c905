"""Each rank has a part of every sequence: a ring carries keys and values (Liu et al., 2023)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.distributed import Group, ring_attention, ring_attention_backward, rope_positions
from examples.char_transformer.kinds import KINDS
from examples.char_transformer.layers import Array, Saved
from examples.char_transformer.model import CharTransformer, Shape

from .common import Arrays, summed


class RingAttention:
    """What the model asks of attention, for the tokens of a rank."""

    def __init__(self, group: Group) -> None:
        self.group, self.kind = group, KINDS["softmax"]

    def forward(self, qkv: Array, gates: Array, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        q, k, v = (qkv[:, :, i] for i in range(3))
        out, lse = ring_attention(q, k, v, self.group, return_lse=True, **dropout)
        return out, (q, k, v, out, lse, dropout)

    def backward(self, dout: Array, saved: Saved) -> tuple[Array, Array]:
        q, k, v, out, lse, dropout = saved
        grads = ring_attention_backward(dout.reshape(out.shape), q, k, v, out, lse, self.group, **dropout)
        return np.stack([grads.dq, grads.dk, grads.dv], axis=2), None


def context_parallel(shape: Shape):
    """Return the step: everything but attention looks at one token at a time; gradients are added up at the end."""

    def step(group: Group, weights: Arrays, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        places = rope_positions(tokens.shape[1], group)
        own = {**weights, "positions": weights["positions"][places]}
        model = CharTransformer(shape, own, RingAttention(group))
        loss, grads = model.loss_and_grads(tokens[:, places], targets[:, places])
        of_places = grads["positions"]
        grads["positions"] = np.zeros_like(weights["positions"])
        grads["positions"][places] = of_places
        return summed(group, float(loss), grads, len(places) / tokens.shape[1])

    return step
