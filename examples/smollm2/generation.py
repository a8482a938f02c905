"""Generate answers: several requests in one batch, which may arrive while others are being answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .model import CachedModel
from .plain import PlainModel
from .weights import Array

Choose = Callable[[np.ndarray], int]  # logits [vocabulary] -> the next token


def likeliest(logits: np.ndarray) -> int:
    return int(logits.argmax())


def sampler(temperature: float, seed: Sequence[int]) -> Choose:
    """Make a function that draws tokens from softmax(logits / temperature), the same ones for the same `seed`."""
    rng = np.random.default_rng(seed)
    # The largest of logits plus Gumbel noise is distributed as their softmax: no sum, no exponential (Gumbel, 1954).
    return lambda logits: int((logits / temperature + rng.gumbel(size=logits.shape)).argmax())


@dataclass(eq=False)
class Request:
    """A prompt, and the answer as far as it goes."""

    prompt: list[int]
    choose: Choose = likeliest
    arrival: int = 0  # the number of model steps before it
    sequence: Any = None  # of the cache, from its arrival on
    from_cache: int = 0  # tokens of the prompt that the cache held on its arrival
    answer: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # that each token of the answer was chosen by

    @property
    def new(self) -> list[int]:
        """Return the tokens that the cache does not hold yet: the prompt, or the latest token of the answer."""
        return [*self.prompt, *self.answer][self.sequence.length :]

    def take(self, logits: np.ndarray) -> None:
        self.answer.append(self.choose(logits))
        self.logits.append(logits)

    def ended(self, count: int, end: int) -> bool:
        return len(self.answer) >= count or self.answer[-1:] == [end]


@dataclass
class Speed:
    """New tokens that went through the model, and seconds: of batches of prompts, and of all other steps."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    decoded_tokens: int = 0
    decode_s: float = 0.0

    def count(self, tokens: int, seconds: float, prompts: bool) -> None:
        if prompts:
            self.prompt_tokens += tokens
            self.prompt_s += seconds
        else:
            self.decoded_tokens += tokens
            self.decode_s += seconds


def generate(
    model: CachedModel,
    requests: Sequence[Request],
    *,
    count: int,
    end: int,
    speed: Speed,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Answer all `requests`, each with `count` tokens or up to the token `end`. Their sequences stay in the cache.

    A step computes whatever there is to do at once: a token of every answer, and the prompts that have just arrived.
    """
    steps = 0
    while open_requests := [request for request in requests if not request.ended(count, end)]:
        active = [request for request in open_requests if request.arrival <= steps]
        for request in active:
            if request.sequence is None:
                request.sequence = model.cache.add(request.prompt)
                request.from_cache = request.sequence.length
        prompts = all(request.sequence.length == 0 for request in active)
        tokens = [request.new for request in active]
        start = time.perf_counter()
        logits = on_host(model.logits([request.sequence for request in active], tokens))
        speed.count(sum(map(len, tokens)), time.perf_counter() - start, prompts)
        for request, row in zip(active, logits, strict=True):
            request.take(row)
            progress()
        steps += 1


def generate_plain(
    model: PlainModel, prompt: Sequence[int], *, count: int, end: int, progress: Callable[[], None] = lambda: None
) -> Request:
    """Return the likeliest answer according to the plain model."""
    request = Request(list(prompt))
    while not request.ended(count, end):
        request.take(model.logits([*request.prompt, *request.answer]))
        progress()
    return request


def forked(model: CachedModel, prompt: list[int], choosers: Sequence[Choose], speed: Speed) -> list[Request]:
    """Make requests of one prompt, computed once: each has its first token, and all share the prompt's pages."""
    sequence = model.cache.add(prompt)
    start = time.perf_counter()
    (logits,) = on_host(model.logits([sequence], [prompt]))
    speed.count(len(prompt), time.perf_counter() - start, prompts=True)
    sequences = [sequence, *(model.cache.fork(sequence) for _ in choosers[1:])]
    requests = [Request(prompt, choose, sequence=s) for choose, s in zip(choosers, sequences, strict=True)]
    for request in requests:
        request.take(logits)
    return requests


def on_host(x: Array) -> np.ndarray:
    return x.get() if hasattr(x, "get") else x
