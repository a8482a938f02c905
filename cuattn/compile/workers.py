"""Compiling processes: started when the first kernel is compiled, kept warm, ended with this process.

Each is a fresh interpreter that runs `cuattn.compile.program` and nothing else, in a session of its own, so that Ctrl-C
in a terminal does not reach it. Threads that compile at once get a process each, up to the number of processors. A
crash of NVRTC ends such a process and is an error here. Where no process can be started (`CannotStart`), the caller
compiles in this one, with the signals that NVRTC would catch held back in the calling thread (`here`).

Conversations with a process run in a thread of their own (`detached`): what a signal handler raises in the thread that
waits cannot tear them.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from cuattn.compile import program
from cuattn.compile.program import Result
from cuattn.errors import CompileError

if TYPE_CHECKING:
    import socket
    import subprocess

T = TypeVar("T")

_START_S = 60.0  # an interpreter that says nothing for so long is none
_CAUGHT_BY_NVRTC = (signal.SIGINT, signal.SIGTERM)


class CannotStart(Exception):
    """No compiling process can be started here."""


class Job:
    """A piece of work that the thread which waits for it may give up, at any moment."""

    def __init__(self) -> None:
        self._abandoned = False
        self._worker: _Worker | None = None

    @property
    def abandoned(self) -> bool:
        return self._abandoned

    def abandon(self) -> None:
        """Nobody waits any more: end the process that works for it."""
        self._abandoned = True
        worker = self._worker
        if worker is not None:
            worker.hang_up()

    def runs_in(self, worker: _Worker | None) -> None:
        """Say which process works for it now."""
        self._worker = worker
        if self._abandoned and worker is not None:  # after `abandon` has looked
            worker.hang_up()


def detached(work: Callable[[Job], T]) -> T:
    """Do ``work`` in another thread and wait for it. An exception in the wait, such as `KeyboardInterrupt`, ends it."""
    job = Job()
    # A bare lock and a bare thread, whose functions are one step each: an exception inside the Python code of
    # Event.wait or Thread.start may leave a lock released that is held, or held that is released.
    running = _thread.allocate_lock()
    running.acquire()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(job))
        except BaseException as error:
            errors.append(error)
        finally:
            running.release()

    try:
        try:
            _thread.start_new_thread(run, ())  # which does not keep the interpreter from ending
        except RuntimeError:  # no more threads, or the interpreter is on its way out
            run()
        while not running.acquire(timeout=0.5):  # in steps: a signal that another thread received does not end a wait
            pass
    except BaseException:
        job.abandon()
        raise
    if errors:
        error = errors.pop()
        try:
            raise error
        finally:
            del error  # it holds this frame
    return results[0]


def compile(
    library: str, source: str, name: str, options: Sequence[str], headers: Mapping[str, bytes], job: Job
) -> Result:
    """Compile with the NVRTC at ``library``.

    Raises
    ------
    CompileError
        NVRTC crashed, twice.
    CannotStart
        No process can be started.
    OSError, AttributeError, NVRTCError
        The library cannot be loaded or does not work.
    """
    request = program.pack_request(source, name, options, headers)
    with _pool.slots:
        try:
            return _in_worker(library, request, job, _pool.take(library))
        except _Ended:
            if job.abandoned:
                raise
        # It may have died while it was idle, or been killed by somebody. Only a second death is NVRTC's own.
        try:
            return _in_worker(library, request, job, _start(library))
        except _Ended as error:
            raise CompileError(f"NVRTC crashed while it compiled {name}: {error}", source=source) from error


def _in_worker(library: str, request: list[bytes], job: Job, worker: _Worker) -> Result:
    try:
        job.runs_in(worker)
        answer = worker.ask(request)
        job.runs_in(None)
    except BaseException:
        worker.close()
        raise
    _pool.give_back(library, worker)
    return program.unpack_answer(answer)


def here(library: str, source: str, name: str, options: Sequence[str], headers: Mapping[str, bytes]) -> Result:
    """Compile in this process and thread. A signal is handled at its end, unless another thread receives it."""
    with _signals_held_back():
        return _library_here(library).compile(source, name, options, headers)


@functools.lru_cache(maxsize=4)
def _library_here(path: str) -> program.Library:
    return program.Library(path)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT_BY_NVRTC)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Ended(Exception):
    """A compiling process has ended. The message says how."""


class _Worker:
    """One compiling process, seen from here."""

    def __init__(self, library: str) -> None:
        import socket
        import subprocess

        if not sys.executable or getattr(sys, "frozen", False) or not os.path.isfile(program.__file__):
            raise CannotStart("there is no interpreter to start")
        # What NVRTC reads there would change results without being part of any cache key.
        environment = {name: text for name, text in os.environ.items() if name != "NVRTC_APPEND_FLAGS"}
        command = [sys.executable, "-I", "-S", "-B", program.__file__, library]
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise CannotStart(str(error)) from error
        self._socket: socket.socket = ours
        try:
            with theirs:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=environment,
                    start_new_session=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            ours.close()
            raise CannotStart(str(error)) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def greet(self) -> None:
        """Wait until it is ready. Raises `CannotStart`, or `NVRTCError` when it cannot load NVRTC."""
        self._socket.settimeout(_START_S)
        try:
            greeting, *problem = program.read_frame(self._socket.recv)
        except (OSError, EOFError, ValueError) as error:
            raise CannotStart(str(error)) from error
        if greeting != program.GREETING:
            raise CannotStart(f"{sys.executable} is no interpreter")
        if problem:
            raise program.NVRTCError(problem[0].decode(errors="replace"))
        self._socket.settimeout(None)

    def ask(self, request: list[bytes]) -> list[bytes]:
        """Ask for one compilation, and wait for the answer. Raises `_Ended`."""
        import socket

        # Without the flag, a dead peer would be a SIGPIPE, which a program may have left deadly.
        flags = getattr(socket, "MSG_NOSIGNAL", 0)
        try:
            program.write_frame(request, lambda data: self._socket.sendall(data, flags))
            return program.read_frame(self._socket.recv)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise _Ended(self._how_it_ended() or str(error)) from error

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}" if code else ""

    def hang_up(self) -> None:
        """Make the worker end. Whoever talks to it gets `_Ended`, and cleans up. Safe at any moment, in any thread."""
        import socket

        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the worker and leave nothing of it behind: no descriptor, no zombie."""
        import subprocess

        self._socket.close()
        # A crash needs a moment to become a status: the socket closes before the process is gone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Let go of the process in a child of a fork: it belongs to the parent."""
        self._socket.close()
        self._process.returncode = 0  # else Popen would look after a process that is no child of this one


