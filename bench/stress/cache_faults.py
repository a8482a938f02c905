"""Faults in the disk cache: ``python -m bench.stress.cache_faults --count 200``.

A cache that holds a kernel, its tables and the host executor's library is copied, one thing in the copy is damaged, and
a new process calls the kernel with it. It must give the right result: not another one, nor an exception, nor end by a
signal, nor hang. Rebuilding the library is made cheap by a compiler that hands out a copy of it.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 180
STRANGER = 12345  # a user who is not this one
VICTIMS = (".ptx", ".ptx.meta", ".tables", ".tables.meta", ".so", ".so.meta")

Fault = Callable[[Path, random.Random], object]


def _truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _random_bytes(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice((0, 1, 100, path.stat().st_size))))


def _with_valid_checksum(path: Path, draw: random.Random) -> None:
    """Foreign contents that the checksum vouches for: noise, or a library that is another one."""
    from cuattn.compile import cache

    data = path.parent / path.name.removesuffix(".meta")
    meta = path.with_name(f"{data.name}.meta")
    text = meta.read_bytes().partition(b"\n")[2]
    if path == meta:
        text = draw.choice((b"", b"{}", b"[" * 100_000, b'{"resources": 3, "log": 1}', draw.randbytes(40)))
    elif data.suffix == ".so":
        other = Path(sys.modules["_ctypes"].__file__ or "")
        data.write_bytes(other.read_bytes())
    elif data.suffix == ".tables":
        whole = data.read_bytes()
        data.write_bytes(
            draw.choice((draw.randbytes(500), whole[: draw.randrange(len(whole))], whole[:8] + b"\xff" * 64))
        )
    else:
        data.write_bytes(draw.choice((b"", b".version 7.1\n.target sm_80\n", draw.randbytes(500))))
    meta.write_bytes(cache._head(data.name, data.read_bytes(), text) + b"\n" + text)


def _replace_by(make: Callable[[Path], object]) -> Fault:
    def fault(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return fault


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "a file").write_text("of somebody")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def _swapped(path: Path, draw: random.Random) -> None:
    """Put an entry with its meta file under the name of another one."""
    data = path.parent / path.name.removesuffix(".meta")
    other = next(x for x in sorted(path.parent.iterdir()) if x.suffix in (".ptx", ".tables", ".so") and x != data)
    for suffix in ("", ".meta"):
        shutil.copyfile(other.with_name(other.name + suffix), data.with_name(data.name + suffix))


FILE_FAULTS: dict[str, Fault] = {
    "truncated": _truncate,
    "bits flipped": _flip,
    "random bytes": _random_bytes,
    "foreign, valid checksum": _with_valid_checksum,
    "swapped": _swapped,
    "gone": _replace_by(lambda path: None),
    "an empty folder": _replace_by(os.mkdir),
    "a full folder": _replace_by(_full_folder),
    "a FIFO": _replace_by(os.mkfifo),
    "a socket": _replace_by(_socket),
    "a link to /dev/full": _replace_by(lambda path: path.symlink_to("/dev/full")),
    "a link to /dev/zero": _replace_by(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replace_by(lambda path: path.symlink_to(path.name)),
    "a terabyte of nothing": _replace_by(_huge),
    "writable by its group": lambda path, draw: path.chmod(0o620),
    "writable by everybody": lambda path, draw: path.chmod(0o602),
    "of another user": lambda path, draw: os.chown(path, STRANGER, -1),
}
FOLDER_FAULTS: dict[str, Fault] = {
    "folder gone": lambda path, draw: shutil.rmtree(path),
    "folder is a file": lambda path, draw: (shutil.rmtree(path), path.touch()),
    "folder is a FIFO": lambda path, draw: (shutil.rmtree(path), os.mkfifo(path)),
    "folder is a dangling link": lambda path, draw: (shutil.rmtree(path), path.symlink_to("nowhere")),
    "folder writable by its group": lambda path, draw: path.chmod(0o770),
    "folder writable by everybody": lambda path, draw: path.chmod(0o777),
    "folder of another user": lambda path, draw: os.chown(path, STRANGER, -1),
    "disk full": lambda path, draw: [file.unlink() for file in path.iterdir() if file.suffix != ".so"],
    "cleared all the time": lambda path, draw: None,
}


def prepare(folder: Path) -> Path:
    """A cache with everything that one call needs, and beside it the compiler; returns the cache."""
    from cuattn.compile import cache
    from cuattn.host import build, library

    name = build.library_name()
    library.load()
    installed = Path(library.__file__).with_name("native") / name
    data = installed.read_bytes() if installed.exists() else cache.read(name.removesuffix(".so"), ".so")
    assert data is not None
    ready = folder / "ready"
    (folder / "library.so").write_bytes(data)
    compiler = folder / "cc"
    compiler.write_text(f"""#!/bin/sh
