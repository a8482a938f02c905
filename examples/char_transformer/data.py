"""The text, as numbers, and the batches of it."""

from __future__ import annotations

import codecs
import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class TextError(ValueError):
    """A text that cannot be read or is too short, or a character that is not in it."""


def zen_of_python() -> str:
    """Return the text that every Python brings: the module `this` prints it when imported, and keeps it in rot13."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not a UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True)
class Corpus:
    """A text, and its characters in order: token t is ``characters[t]``."""

    text: str
    characters: str

    @classmethod
    def of(cls, text: str) -> Corpus:
        return cls(text, "".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int64 [len(text)]."""
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise TextError(f"{unknown[0]!r} does not occur in the text that the model learns")
        return np.array([self.characters.index(character) for character in text], np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.characters[token] for token in tokens)


class Batches:
    """Random excerpts of a text, the same ones for the same seed.

    Parameters
    ----------
    tokens : int array [length]
    batch_size, seqlen : int
        A batch is `batch_size` excerpts of `seqlen` characters, and the character that follows each of them.
    seed : int
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seqlen: int, seed: int) -> None:
        if tokens.size <= seqlen:
            raise TextError(f"the text has {tokens.size} characters; at least {seqlen + 1} are needed")
        self.tokens = tokens
        self.batch_size = batch_size
        self.seqlen = seqlen
        self.rng = np.random.default_rng(seed)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw tokens and targets, both [batch_size, seqlen]; a target is the token that follows."""
        starts = self.rng.integers(self.tokens.size - self.seqlen, size=(self.batch_size, 1))
        excerpts = self.tokens[starts + np.arange(self.seqlen + 1)]
        return excerpts[:, :-1], excerpts[:, 1:]