class _Pool:
    """The processes that wait for work, and all that are alive."""

    def __init__(self) -> None:
        affinity = getattr(os, "sched_getaffinity", None)
        self.slots = threading.BoundedSemaphore(max(1, len(affinity(0)) if affinity else os.cpu_count() or 1))
        self._lock = threading.Lock()
        self._idle: list[tuple[str, _Worker]] = []
        self._alive: list[_Worker] = []

    def take(self, library: str) -> _Worker:
        """Take a worker that waits, else start one."""
        with self._lock:
            for index, (loaded, worker) in enumerate(self._idle):
                if loaded == library:
                    del self._idle[index]
                    return worker
        return _start(library)

    def give_back(self, library: str, worker: _Worker) -> None:
        with self._lock:
            self._idle.append((library, worker))

    def add(self, worker: _Worker) -> None:
        with self._lock:
            self._alive = [other for other in self._alive if other._process.returncode is None]
            self._alive.append(worker)

    def alive(self) -> list[_Worker]:
        with self._lock:
            return [worker for worker in self._alive if worker._process.returncode is None]

    def end(self) -> None:
        """End all workers, at exit."""
        with self._lock:
            alive, self._alive, self._idle = self._alive, [], []
        for worker in alive:
            worker.hang_up()
        for worker in alive:
            worker.close()

    def forget(self) -> None:
        for worker in self._alive:
            worker.forget()


def _start(library: str) -> _Worker:
    worker = _Worker(library)
    _pool.add(worker)
    try:
        worker.greet()
    except BaseException:
        worker.close()
        raise
    return worker


_pool = _Pool()


def alive() -> list[_Worker]:
    """Return the compiling processes of this one."""
    return _pool.alive()


def end() -> None:
    """End the compiling processes. The next compilation starts one again."""
    _pool.end()


def _after_fork() -> None:
    global _pool
    _pool.forget()
    _pool = _Pool()  # the locks of the old one may be held by threads that do not exist here


def _register() -> None:
    import atexit

    atexit.register(end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


_register()
