"""Parameters, multiplications and cached bytes of a whole transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cuattn.errors import ArgumentError
from cuattn.estimate.models import Config, model
from cuattn.estimate.numbers import count, named

__all__ = [
    "FORMATS",
    "Format",
    "flops",
    "kv_cache_bytes",
    "layer_parameters",
    "macs",
    "parameters",
    "weight_bytes",
]

Phase = Literal["prefill", "decode", "training"]

SCALE_BYTES = 4  # of the float32 scales of 8-bit formats


@dataclass(frozen=True, slots=True)
class Format:
    """How a number is stored: its bits, and how many numbers share a scale of one byte (0: none do).

    `scaled`: 8 bits with a float32 scale of every slot and head, of every head, or of all.
    """

    bits: int
    block_size: int = 0
    scaled: bool = False

    def row_bytes(self, numbers: int) -> int:
        """Bytes of so many neighboring numbers, with the scales that blocks of them share."""
        blocks = -(-numbers // self.block_size) if self.block_size else 0
        return -(-numbers * self.bits // 8) + blocks


#: By the names that ``kv_format=`` and ``dtype=`` take.
FORMATS: dict[str, Format] = {
    "float64": Format(64),
    "float32": Format(32),
    "float16": Format(16),
    "bfloat16": Format(16),
    "e4m3fn": Format(8, scaled=True),
    "e5m2": Format(8, scaled=True),
    "int8": Format(8, scaled=True),
    "nvfp4": Format(4, block_size=16),
    "mxfp4": Format(4, block_size=32),
}


def _norm_parameters(config: Config) -> int:
    return config.hidden * (2 if config.norm == "layer" else 1)


def layer_parameters(config: Config | str) -> int:
    """Count the parameters of one layer: 12 H² + 13 H with the defaults of `Config`.

    >>> layer_parameters(Config(768, 1, 12)) == 12 * 768**2 + 13 * 768
    True
    """
    of = model(config)
    matrices = 3 if of.gated else 2
    weights = 2 * of.hidden * (of.query_width + of.kv_width) + matrices * of.hidden * of.ffn_width
    biases = of.query_width + 2 * of.kv_width if of.bias else 0
    if of.bias is True:
        biases += of.hidden + (matrices - 1) * of.ffn_width + of.hidden
    return weights + biases + of.norms * _norm_parameters(of)


def parameters(config: Config | str) -> int:
    """Count the parameters of a model: those of its layers, of its embeddings, and of what stands around them.

    A norm stands on top of the layers, or, in models like BERT, on the embeddings. Without a vocabulary the layers
    alone are counted.

    Parameters
    ----------
    config : Config or str
        A shape, or the name of a model in `MODELS`.

    Returns
    -------
    int

    Examples
    --------
    >>> parameters("GPT-2")
    124439808
    """
    of = model(config)
    total = of.layers * layer_parameters(of)
    if of.vocab:
        rows = of.vocab * (1 if of.tied else 2) + of.positions + of.token_types
        total += rows * of.hidden + _norm_parameters(of)
    if of.pooler:
        total += of.hidden * (of.hidden + 1)
    return total


def weight_bytes(config: Config | str, format: str = "bfloat16") -> int:
    """Count the bytes of all parameters in a format, without scales of whole matrices.

    >>> weight_bytes("GPT-2", "float32") == 4 * parameters("GPT-2")
    True
    """
    return named("format", format, FORMATS).row_bytes(parameters(config))


def macs(
    config: Config | str, batch: int, seqlen: int, *, causal: bool = False, phase: Phase = "prefill", logits: int = 0
) -> int:
    """Count the multiplications, each with an addition, of the products of a model: 12 B L H² + 2 B L² H a layer.

    Norms, activations, softmax and rotation are left out: they are no products. A layer of another shape than the
    default one has as many a token as its matrices have elements, instead of 12 H².

    Parameters
    ----------
    config : Config or str
        A shape, or the name of a model in `MODELS`.
    batch, seqlen : int
        Sequences, and tokens of each.
    causal : bool
        Tokens see those before them and themselves: L (L + 1) / 2 pairs instead of L².
    phase : {"prefill", "decode", "training"}
        All tokens at once; one more token, the last of `seqlen`, which sees them all; or forward and backward, three
        times "prefill".
    logits : int
        Tokens of each sequence that are multiplied with the vocabulary.

    Returns
    -------
    int

    Raises
    ------
    ArgumentError
        A number is negative or no whole number, an unknown model or phase.

    Examples
    --------
    >>> macs(Config(64, 1, 1), batch=1, seqlen=10) == 12 * 10 * 64**2 + 2 * 10**2 * 64
    True
    """
    of = model(config)
    batch, seqlen, logits = count("batch", batch), count("seqlen", seqlen), count("logits", logits)
    tokens, pairs = seqlen, seqlen * seqlen
    if phase == "decode":
        tokens, pairs = min(seqlen, 1), seqlen
    elif phase not in ("prefill", "training"):
        raise ArgumentError(f"phase is {phase!r}; allowed are 'prefill', 'decode', 'training'")
    elif causal:
        pairs = seqlen * (seqlen + 1) // 2
    matrices = 2 * of.hidden * (of.query_width + of.kv_width) + (3 if of.gated else 2) * of.hidden * of.ffn_width
    total = of.layers * (tokens * matrices + 2 * pairs * of.query_width) + logits * of.vocab * of.hidden
    return batch * total * (3 if phase == "training" else 1)


def flops(
    config: Config | str, batch: int, seqlen: int, *, causal: bool = False, phase: Phase = "prefill", logits: int = 0
) -> int:
    """Count floating-point operations: twice `macs`, of the same arguments.

    >>> flops("GPT-2", 1, 128) == 2 * macs("GPT-2", 1, 128)
    True
    """
    return 2 * macs(config, batch, seqlen, causal=causal, phase=phase, logits=logits)


def kv_cache_bytes(
    config: Config | str,
    batch: int,
    seqlen: int,
    format: str = "bfloat16",
    *,
    scales: Literal["slot", "head", "tensor"] = "slot",
) -> int:
    """Count the bytes of cached keys and values: 2 B L layers kv_heads D bytes, and what scales take beside them.

    Parameters
    ----------
    config : Config or str
        A shape, or the name of a model in `MODELS`.
    batch, seqlen : int
        Sequences, and tokens of each.
    format : str
        One of `FORMATS`. Those of 4 bits have a byte for each 16 or 32 neighbors of a head.
    scales : {"slot", "head", "tensor"}
        What has a float32 scale in the 8-bit formats: every token and head, as in a `cuattn.PagedKVCache` that was
        given none; every head of a layer; or the layer.

    Returns
    -------
    int

    Examples
    --------
    >>> kv_cache_bytes("Llama-2-7B", 1, 4096, "float16") == 2 * 4096 * 32 * 32 * 128 * 2
    True
    """
    of, row = model(config), named("format", format, FORMATS)
    batch, seqlen = count("batch", batch), count("seqlen", seqlen)
    heads = 2 * of.layers * of.num_kv_heads
    rows = batch * seqlen * heads
    if scales not in ("slot", "head", "tensor"):
        raise ArgumentError(f"scales is {scales!r}; allowed are 'slot', 'head', 'tensor'")
    num_scales = {"slot": rows, "head": heads, "tensor": 2 * of.layers}[scales] if row.scaled else 0
    return rows * row.row_bytes(of.head_dim or 0) + num_scales * SCALE_BYTES
