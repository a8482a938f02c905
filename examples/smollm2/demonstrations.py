"""What is shown: three answers in one batch, samples that share their prompt, prompts that share their beginning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import numpy as np

import cuattn

from .generation import Request, Speed, forked, generate, generate_plain, sampler
from .model import CachedModel
from .plain import PlainModel
from .report import Comparison
from .weights import Weights

Progress = Callable[[str, int], Callable[[], None]]  # (what, how many tokens) -> to be called after each token


def silent(description: str, total: int) -> Callable[[], None]:
    return lambda: None


@dataclass
class Demonstrations:
    """The two models, and what all of the demonstrations have in common.

    Parameters
    ----------
    weights : Weights
        In NumPy arrays; with a `device` of "cuda" they are copied to the GPU.
    end : int
        The token that ends an answer.
    count : int
        The most tokens of an answer.
    page_size : int
        Tokens of a page.
    """

    weights: Weights
    end: int
    device: str = "host"
    count: int = 32
    page_size: int = 16
    progress: Progress = silent
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        self.plain = PlainModel(self.weights)
        self.array_module: ModuleType = np if self.device == "host" else import_module("cupy")
        self.on_device = self.weights if self.device == "host" else self.weights.to(self.array_module.asarray)

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page, in all layers."""
        shape = self.weights.shape
        return 2 * shape.blocks * self.page_size * shape.kv_heads * shape.head_dim * np.dtype(np.float32).itemsize

    def model(self, prompts: Sequence[Sequence[int]], prefix_caching: bool = False) -> CachedModel:
        """Make a model with an empty cache, in which all `prompts` and their answers have room."""
        shape = self.weights.shape
        cache = cuattn.PagedKVCache(
            sum(-(-(len(prompt) + self.count) // self.page_size) for prompt in prompts),
            self.page_size,
            num_layers=shape.blocks,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=np.float32,
            array_module=self.array_module,
            prefix_caching=prefix_caching,
        )
        return CachedModel(self.on_device, cache, self.array_module)

    def warm_up(self) -> float:
        """Return the seconds until every kernel is compiled, or loaded: those of prompts, of answers, of both."""
        start = time.perf_counter()
        requests = [Request([0, 0]), Request([0, 0], arrival=1)]
        limits = {"count": min(3, self.count), "end": -1, "speed": Speed()}
        generate(self.model([request.prompt for request in requests]), requests, **limits)
        return time.perf_counter() - start

    def greedy(self, prompts: Sequence[list[int]]) -> list[Comparison]:
        """Answer all prompts in one step, then a token of every answer in each step; always the likeliest one."""
        return self.compared("the cached model", self.model(prompts), [Request(prompt) for prompt in prompts])

    def prefix(self, prompts: Sequence[list[int]]) -> list[Comparison]:
        """Let each prompt arrive one step after the one before, and find the pages that their beginnings share.

        The rest of it is computed in one step together with the next token of the answers under way.
        """
        requests = [Request(prompt, arrival=place) for place, prompt in enumerate(prompts)]
        return self.compared("the prefix cache", self.model(prompts, prefix_caching=True), requests)

    def compared(self, name: str, model: CachedModel, requests: list[Request]) -> list[Comparison]:
        """Answer the requests with the cached model and with the plain one."""
        total = self.count * len(requests)
        limits = {"count": self.count, "end": self.end}
        generate(model, requests, **limits, speed=self.speed, progress=self.progress(name, total))
        advance = self.progress("the plain model", total)
        return [
            Comparison(request, generate_plain(self.plain, request.prompt, **limits, progress=advance))
            for request in requests
        ]

    def samples(self, prompt: list[int], number: int, temperature: float, seed: int) -> tuple[list[Request], int]:
        """Draw several answers to one prompt at random, and count the pages that they take together in the end."""
        model = self.model([prompt] * number)
        choosers = [sampler(temperature, [seed, sample]) for sample in range(number)]
        requests = forked(model, prompt, choosers, self.speed)
        advance = self.progress("samples", self.count * number)
        generate(model, requests, count=self.count, end=self.end, speed=self.speed, progress=advance)
        return requests, model.cache.stats().used
