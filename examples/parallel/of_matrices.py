"""Each rank has columns of one matrix and the rows of the next: heads, and hidden units (Shoeybi et al., 2019)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.distributed import Group, heads_of_rank
from examples.char_transformer import layers
from examples.char_transformer.attention import KernelAttention
from examples.char_transformer.layers import Array, Saved
from examples.char_transformer.model import CharTransformer, Shape

from .common import Arrays, share


class TensorParallel(CharTransformer):
    """The model with a rank's heads and hidden units. What a block hands on is summed over ranks, twice each way."""

    def __init__(self, shape: Shape, weights: Arrays, group: Group) -> None:
        self.group = group
        self.heads, _ = heads_of_rank(shape.heads, shape.heads, group)
        self.hidden = share(4 * shape.width, group)
        super().__init__(shape, self._own(shape, weights), KernelAttention(np.float64))

    def _own(self, shape: Shape, weights: Arrays) -> Arrays:
        """Return the rank's part of each weight."""
        own = dict(weights)
        for name, w in weights.items():
            kind = name.partition(".")[2]
            if kind == "qkv":  # columns
                own[name] = w.reshape(shape.width, 3, shape.heads, -1)[:, :, self.heads].reshape(shape.width, -1)
            elif kind == "out":  # rows
                own[name] = w.reshape(shape.heads, -1, shape.width)[self.heads].reshape(-1, shape.width)
            elif kind == "expand":
                own[name] = w[:, self.hidden]
            elif kind == "contract":
                own[name] = w[self.hidden]
        return own

    def whole(self, grads: Arrays, like: Arrays) -> Arrays:
        """Return gradients of all weights, zeros where another rank has the numbers."""
        shape, found = self.shape, dict(grads)
        for name, x in grads.items():
            kind = name.partition(".")[2]
            if kind in ("qkv", "out", "expand", "contract"):
                found[name] = np.zeros_like(like[name])
            if kind == "qkv":
                target = found[name].reshape(shape.width, 3, shape.heads, -1)
                target[:, :, self.heads] = x.reshape(shape.width, 3, -1, shape.width // shape.heads)
            elif kind == "out":
                found[name].reshape(shape.heads, -1, shape.width)[self.heads] = x.reshape(
                    -1, shape.width // shape.heads, shape.width
                )
            elif kind == "expand":
                found[name][:, self.hidden] = x
            elif kind == "contract":
                found[name][self.hidden] = x
        return found

    def _block(self, x: Array, block: int, dropout: dict[str, Any]) -> tuple[Array, Saved]:
        w, head_dim = self.weights, self.shape.width // self.shape.heads
        y, saved_norm_attention = layers.rms_norm(x, w[f"{block}.norm_attention"])
        qkv, saved_qkv = layers.linear(y, w[f"{block}.qkv"])
        qkv = qkv.reshape(*x.shape[:2], 3, -1, head_dim)
        attended, saved_attention = self.attention.forward(qkv, None, dropout)
        y, saved_out = layers.linear(attended.reshape(*x.shape[:2], -1), w[f"{block}.out"])
        x = x + self.group.all_reduce(y)

        y, saved_norm_mlp = layers.rms_norm(x, w[f"{block}.norm_mlp"])
        y, saved_expand = layers.linear(y, w[f"{block}.expand"])
        y, saved_gelu = layers.gelu(y)
        y, saved_contract = layers.linear(y, w[f"{block}.contract"])
        saved = (saved_norm_attention, saved_qkv, None, saved_attention, saved_out)
        return x + self.group.all_reduce(y), (*saved, saved_norm_mlp, saved_expand, saved_gelu, saved_contract)

    def _block_backward(self, dx: Array, block: int, saved: Saved, grads: Arrays) -> Array:
        saved_norm_attention, saved_qkv, _, saved_attention, saved_out = saved[:5]
        saved_norm_mlp, saved_expand, saved_gelu, saved_contract = saved[5:]
        dy, grads[f"{block}.contract"] = layers.linear_backward(dx, saved_contract)
        dy = layers.gelu_backward(dy, saved_gelu)
        dy, grads[f"{block}.expand"] = layers.linear_backward(dy, saved_expand)
        dy, grads[f"{block}.norm_mlp"] = layers.rms_norm_backward(self.group.all_reduce(dy), saved_norm_mlp)
        dx = dx + dy

        dy, grads[f"{block}.out"] = layers.linear_backward(dx, saved_out)
        dqkv, _ = self.attention.backward(dy, saved_attention)
        dy, grads[f"{block}.qkv"] = layers.linear_backward(dqkv.reshape(*dx.shape[:2], -1), saved_qkv)
        dy = self.group.all_reduce(dy)
        dy, grads[f"{block}.norm_attention"] = layers.rms_norm_backward(dy, saved_norm_attention)
        return dx + dy


def tensor_parallel(shape: Shape):
    """Return the step. The whole gradients, for the optimizer that all ways share, are put together and not counted."""

    def step(group: Group, weights: Arrays, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        model = TensorParallel(shape, weights, group)
        loss, grads = model.loss_and_grads(tokens, targets)
        sent = group.traffic.bytes
        whole = model.whole(grads, weights)
        for name in whole:
            if name.partition(".")[2] in ("qkv", "out", "expand", "contract"):
                whole[name] = group.all_reduce(whole[name])
        group.traffic.reset()
        group.traffic.count("tensor parallel", sent)
        return float(loss), whole

    return step
