"""Adam: steps of the mean gradient over the root of the mean squared gradient (Kingma and Ba, 2014)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .layers import Array, array_module


class Adam:
    """The optimizer: changes `weights` in place.

    Parameters
    ----------
    weights : mapping of arrays
    beta1, beta2 : float
        How much of the mean gradient, and of the mean squared gradient, is kept from one step to the next.
    eps : float
        Added to the root of the mean squared gradient.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        *,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
    ) -> None:
        self.weights = weights
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.steps = 0
        self.means = {name: array_module(w).zeros_like(w) for name, w in weights.items()}
        self.squares = {name: array_module(w).zeros_like(w) for name, w in weights.items()}

    def step(self, grads: Mapping[str, Array], rate: float) -> None:
        """Make one step against `grads`, an array for each weight. A weight moves by about `rate`."""
        if grads.keys() != self.weights.keys():
            unpaired = sorted(grads.keys() ^ self.weights.keys())
            raise ValueError(f"each weight needs one gradient; {unpaired} are only weights or only gradients")
        self.steps += 1
        # Both means start at 0; these divisors take that start out of them.
        correction1 = 1 - self.beta1**self.steps
        correction2 = 1 - self.beta2**self.steps
        for name, w in self.weights.items():
            grad, mean, square = grads[name], self.means[name], self.squares[name]
            mean += (1 - self.beta1) * (grad - mean)
            square += (1 - self.beta2) * (grad * grad - square)
            w -= rate * (mean / correction1) / (np.sqrt(square / correction2) + self.eps)
