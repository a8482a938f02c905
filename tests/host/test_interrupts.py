"""Exceptions during a launch: it stops at once, and what it reads lives until it has stopped."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import cuattn.host as host
from bench.stress import interrupts
from bench.stress.timers import raise_after

ENDLESS = 'extern "C" __global__ void k(volatile int* x) { while (*x >= 0) x[1] = 1; }'


def endless():
    """An endless kernel, and an array of it."""
    return host.RawModule(ENDLESS).get_function("k"), np.zeros(2, np.int32)


def run_program(text, **options):
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize(("grid", "steps"), [(4096, "1000000"), (1, "1 << 31")])
def test_ctrl_c_stops_a_long_launch(grid, steps):
    """In a process of its own: the signal must reach a main thread that waits for a launch."""
    program = r'''
import os, signal, threading, numpy as np, cuattn.host as host
kernel = host.RawModule("""
extern "C" __global__ void k(float* y, long long n) {
  float a = 0;
  for (long long i = 0; i < n; i++) a = a * 0.5f + i;
  y[blockIdx.x] = a;
}""").get_function("k")
y = np.zeros(4096, np.float32)
kernel((1,), (32,), (y, 1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may start with it ignored
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    kernel((GRID,), (256,), (y, STEPS))
except KeyboardInterrupt:
    print("interrupted")
'''
    done = run_program(program.replace("GRID", str(grid)).replace("STEPS", steps))
    assert done.stdout == "interrupted\n", done.stderr


def test_an_exception_from_another_thread_stops_a_launch_in_any_thread():
    kernel, x = endless()

    class Enough(Exception):
        pass

    caught = []

    def work():
        try:
            kernel((1,), (32,), (x,))
        except Enough:
            caught.append(x[1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not x[1]:  # it runs
        time.sleep(0.001)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Enough))
    thread.join(30)
    assert caught == [1]
    x[1] = 0
    time.sleep(0.02)
    assert x[1] == 0  # nothing writes it any more


def test_a_handler_that_does_not_raise_runs_during_the_launch():
    """It may launch kernels itself, with the same checkers: nothing is held that it could wait for."""
    kernel, x = endless()
    other = host.RawModule('extern "C" __global__ void k(int* y) { atomicAdd(y, 1); }').get_function("k")
    y = np.zeros(1, np.int32)

    def handler(number, frame):
        other((2,), (32,), (y,))
        x[0] = -1  # ends the other one

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with host.check("race"), raise_after(60, TimeoutError):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            kernel((1,), (1,), (x,))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert y[0] == 64


def test_a_process_ends_while_a_daemon_thread_launches():
    program = r"""
import threading, time, numpy as np, cuattn.host as host
kernel = host.RawModule('''SOURCE''').get_function("k")
def work():
    while True:
        kernel((4,), (32,), (np.zeros(1 << 20, np.int32),))
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""
    done = run_program(program.replace("SOURCE", ENDLESS), env={**os.environ, "CUATTN_HOST_THREADS": "2"})
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupts_at_random_moments(capsys):
    """The same code as ``python -m bench.stress.interrupts``, which runs a thousand of them."""
    assert interrupts.main(["--count", "24"]) == 0, capsys.readouterr().out
