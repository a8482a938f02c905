"""Shapes of transformers, and those of models that people know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cuattn.errors import ArgumentError
from cuattn.estimate.numbers import count, named

__all__ = ["MODELS", "Config", "model"]


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of a transformer, as far as its costs depend on it.

    Attributes
    ----------
    hidden, layers, heads : int
        Width, blocks, query heads.
    kv_heads, head_dim, ffn : int
        Left out: `heads`, `hidden` / `heads`, 4 `hidden`.
    gated : bool
        Three matrices in the feed-forward network, as in SwiGLU, instead of two.
    bias : bool or "qkv"
        Whether products have biases; "qkv": those of queries, keys and values alone.
    vocab : int
        Rows of the embedding. 0: the layers alone are meant, with no embedding and no norm around them.
    tied : bool
        Whether the last product is with the embedding itself.
    norm : {"layer", "rms"}
        With a weight and a bias, or a weight alone.
    norms : int
        Norms of a layer: two, four where the outputs of both halves have one as well.
    positions, token_types : int
        Rows of learned embeddings of positions and of token types.
    pooler : bool
        A square product with a bias on top, as in BERT.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    gated: bool = False
    bias: bool | Literal["qkv"] = True
    vocab: int = 0
    tied: bool = True
    norm: Literal["layer", "rms"] = "layer"
    norms: int = 2
    positions: int = 0
    token_types: int = 0
    pooler: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads"):
            self._set(name, count(name, getattr(self, name), 1))
        for name in ("vocab", "norms", "positions", "token_types"):
            self._set(name, count(name, getattr(self, name)))
        if self.head_dim is None and self.hidden % self.heads:
            raise ArgumentError(f"hidden is {self.hidden}, no multiple of {self.heads} heads; head_dim says their size")
        defaults = {"kv_heads": self.heads, "head_dim": self.hidden // self.heads, "ffn": 4 * self.hidden}
        for name, default in defaults.items():
            given = getattr(self, name)
            self._set(name, default if given is None else count(name, given, 1))
        if self.heads % self.num_kv_heads:
            raise ArgumentError(f"heads is {self.heads}, no multiple of kv_heads, {self.kv_heads}")
        if self.bias not in (True, False, "qkv"):
            raise ArgumentError(f"bias is {self.bias!r}; allowed are True, False, 'qkv'")
        if self.norm not in ("layer", "rms"):
            raise ArgumentError(f"norm is {self.norm!r}; allowed are 'layer', 'rms'")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def query_width(self) -> int:
        """Numbers of a token in all query heads."""
        return self.heads * (self.head_dim or 0)

    @property
    def kv_width(self) -> int:
        """Numbers of a token in all heads of keys, or of values."""
        return self.num_kv_heads * (self.head_dim or 0)

    @property
    def ffn_width(self) -> int:
        """Width between the products of the feed-forward network."""
        return 4 * self.hidden if self.ffn is None else self.ffn


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any) -> Config:
    """A shape of the kind of Llama: RMS norms, a gated network, no biases, an own last product."""
    shape = {"kv_heads": kv_heads, "ffn": ffn, "vocab": vocab, "gated": True, "bias": False, "tied": False}
    return Config(hidden, layers, heads, norm="rms", **{**shape, **more})


#: By the names that their makers gave them.
MODELS: dict[str, Config] = {
    "SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 49152, tied=True),
    "MiniLM": Config(384, 6, 12, vocab=30522, positions=512, token_types=2, pooler=True),
    "BERT-base": Config(768, 12, 12, vocab=30522, positions=512, token_types=2, pooler=True),
    "GPT-2": Config(768, 12, 12, vocab=50257, positions=1024),
    "Llama-2-7B": _llama(4096, 32, 32, 32, 11008, 32000),
    "Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256),
    "Qwen2.5-7B": _llama(3584, 28, 28, 4, 18944, 152064, bias="qkv"),
    "Mistral-7B": _llama(4096, 32, 32, 8, 14336, 32000),
    "Gemma-2-9B": _llama(3584, 42, 16, 8, 14336, 256000, head_dim=256, tied=True, norms=4),
}


def model(name: str | Config) -> Config:
    """Return the shape of a model by its name, in capitals or not; a `Config` is returned as it is.

    >>> model("gpt-2").hidden
    768
    """
    return name if isinstance(name, Config) else named("model", name, MODELS)
