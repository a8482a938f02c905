"""Text to token numbers and back: the byte-level BPE that the GGUF file describes, and the form of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

CONTROL = 3  # the token_type of "<|im_start|>" and its like, which never come out of a text's own characters
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def tokenizer(tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int]) -> tokenizers.Tokenizer:
    """Make a tokenizer of a GGUF file's lists, whose ``tokenizer.ggml.pre`` is smollm: every digit is a word.

    The rest of a text is split as GPT-2 does it, and every word becomes bytes, which `merges` join in their order.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    result = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in merges])  # type: ignore[misc]
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind == CONTROL
        ]
    )
    return result


def prompt(question: str, system: str = SYSTEM) -> str:
    """Put a question in the form that the model was trained on; `system` tells it who it is."""
    turns = {"system": system, "user": question}
    told = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns.items())
    return f"{told}<|im_start|>assistant\n"
