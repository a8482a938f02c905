"""Interrupt calls on the host executor, at random moments, in processes of their own.

``python -m bench.stress.interrupts --count 1000``. An interrupt is Ctrl-C, often followed by a second one after 0 to 2
ms, or an exception that another thread injects. The calls are short, long, checked, and endless. After each: no thread
of the launch is left, an endless kernel has stopped in time, and a call that is not interrupted gives the same bits as
ever. The processes end with an endless launch in a daemon thread. A process that crashes or hangs counts, too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import cuattn
from cuattn import host

PER_PROCESS = 50
ENDLESS = 'extern "C" __global__ void endless(int* x) { for (;;) if (atomicAdd(x, 1) == -7) break; }'
#: Seconds after which an endless launch counts as not stopped; a busy machine takes its time.
PATIENCE_S = 5.0
#: What sends signals, a line "<delay> <delay>" a request, -1 for no second signal. Another process, so that the calls
#: under test have Python's threads for themselves.
SENDER = r"""
import os, signal, sys, time
target = int(sys.argv[1])
def after(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end: pass
    os.kill(target, signal.SIGINT)
for line in sys.stdin:
    first, second = map(float, line.split())
    after(first)
    if second >= 0: after(second)
    print("sent", flush=True)
"""


@dataclass
class Trial:
    """One call and its interrupts; survives the exceptions that leave its `run`."""

    call: Callable[[], object]
    is_endless: bool
    go: Callable[[], object]  # asks for the interrupts
    wait: Callable[[], object]  # until all of its interrupts have been sent
    threads: int  # of the process without a launch
    called: bool = False
    returned: bool = False
    checked: bool = False
    faults: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Make the call, or go on: this is entered anew after each exception."""
        if not self.called:
            self.called = True
            self.go()
            self.call()
            self.returned = True
        if not self.checked:
            end = time.perf_counter() + 0.02  # a thread that has been joined leaves the list a moment later
            while (left := _num_threads() - self.threads) > 0 and time.perf_counter() < end:
                pass
            if left > 0:
                self.faults.append(f"{left} threads of the launch left running")
            if self.is_endless and self.returned:
                self.faults.append("an endless kernel has returned without an exception")
            self.checked = True
        self.wait()
        time.sleep(0.002)  # what has been sent arrives


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _survive(function: Callable[[], object]) -> None:
    while True:
        try:
            function()
            return
        except KeyboardInterrupt:
            pass


class Calls:
    """The calls under test, compiled."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.small = rng.standard_normal((1, 48, 2, 64)).astype(np.float32)
        self.large = rng.standard_normal((1, 600, 4, 64)).astype(np.float32)
        self.endless_kernel = host.RawModule(ENDLESS).get_function("endless")
        self.expected = self.short()

    def short(self) -> Any:
        return cuattn.attention(self.small, self.small, self.small)

    def long(self) -> Any:
        return cuattn.attention(self.large, self.large, self.large)

    def checked(self) -> Any:
        with host.check("all"):
            return self.short()

    def endless(self) -> None:
        with host.check("mem"):
            self.endless_kernel((4,), (64,), (np.zeros(1, np.int32),))


def _inject(gate: threading.Event, delay: float, thread: int) -> None:
    gate.wait()
    time.sleep(delay)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


def child(count: int, seed: int) -> dict[str, Any]:
    """Run ``count`` trials in this process."""
    rng = random.Random(seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may start with it ignored
    calls = Calls()
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert sender.stdin is not None and sender.stdout is not None
    answers = sender.stdout.fileno()
    faults: list[str] = []
    slowest = 0.0
    for number in range(count):
        call = (calls.short, calls.long, calls.checked, calls.endless)[number % 4]
        is_endless = call == calls.endless
        first = rng.choice((0.0, rng.uniform(0, 0.002), rng.uniform(0, 0.02)))
        start = time.perf_counter()
        if rng.random() < 0.25:
            gate = threading.Event()
            injector = threading.Thread(target=_inject, args=(gate, first, threading.get_ident()))
            injector.start()
            trial = Trial(call, is_endless, gate.set, injector.join, _num_threads())
        else:
            second = rng.choice((-1.0, 0.0, rng.uniform(0, 0.0002), rng.uniform(0, 0.002)))
            request = partial(os.write, sender.stdin.fileno(), f"{first} {second}\n".encode())
            trial = Trial(call, is_endless, request, _answer_of(answers), _num_threads())
        _survive(partial(_survive, trial.run))
        took = time.perf_counter() - start - first
        if is_endless:
            slowest = max(slowest, took)
            if took > PATIENCE_S:
                trial.faults.append(f"an endless kernel ran on for {took:.1f} s")
        faults += [f"trial {number} of seed {seed}: {fault}" for fault in trial.faults]
        if number % 10 == 9 and not np.array_equal(calls.short(), calls.expected):
            faults.append(f"after trial {number} of seed {seed}: a call gives other bits")
    sender.stdin.close()
    sender.wait()
    threading.Thread(target=calls.endless, daemon=True).start()
    time.sleep(0.05)
    return {"faults": faults, "slowest_s": slowest}


def _answer_of(descriptor: int) -> Callable[[], None]:
    """Wait for one answer of the sender; safe to interrupt and call again."""
    received = bytearray()

    def wait() -> None:
        while not received.endswith(b"\n"):
            received.extend(os.read(descriptor, 1))

    return wait


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="interrupts in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options.count, options.seed)))
        return 0
    faults: list[str] = []
    crashes, slowest = 0, 0.0
    for start in range(0, options.count, PER_PROCESS):
        count = min(PER_PROCESS, options.count - start)
        seed = options.seed + start
        argv = [sys.executable, "-m", "bench.stress.interrupts", "--child", "--count", str(count), "--seed", str(seed)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60 + 10 * count, check=False)
        except subprocess.TimeoutExpired:
            crashes += 1
            faults.append(f"the process of seed {seed} hangs")
            continue
        if done.returncode:
            crashes += 1
            faults.append(f"the process of seed {seed} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        else:
            result = json.loads(done.stdout)
            faults += result["faults"]
            slowest = max(slowest, result["slowest_s"])
    for fault in faults:
        print(fault)
    print(
        f"{options.count} interrupts: {len(faults)} faults, {crashes} processes lost; "
        f"an endless kernel stopped within {1000 * slowest:.0f} ms"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
