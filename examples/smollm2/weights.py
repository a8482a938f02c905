"""The numbers that make a Llama: its extents and its matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

Array = Any  # numpy.ndarray or cupy.ndarray


@dataclass(frozen=True)
class Shape:
    """The extents of a model, and the two constants that it was trained with."""

    vocabulary: int
    width: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the feed-forward layer
    context: int  # the most tokens of a sequence
    rope_base: float
    rms_eps: float

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")


@dataclass(frozen=True)
class Block:
    """One layer. Matrices are [outputs, inputs]; ``qkv`` and ``gate_up`` hold matrices of equal input as one."""

    attention_norm: Array  # [width]
    qkv: Array  # [(heads + 2 kv_heads) * head_dim, width]
    output: Array  # [width, heads * head_dim]
    ffn_norm: Array  # [width]
    gate_up: Array  # [2 * inner, width]
    down: Array  # [width, inner]


@dataclass(frozen=True)
class Weights:
    """All weights, float32. The embedding is the matrix of the logits, too."""

    shape: Shape
    embedding: Array  # [vocabulary, width]
    blocks: tuple[Block, ...]
    norm: Array  # [width]

    @property
    def count(self) -> int:
        """Number of numbers that were trained."""
        arrays = [getattr(block, f.name) for block in self.blocks for f in fields(Block)]
        return sum(x.size for x in (self.embedding, *arrays, self.norm))

    def to(self, asarray: Callable[[Array], Array]) -> Weights:
        """Copy the weights through ``asarray``: ``cupy.asarray`` brings them to the GPU."""
        blocks = tuple(Block(*(asarray(getattr(block, f.name)) for f in fields(Block))) for block in self.blocks)
        return Weights(self.shape, asarray(self.embedding), blocks, asarray(self.norm))
