"""Two runs side by side: the kernels, and float64."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from .adam import Adam
from .model import CharTransformer

RATE = 4e-3
WARMUP = 20


def learning_rate(step: int, steps: int) -> float:
    """Return Adam's rate at `step`, from 0, of `steps`: a line from `RATE` to 0, behind a start that is slow."""
    return RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)


@dataclass
class Run:
    """A model in training for `steps` steps: its loss before each of them, and the time that they took."""

    model: CharTransformer
    optimizer: Adam
    steps: int
    losses: list[float] = field(default_factory=list)
    time_s: float = 0.0

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> None:
        start = time.perf_counter()
        step = len(self.losses)
        loss, grads = self.model.loss_and_grads(tokens, targets, step)
        self.optimizer.step(grads, learning_rate(step, self.steps))
        self.losses.append(float(loss))  # waits for a GPU, so that its time is that of the work
        self.time_s += time.perf_counter() - start


def continuation(model: CharTransformer, prompt: np.ndarray, length: int) -> np.ndarray:
    """Continue `prompt` [n] by the `length` tokens that the model finds likeliest, one by one, [n + length]."""
    tokens = list(prompt)
    for _ in range(length):
        logits = model.logits(np.array([tokens[-model.shape.context :]]))
        tokens.append(int(logits[0, -1].argmax()))
    return np.array(tokens)
