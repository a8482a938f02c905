"""SmolLM2 writes on several ranks: its heads divided, or its cached keys; the tokens are those of one rank.

python -m examples.parallel.smollm2                          threads: 2 ranks, then 3
mpiexec -n 3 python -m examples.parallel.smollm2 --mpi       processes

With "heads" a rank has some query heads, and the key/value heads that they read: 9 heads on 2 ranks are 4 and 5, and
both read the second of the 3 key/value heads. With "keys" every rank computes all projections, keeps every R-th key,
and attends to those alone: `tree_decode_attention` puts the results together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

import numpy as np

import cuattn
from cuattn.distributed import Group, MpiGroup, ThreadGroup, head_parallel, heads_of_rank, tree_decode_attention
from examples.smollm2 import chat, files
from examples.smollm2.model import silu
from examples.smollm2.weights import Block, Weights

Division = Literal["heads", "keys"]
QUESTION = "What is gravity?"


class DividedModel:
    """A rank's part of the model, with the keys and values that it keeps of one sequence."""

    def __init__(self, weights: Weights, group: Group, division: Division) -> None:
        self.weights, self.group, self.division = weights, group, division
        shape = weights.shape
        self.queries, self.keys = slice(0, shape.heads), slice(0, shape.kv_heads)
        if division == "heads":
            self.queries, self.keys = heads_of_rank(shape.heads, shape.kv_heads, group)
        heads = self.keys.stop - self.keys.start
        self.cache = [[np.zeros((1, 0, heads, shape.head_dim), np.float32)] * 2 for _ in weights.blocks]
        self.length = 0

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return logits [vocabulary] after new ``tokens``, whose keys and values are kept."""
        positions = np.arange(self.length, self.length + len(tokens))
        x = self.weights.embedding[np.asarray(tokens)]
        for layer, block in enumerate(self.weights.blocks):
            x = x + self._attention(layer, block, self._norm(x, block.attention_norm), positions)
            gate, up = np.split(self._norm(x, block.ffn_norm) @ block.gate_up.T, 2, axis=-1)
            x = x + (silu(gate) * up) @ block.down.T
        self.length += len(tokens)
        return self._norm(x[-1], self.weights.norm) @ self.weights.embedding.T

    def _attention(self, layer: int, block: Block, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        q, k, v = self._projected(block, x)
        base = {"base": self.weights.shape.rope_base, "interleaved": True}
        q, k = cuattn.rope(q, positions, **base), cuattn.rope(k, positions, **base)
        if self.division == "heads":
            self._keep(layer, k, v)
            shape = self.weights.shape
            of_all = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads}
            out = head_parallel(q, *self.cache[layer], self.group, **of_all)
            columns = slice(self.queries.start * shape.head_dim, self.queries.stop * shape.head_dim)
            return self.group.all_reduce(out.reshape(len(x), -1) @ block.output[:, columns].T)
        mine = positions % self.group.size == self.group.rank
        self._keep(layer, k[:, mine], v[:, mine])
        if len(positions) > 1:  # a prompt, which is new on every rank
            out = cuattn.attention(q, k, v, causal=True)
        else:
            out = tree_decode_attention(q, *self.cache[layer], [self.cache[layer][0].shape[1]], self.group)
        return out.reshape(len(x), -1) @ block.output.T

    def _projected(self, block: Block, x: np.ndarray) -> list[np.ndarray]:
        """Return q, k and v of the rank's heads, [1, tokens, heads, head_dim]."""
        shape, first, found = self.weights.shape, 0, []
        for heads, own in ((shape.heads, self.queries), (shape.kv_heads, self.keys), (shape.kv_heads, self.keys)):
            rows = block.qkv[(first + own.start) * shape.head_dim : (first + own.stop) * shape.head_dim]
            found.append((x @ rows.T).reshape(1, len(x), own.stop - own.start, shape.head_dim))
            first += heads
        return found

    def _keep(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.cache[layer] = [
            np.concatenate([kept, new], axis=1) for kept, new in zip(self.cache[layer], (k, v), strict=True)
        ]

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        mean = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + np.float32(self.weights.shape.rms_eps)) * weight


def generate(group: Group, weights: Weights, prompt: list[int], count: int, division: Division) -> list[int]:
    """Return the likeliest ``count`` tokens behind a prompt: the same on every rank."""
    model, answer = DividedModel(weights, group, division), []
    new = list(prompt)
    for _ in range(count):
        new = [int(model.logits(new).argmax())]
        answer += new
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpi", action="store_true", help="processes: started with mpiexec")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3], help="threads (2, then 3)")
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    model = files.load()
    prompt = model.tokenizer.encode(chat.prompt(QUESTION)).ids
    arguments = model.weights, prompt, options.tokens
    (one,) = ThreadGroup.run(1, generate, *arguments, "heads")
    group = MpiGroup() if options.mpi else None
    if group is None or group.rank == 0:
        print(f"{QUESTION}\none rank: {model.tokenizer.decode(one)!r}")
    for size in [group.size] if group is not None else options.ranks:
        for division in ("heads", "keys"):
            if group is not None:
                answers = [generate(group, *arguments, division)]
            else:
                answers = ThreadGroup.run(size, generate, *arguments, division)
            same = all(answer == one for answer in answers)
            if group is None or group.rank == 0:
                print(f"{size} ranks, {division} divided: {'the same tokens' if same else 'OTHER TOKENS'}", flush=True)
            if not same:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
