"""Signals at random moments of cold compilations: ``python -m bench.stress.compile_interrupts --count 300``.

In one process after another, kernels are compiled while another thread sends SIGINT, or SIGTERM with a handler that
raises, once or several times. Whatever the moment, the exception must arrive in Python, ``finally`` and `atexit` must
run, no compiling process may be left as a zombie or outlive the program, and no entry or temporary file may be half
written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from cuattn import compile

TRIALS_A_PROCESS = 25
LONGEST_DELAY_S = 0.6
SOURCE = '#include <cuda_fp16.h>\nextern "C" __global__ void k{n}(__half* x) {{ x[{n}] = __hadd(x[0], x[1]); }}'


class Stop(Exception):
    """What the handler of SIGTERM raises."""


def run(count: int, seed: int) -> list[str]:
    """Send signals in ``count`` compilations; returns what was wrong."""
    problems: list[str] = []
    totals: Counter[str] = Counter()
    for first in range(0, count, TRIALS_A_PROCESS):
        trials = min(TRIALS_A_PROCESS, count - first)
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", __spec__.name, "--inside", str(trials), "--seed", str(seed + first)]
            environment = {**os.environ, "CUATTN_CACHE_DIR": f"{cache}/cache"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        lines = done.stdout.splitlines()
        if done.returncode or "atexit" not in lines:
            problems.append(f"process {first}: exit status {done.returncode}, {lines}, {done.stderr[-800:]}")
            continue
        answer = json.loads(lines[0])
        totals.update(answer["counts"])
        problems += answer["problems"]
        problems += [f"process {pid} outlives the program" for pid in answer["workers"] if _is_alive(pid)]
    print(", ".join(f"{number} {what}" for what, number in sorted(totals.items())), flush=True)
    return problems


def _is_alive(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "ZX":  # it has ended, and whoever took it over has not looked yet
            return False
        time.sleep(0.05)
    return True


def _inside(count: int, seed: int) -> None:
    """Make ``count`` compilations with signals in a process of its own, then look around."""
    import atexit

    from cuattn.compile import cache, workers

    atexit.register(print, "atexit", flush=True)
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    for number in range(count):
        signals = [draw.choice((signal.SIGINT, signal.SIGTERM)) for _ in range(draw.choice((1, 1, 2, 3)))]
        delays = [draw.random() * LONGEST_DELAY_S, *(draw.choice((0, 1e-4, 0.01)) for _ in signals[1:])]
        sender = threading.Thread(target=_send, args=(signals, delays))
        sender.start()
        try:
            _attempt(number, counts)
            counts["finished"] += 1
        except (KeyboardInterrupt, Stop):
            counts["interrupted"] += 1
        sender.join()
    problems = []
    if not counts["finally"] == counts["finished"] + counts["interrupted"] == count:
        problems.append(f"{count} compilations: {dict(counts)}")
    time.sleep(0.5)  # threads that clean up
    problems += [f"process {pid} is a zombie" for pid in _children() if _state(pid) == "Z"]
    problems += [f"left over: {path.name}" for path in cache.root().glob(".cuattn-tmp-*")]
    for entry in cache.ls():
        key, _, suffix = entry.name.rpartition(".")
        if cache.read(key, f".{suffix}") is None:
            problems.append(f"half an entry: {entry.name}")
    if not compile.build_source("int x;", name="last.cu", arch="sm_80", kind="ptx").image:
        problems.append("the last compilation gave nothing")
    alive = [worker.pid for worker in workers.alive()]
    print(json.dumps({"counts": counts, "problems": problems, "workers": alive}), flush=True)


def _attempt(number: int, counts: Counter[str]) -> None:
    """Make one attempt: the only place where signals raise."""
    try:
        compile.build_source(SOURCE.format(n=number), name=f"k{number}.cu", arch="sm_80", kind="ptx")
    finally:
        counts["finally"] += 1


def _handle(number: int, frame: FrameType | None) -> None:
    while frame is not None and frame.f_code is not _attempt.__code__:
        frame = frame.f_back
    if frame is not None:
        raise KeyboardInterrupt if number == signal.SIGINT else Stop


def _send(signals: list[int], delays: list[float]) -> None:
    for number, delay in zip(signals, delays, strict=True):
        time.sleep(delay)
        os.kill(os.getpid(), number)


def _children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="compilations with signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        _inside(arguments.inside, arguments.seed)
        return 0
    problems = run(arguments.count, arguments.seed)
    print("\n".join(problems) or "nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
