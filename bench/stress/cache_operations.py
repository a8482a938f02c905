"""Operations of a paged cache with an exception at a bytecode of each: the cache is as before or as after, to the bit.

    python -m bench.stress.cache_operations --count 100000

A twin of the cache gets the same operations without exceptions. After each one, the cache is compared with what the
twin was before it or is after it, and its tables are held against each other. Then the operation is made again, without
an exception, if it has not happened: what is left must be a cache that works.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cuattn.kv.caches
from bench.stress.cache_world import PAGE_SIZE, World
from bench.stress.injection import raised_at
from cuattn import errors

__all__ = ["Outcome", "Tally", "attempt", "main", "run", "sweep"]

CACHES = str(Path(cuattn.kv.caches.__file__).parent)


class Outcome(NamedTuple):
    """Whether the exception came out, whether the operation happened, and at which bytecode it ended."""

    raised: bool
    happened: bool
    reached: int


@dataclass
class Tally:
    """A count of what came of operations; after those in ``broken`` the cache was neither as before nor as after."""

    operations: int = 0
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def attempt(world: World, tally: Tally, instruction: int, name: str, *args: Any) -> Outcome:
    """Make one operation with an exception at one bytecode, and check everything that must be so afterwards.

    Where it has happened, it happens to the twin, too.
    """
    number, real, twin = world.next_number, world.real, world.twin
    before = real.state()
    tally.operations += 1
    refused = False
    try:
        raised, count, result = raised_at(
            instruction, lambda: real.call(name, number, args), lambda file: file.startswith(CACHES)
        )
    except errors.OutOfPagesError:
        raised, count, result, refused = True, 0, None, True
    happened = not raised or (world.appended(*args) if name == "append" else real.state() != before)
    if raised and not refused:
        (tally.after if happened else tally.before)[name] += 1
    if happened and raised and name == "reserve":  # nobody got the step: the cache gave it up
        twin.call("reserve", number, args).abort()
    elif happened:
        real.keep(name, number, args, result)
        twin.keep(name, number, args, twin.call(name, number, args))
    world.next_number += happened
    where = f"{name}{args} at instruction {instruction}"
    if real.state() != (twin.state() if happened else before):
        tally.broken.append(f"{where}: neither as before nor as after")
    tally.broken += [f"{where}: {fault}" for fault in real.faults()]
    return Outcome(raised, happened, count)


def sweep(make: Callable[[], World], name: str, *args: Any) -> Tally:
    """Raise at every bytecode of one operation of a world; a new world is made when the operation has happened."""
    tally, world, instruction = Tally(), make(), 0
    while True:
        instruction += 1
        outcome = attempt(world, tally, instruction, name, *args)
        if not outcome.raised:
            return tally
        if outcome.happened:
            world = make()


def run(count: int, seed: int = 0) -> Tally:
    """Make random operations, nearly all with an exception at a random bytecode."""
    rng, world, tally = random.Random(seed), World(), Tally()
    lengths: dict[str, int] = {}
    while tally.operations < count and not tally.broken:
        name, *args = choose(rng, world)
        instruction = rng.randint(1, lengths.get(name, 100) * 11 // 10)
        outcome = attempt(world, tally, instruction, name, *args)
        if not outcome.happened:
            world.do(name, *args)
        lengths[name] = max(outcome.reached, lengths.get(name, 100)) if outcome.raised else outcome.reached
    return tally


def choose(rng: random.Random, world: World) -> tuple[Any, ...]:
    """Choose the next operation: something that the cache allows."""
    seqs, steps = world.real.seqs, world.real.steps
    busy = {seq for step in steps.values() for seq in step.sequences}
    live = [number for number, seq in seqs.items() if seq not in busy and seq.state == "live"]
    swapped = [number for number, seq in seqs.items() if seq.state == "swapped"]
    if steps and (rng.random() < 0.7 or len(steps) > 1):
        number = rng.choice(list(steps))
        written = bool(steps[number]._appended)
        return rng.choice(("commit", "commit", "abort") if written else ("append", "append", "abort")), number
    name = rng.choice(("add", "fork", "reserve", "reserve", "reserve", "truncate", "free", "swap_out", "swap_in"))
    if name == "swap_in" and swapped:
        return name, tuple(rng.sample(swapped, rng.randint(1, len(swapped))))
    if len(seqs) > 6 or (name == "free" and live):
        idle = live + swapped
        if idle:
            return "free", rng.choice(idle)
    if name == "add" or not live:
        # Few tokens, so that prefixes are found; one in four with many, so that they are evicted.
        return "add", [rng.randint(0, 1 if rng.random() < 0.75 else 9) for _ in range(rng.randint(1, 4 * PAGE_SIZE))]
    if name == "fork":
        return name, rng.choice(live)
    if name == "truncate":
        number = rng.choice(live)
        return name, number, rng.randint(0, seqs[number].length)
    chosen = tuple(rng.sample(live, rng.randint(1, min(3, len(live)))))
    if name == "swap_out":
        return name, chosen
    counts, tokens = [], []
    for number in chosen:
        pending = seqs[number].tokens[seqs[number].length :]
        counts.append(rng.randint(1, len(pending)) if pending else rng.randint(1, 4))
        tokens.append(list(pending[: counts[-1]]) or [rng.randint(0, 1) for _ in range(counts[-1])])
    return "reserve", chosen, counts, tokens


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 0 if nothing was broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.stress.cache_operations", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="operations")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    tally = run(given.count, given.seed)
    print(f"{tally.operations} operations; broken: {len(tally.broken)}")
    for name in sorted(tally.before | tally.after):
        print(f"  {name}: {tally.before[name]} exceptions changed nothing, {tally.after[name]} came when it was done")
    for fault in tally.broken:
        print(f"  {fault}")
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
