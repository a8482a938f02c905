"""Each rank has some of the blocks; the batch goes through them in pieces, one behind another (Huang et al., 2018)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from cuattn.distributed import Group
from examples.char_transformer import layers
from examples.char_transformer.model import Shape

from .common import Arrays, one_rank, share

MICRO_BATCHES = 4


def bubble(stages: int, pieces: int) -> Fraction:
    """Return the part of the time in which a stage waits: (p - 1) / (m + p - 1)."""
    return Fraction(stages - 1, pieces + stages - 1)


def idle_ticks(group: Group, pieces: int) -> Fraction:
    """Return the same from the schedule: piece i is at stage r in tick r + i, and the last stage ends the pass."""
    busy = {group.rank + piece for piece in range(pieces)}
    ticks = group.size + pieces - 1
    return Fraction(ticks - len(busy), ticks)


def pipeline(shape: Shape, pieces: int = MICRO_BATCHES):
    """Return the step: all pieces forward, then all backward (GPipe). Handing out gradients is not counted."""

    def step(group: Group, weights: Arrays, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        model = one_rank(weights, shape)
        first, last = group.rank == 0, group.rank == group.size - 1
        blocks = share(shape.blocks, group)
        grads = {name: np.zeros_like(w) for name, w in weights.items()}
        loss, saved = 0.0, []
        parts = list(zip(np.array_split(tokens, pieces), np.array_split(targets, pieces), strict=True))

        for number, (inputs, wanted) in enumerate(parts):
            extents = (*inputs.shape, shape.width)
            if first:
                x, of_characters = layers.embedding(inputs, weights["characters"])
                x = x + weights["positions"][: inputs.shape[1]]
            else:
                x, of_characters = _receive(group, extents, group.rank - 1), None
            of_blocks = []
            for block in range(blocks.start, blocks.stop):
                x, of_block = model._block(x, block, {})
                of_blocks.append(of_block)
            if last:
                weight = len(inputs) / len(tokens)
                x, of_norm = layers.rms_norm(x, weights["norm"])
                logits, of_logits = layers.linear(x, weights["logits"])
                part, of_loss = layers.cross_entropy(logits, wanted)
                loss += float(part) * weight
                saved.append((of_characters, of_blocks, (of_norm, of_logits, of_loss, weight)))
            else:
                _send(group, x, group.rank + 1)
                saved.append((of_characters, of_blocks, extents))
            group.traffic.note("compute", group.rank + number, "forward")

        for of_characters, of_blocks, rest in reversed(saved):
            own: Arrays = {}
            if last:
                of_norm, of_logits, of_loss, weight = rest
                dx, own["logits"] = layers.linear_backward(layers.cross_entropy_backward(of_loss) * weight, of_logits)
                dx, own["norm"] = layers.rms_norm_backward(dx, of_norm)
            else:
                dx = _receive(group, rest, group.rank + 1)
            for block in reversed(range(blocks.start, blocks.stop)):
                dx = model._block_backward(dx, block, of_blocks[block - blocks.start], own)
            if first:
                own["positions"] = np.zeros_like(weights["positions"])
                own["positions"][: dx.shape[1]] = dx.sum(axis=0)
                own["characters"] = layers.embedding_backward(dx, of_characters)
            else:
                _send(group, dx, group.rank - 1)
            for name, x in own.items():
                grads[name] += x

        sent = group.traffic.bytes
        total = float(group.all_reduce(np.array([loss]))[0])
        whole = {name: group.all_reduce(x) for name, x in grads.items()}
        group.traffic.reset()
        group.traffic.count("pipeline", sent)
        return total, whole

    return step


def _send(group: Group, x: np.ndarray, rank: int) -> None:
    group.send_recv(np.ascontiguousarray(x), rank, None, None)


def _receive(group: Group, extents: tuple[int, ...], rank: int) -> np.ndarray:
    return group.send_recv(None, None, np.empty(extents), rank)