all="$*"
while [ "$1" != -o ]; do shift; done
case "$all" in *-shared*) cp "{folder}/library.so" "$2" ;; *) : > "$2" ;; esac
""")
    compiler.chmod(0o755)
    done = _call(folder, ready, "prepare")
    if done.stdout.strip() != "right":
        raise RuntimeError(f"the call fails without a fault: {done.stdout} {done.stderr[-800:]}")
    return ready


def _call(folder: Path, cache: Path, fault: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "CUATTN_CACHE_DIR": str(cache), "CUATTN_CC": str(folder / "cc"), "CUATTN_HOST_THREADS": "1",
        "TMPDIR": str(folder),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--inside", fault]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def _inside(fault: str) -> str:
    """Call the kernel, in a process of its own, several times where the cache changes meanwhile."""
    import numpy as np

    import cuattn
    from cuattn import errors, reference
    from cuattn.compile import cache
    from cuattn.host import module
    from cuattn.runtime import executor as executors

    place = os.environ["CUATTN_CACHE_DIR"]
    if fault == "disk full":
        replace = cache._replace

        def full(path: Path, data: bytes) -> None:
            if str(path).startswith(place):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(path, data)

        cache._replace = full
    over = threading.Event()
    calls = 1
    if fault == "cleared all the time":
        calls = 4
        threading.Thread(target=lambda: [cache.clear() for _ in iter(over.is_set, True)], daemon=True).start()
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8)
    wanted = reference.softmax(x)
    try:
        for _ in range(calls):
            cuattn.compile.forget()
            module._translate.cache_clear()
            executors.host_executor.cache_clear()
            if not np.allclose(cuattn.softmax(x), wanted, atol=1e-5):
                return "wrong"
    except errors.CuattnError as error:
        return f"typed error {type(error).__name__}: {error}"
    finally:
        over.set()
    return "right"


def run(count: int, seed: int) -> list[str]:
    """Inject ``count`` faults; returns what was wrong."""
    faults = [(name, victim) for name in FILE_FAULTS for victim in VICTIMS] + [(name, "") for name in FOLDER_FAULTS]
    if os.geteuid() != 0:  # only the superuser can give files away
        faults = [fault for fault in faults if "of another user" not in fault[0]]
    draw = random.Random(seed)
    draw.shuffle(faults)
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ready = prepare(folder)
        # The C library is none of the cache's where the installation has one.
        faults = [(name, victim) for name, victim in faults if not victim or any(ready.glob(f"*{victim}"))]
        for number in range(count):
            name, victim = faults[number % len(faults)]
            cache = folder / f"cache{number}"
            shutil.copytree(ready, cache)
            if victim:
                FILE_FAULTS[name](draw.choice(sorted(cache.glob(f"*{victim}"))), draw)
            else:
                FOLDER_FAULTS[name](cache, draw)
            try:
                done = _call(folder, cache, name)
            except subprocess.TimeoutExpired:
                outcome, problem = "hangs", "it hangs"
            else:
                outcome = done.stdout.strip() if done.returncode == 0 else f"exit status {done.returncode}"
                # Only a kernel that the checksum vouches for, and that is none, cannot be made anew.
                may_raise = (name, victim) == ("foreign, valid checksum", ".ptx") and outcome.startswith("typed")
                problem = "" if outcome == "right" or may_raise else f"{outcome}: {done.stderr[-800:]}"
            outcomes[outcome.partition(":")[0]] += 1
            if problem:
                problems.append(f"{number}: {victim or 'cache'} {name}: {problem}")
            if cache.is_dir() and not cache.is_symlink():
                shutil.rmtree(cache)
    print(", ".join(f"{amount} {what}" for what, amount in sorted(outcomes.items())), flush=True)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(_inside(arguments.inside))
        return 0
    problems = run(arguments.count, arguments.seed)
    print("\n".join(problems) or "nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
