"""Compiling processes: crashes, interrupts, forks, and machines where none can be started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cuattn import compile as cc
from cuattn.compile import program, workers
from cuattn.errors import CompileError

ROOT = Path(cc.__file__).parents[2]


def source(number: int) -> str:
    return f'extern "C" __global__ void k{number}(int* x) {{ *x = {number}; }}'


def build(number: int) -> cc.Binary:
    return cc.build_source(source(number), name="k.cu", arch="sm_80", kind="ptx")


def run_python(code: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **keywords)  # type: ignore


def test_one_process_compiles_one_after_another() -> None:
    build(1)
    before = [worker.pid for worker in workers.alive()]
    build(2)
    assert [worker.pid for worker in workers.alive()] == before


def test_a_process_that_was_killed_is_replaced() -> None:
    build(3)
    for worker in workers.alive():
        os.kill(worker.pid, signal.SIGKILL)
    assert b"k4" in build(4).image
    assert all(Path(f"/proc/{worker.pid}").exists() for worker in workers.alive())


def test_a_crash_of_nvrtc_is_a_compile_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # A library that ends its process stands in for an NVRTC with a fault.
    ask = workers._Worker.ask

    def crash(self: workers._Worker, request: list[bytes]) -> list[bytes]:
        os.kill(self.pid, signal.SIGSEGV)
        return ask(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(workers._Worker, "ask", crash)
        with pytest.raises(CompileError, match=r"NVRTC crashed.*signal 11"):
            build(5)
    assert b"k5" in build(5).image


def test_signals_raise_in_the_waiting_thread_and_end_the_compilation() -> None:
    # The moment that was deadly: NVRTC's own handlers are in place while it compiles.
    slow = "".join(f'extern "C" __global__ void s{n}(float* x) {{ x[0] = sinf(x[{n}]); }}\n' for n in range(400))
    before = set(workers.alive())
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cc.build_source(slow, name="slow.cu", arch="sm_80", kind="cubin")
        time.sleep(60)
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 10
    while set(workers.alive()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(workers.alive()) - before


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    workers.end()

    def refuse(*args: object, **keywords: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    seen = []
    compile_here = program.Library.compile

    def compile(self: program.Library, *args: object) -> program.Result:
        seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return compile_here(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(program.Library, "compile", compile)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert b"k6" in build(6).image
    assert {signal.SIGINT, signal.SIGTERM} <= seen[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert not workers.alive()


@pytest.mark.parametrize("executable", ["", "/bin/cat", "/nonexistent/python"])
def test_an_executable_that_is_no_interpreter(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.end()
    monkeypatch.setattr(sys, "executable", executable)
    assert b"k7" in build(7).image
    assert not workers.alive()


def test_frames() -> None:
    sent = bytearray()
    strings = [b"", b"abc", bytes(300_000), b"\0"]
    program.write_frame(strings, sent.extend)
    unread = bytes(sent)

    def read(size: int) -> bytes:
        nonlocal unread
        part, unread = unread[: min(size, 1000)], unread[min(size, 1000) :]
        return part

    assert program.read_frame(read) == strings
    with pytest.raises(EOFError):
        program.read_frame(read)
    for hostile in (b"\xff" * 4, b"\1\0\0\0" + b"\xff" * 8):
        unread = hostile
        with pytest.raises(ValueError, match="a frame of"):
            program.read_frame(read)


def test_programs_leave_no_process_behind() -> None:
    # Without a standard input, with SIGCHLD ignored, with SIGPIPE deadly, after a fork; the answer: pids, and exit 0.
    code = f"""
import os, signal, sys, threading, warnings
os.close(0)
warnings.simplefilter("error")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from cuattn import compile as cc
from cuattn.compile import workers
def build(number):
    text = {source(0)!r}.replace("0", str(number))
    assert cc.build_source(text, name="k.cu", arch="sm_80", kind="ptx").image
build(1)
threads = [threading.Thread(target=build, args=(n,)) for n in (2, 3, 4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
mine = [worker.pid for worker in workers.alive()]
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
child = os.fork()
if child == 0:
    assert not workers.alive()
    build(5)
    assert not set(mine) & {{worker.pid for worker in workers.alive()}}
    print(*(worker.pid for worker in workers.alive()), flush=True)
    workers.end()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
os.kill(mine[0], signal.SIGKILL)
build(6)
print(*mine, *(worker.pid for worker in workers.alive()), flush=True)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    pids = set(map(int, done.stdout.split()))
    assert len(pids) >= 3
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_program_takes_its_processes_along() -> None:
    code = f"""
import os, time
from cuattn import compile as cc
from cuattn.compile import workers
cc.build_source({source(8)!r}, name="k.cu", arch="sm_80", kind="ptx")
print(*(worker.pid for worker in workers.alive()), flush=True)
os.kill(os.getpid(), 9)
"""
    done = run_python(code)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and pids
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_running(pid)]
