"""Run many cases, each in a bounded time, in processes that may hang or die."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait

from bench.stress.bad_inputs.judge import Verdict, bounded_memory, case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stress.bad_inputs", description=__doc__)
    parser.add_argument("--count", type=int, default=7500, help="cases (7500)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one case (30; it may compile a kernel)")
    parser.add_argument("--only", type=int, default=None, help="this case alone, here")
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is not None:
        import torch  # noqa: F401  (tensors are among the values if it is there)
    if options.only is not None:
        print(case(options.seed, options.only))
        return 0
    verdicts = run(options.seed, options.count, options.workers, options.limit)
    return report(verdicts)


def run(seed: int, count: int, workers: int, limit: float) -> list[Verdict]:
    """The verdicts of all cases."""
    context = multiprocessing.get_context("fork")
    verdicts: list[Verdict] = []
    todo = [list(range(first, count, workers))[::-1] for first in range(workers)]
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, list[int], float]] = {}
    while todo or running:
        while todo:
            indices = todo.pop()
            if not indices:
                continue
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, seed, indices), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (process, indices, time.monotonic())
        for connection in [x for x in wait(list(running), timeout=1.0) if isinstance(x, Connection)]:
            process, indices, _ = running[connection]
            try:
                verdicts.append(Verdict(*connection.recv()))
                indices.pop()
                running[connection] = (process, indices, time.monotonic())
                continue
            except EOFError:
                process.join()
            del running[connection]
            if indices:  # it died in the middle of a case
                verdicts.append(Verdict("killed", (), f"#{indices.pop()}: exit status {process.exitcode}", False))
                todo.append(indices)
        for connection, (process, indices, since) in list(running.items()):
            if time.monotonic() - since > limit:
                process.kill()
                process.join()
                del running[connection]
                verdicts.append(Verdict("hangs", (), f"#{indices.pop()}: more than {limit:g} s", False))
                todo.append(indices)
    return verdicts


def _work(connection: Connection, seed: int, indices: list[int]) -> None:
    with bounded_memory():
        for index in reversed(indices):
            connection.send(tuple(case(seed, index)))
    connection.close()


def report(verdicts: list[Verdict]) -> int:
    """Print a table by kind and every fault; 1 if there is one."""
    total = Counter(kind for verdict in verdicts for kind in verdict.kinds)
    refused = Counter(kind for verdict in verdicts if verdict.refused for kind in verdict.kinds)
    faulty = [verdict for verdict in verdicts if verdict.fault]
    faults = Counter(kind for verdict in faulty for kind in verdict.kinds)
    print(f"{'kind':40s} {'cases':>6s} {'refused':>8s} {'faults':>7s}")
    for kind in sorted(total):
        print(f"{kind:40s} {total[kind]:6d} {refused[kind]:8d} {faults[kind]:7d}")
    for verdict in sorted(faulty, key=lambda verdict: verdict.fault):
        print(f"{verdict.fault} <- {verdict.text}")
    what = Counter(verdict.fault.split(":")[0].split(" ")[0] for verdict in faulty)
    print(f"{len(verdicts)} cases, {len(faulty)} faults", dict(what) if faulty else "")
    return 1 if faulty or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
