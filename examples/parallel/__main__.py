"""Train on one rank and on several, by each way, and print losses, and bytes beside their formulas.

python -m examples.parallel                          threads
mpiexec -n 4 python -m examples.parallel --mpi       processes
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from typing import Any

import numpy as np

from cuattn.distributed import Group, MpiGroup, ThreadGroup
from examples.char_transformer.adam import Adam

from . import of_blocks, of_data, of_matrices, of_tokens
from .common import Setting, Way, all_reduce_bytes, one_rank, shape_of

RATE = 4e-3


def ways(setting: Setting) -> list[Way]:
    shape, size = setting.shape, setting.size

    def of_ring(setting: Setting) -> Fraction:
        keys = 2 * setting.token_bytes // size  # keys and values of a rank
        forward, backward = (size - 1) * keys, (size - 1) * keys + (size * keys if size > 1 else 0)
        return shape.blocks * Fraction(forward + backward) + all_reduce_bytes(setting.weight_bytes + 8, size)

    def of_shards(setting: Setting) -> Fraction:
        per_rank = -(-setting.weight_bytes // 8 // size) * 8
        return Fraction(2 * (size - 1) * per_rank)

    return [
        Way(
            "data parallel",
            of_data.data_parallel(shape),
            "2 (R-1)/R (P + 1) s",
            lambda s: all_reduce_bytes(s.weight_bytes + 8, size),
        ),
        Way("sharded weights", of_data.sharded(shape), "2 (R-1) ceil(P/R) s", of_shards),
        Way(
            "tensor parallel",
            of_matrices.tensor_parallel(shape),
            "4 L 2 (R-1)/R B N C s",
            lambda s: 4 * shape.blocks * all_reduce_bytes(s.token_bytes, size),
        ),
        Way("pipeline", of_blocks.pipeline(shape), "B N C s forward, and back", lambda s: Fraction(2 * s.token_bytes)),
        Way("context parallel", of_tokens.context_parallel(shape), "L (3R-2) 2 B N/R C s + gradients", of_ring),
    ]


def train(group: Group, setting: Setting, way: Way | None, steps: int) -> tuple[list[float], Fraction]:
    """Return the losses before each step, and the bytes that this rank has sent in the last one."""
    weights, batches = setting.weights(), setting.batches()
    optimizer, losses = Adam(weights), []
    for _ in range(steps):
        tokens, targets = batches.draw()
        group.traffic.reset()
        if way is None:
            loss, grads = one_rank(weights, setting.shape).loss_and_grads(tokens, targets)
        else:
            loss, grads = way.step(group, weights, tokens, targets)
        losses.append(float(loss))
        optimizer.step(grads, RATE)
    return losses, Fraction(group.traffic.bytes)


def compare(group: Group, setting: Setting, steps: int) -> list[dict[str, Any]]:
    """Return, for each way, the largest difference of a loss to that of one rank, and bytes sent and by formula."""
    expected, _ = train(group, setting, None, steps)
    rows = []
    for way in ways(setting):
        losses, sent = train(group, setting, way, steps)
        rows.append(
            {
                "way": way.name,
                "losses": losses,
                "difference": float(np.abs(np.subtract(losses, expected)).max()),
                "sent": group.all_gather(np.array([float(sent)])).ravel().tolist(),
                "formula": float(way.bytes(setting)),
                "in words": way.formula,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="threads (4)")
    parser.add_argument("--mpi", action="store_true", help="processes: started with mpiexec")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.mpi:
        group = MpiGroup()
        setting = Setting(group.size, shape_of(group.size))
        rows = compare(group, setting, options.steps)
        if group.rank:
            return
    else:
        setting = Setting(options.ranks, shape_of(options.ranks))
        rows = ThreadGroup.run(options.ranks, compare, setting, options.steps)[0]
    print(
        f"{setting.size} ranks, {options.steps} steps; loss of one rank and of all, bytes that a rank sends in a step"
    )
    for row in rows:
        print(
            f"{row['way']:17} loss {row['losses'][-1]:.6f}, at most {row['difference']:.1e} from one rank's; "
            f"{max(row['sent']):12,.0f} bytes, by formula {row['formula']:12,.0f} = {row['in words']}"
        )
    pieces = of_blocks.MICRO_BATCHES
    print(f"pipeline: {pieces} pieces, bubble {of_blocks.bubble(setting.size, pieces)} of the time")


if __name__ == "__main__":
    main()
