"""Builds the interpreter: C sources → one shared library. The same builder serves the installation and the first use.

This file stands alone (standard library only), so that ``setup.py`` can load it by path. The sources are one
translation unit, compiled once for each instruction set; the library picks at load what the processor has.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).with_name("c")

# No fast-math: NaN, infinities, signed zeros and rounding are what is being executed. Contraction would fuse what the
# kernel keeps apart. Neither errno nor floating-point traps are looked at, which is what lets loops vectorise.
FLAGS = (
    "-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
    "-fno-strict-aliasing", "-Wno-psabi",
)  # fmt: skip

#: Instruction sets by machine, the plainest first; a compiler that does not know one leaves it out.
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"base": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512")},
}


class BuildError(RuntimeError):
    """The interpreter could not be compiled. The message says why, with the compiler's words."""


def find_compiler(preferred: Sequence[str] = ()) -> tuple[str, ...]:
    """The C compiler: ``preferred``, else ``$CC``, else the first of cc, gcc, clang."""
    if preferred:
        if not shutil.which(preferred[0]):
            raise BuildError(f"the C compiler {preferred[0]!r} (CUATTN_CC) was not found")
        return tuple(preferred)
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = name.split()
        if words and shutil.which(words[0]):
            return tuple(words)
    raise BuildError("no C compiler was found: install gcc or clang, or name one in CUATTN_CC")


def source_hash() -> str:
    """Return a hash of everything that decides what the library does."""
    digest = hashlib.sha256(repr((FLAGS, ISAS)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name() -> str:
    """Return the file name of the library that belongs to these sources on this machine."""
    return f"cuattn_host-{platform.machine().lower()}-{source_hash()}.so"


def build(output_dir: Path, compiler: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """Compile the interpreter into ``output_dir``, with ``flags`` behind the usual ones; returns the library's path.

    Raises `BuildError`.

    The file appears whole or not at all, so several processes may build at once.
    """
    if sys.platform == "win32":
        raise BuildError("the host executor needs POSIX threads; on Windows use WSL")
    command = find_compiler(compiler)
    output_dir.mkdir(parents=True, exist_ok=True)
    target = output_dir / library_name()
    isas = ISAS.get(platform.machine().lower().replace("amd64", "x86_64"), {"base": ()})
    with tempfile.TemporaryDirectory() as scratch:
        running: dict[str, tuple[Path, subprocess.Popen[str]]] = {}
        source = str(SOURCES / "executor.c")
        try:
            for isa, isa_flags in isas.items():
                obj = Path(scratch, f"executor_{isa}.o")
                argv = [*command, *FLAGS, *flags, *isa_flags, f"-DISA={isa}", "-c", source, "-o", str(obj)]
                process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                running[isa] = (obj, process)
            logs = {isa: process.communicate()[0] for isa, (_, process) in running.items()}
        except BaseException:  # Ctrl-C: no compiler may go on in a folder that vanishes
            for _, process in running.values():
                process.kill()
                process.communicate()
            raise
        built = [isa for isa, (_, process) in running.items() if process.returncode == 0]
        if "base" not in built:
            raise BuildError(f"{' '.join(command)} cannot compile the host executor:\n{logs['base'].strip()}")
        objects = [str(running[isa][0]) for isa in built]
        defines = [f"-DHAVE_{isa}" for isa in built]
        dispatch = str(SOURCES / "dispatch.c")
        library = Path(scratch, target.name)
        argv = [
            *command,
            *FLAGS,
            *flags,
            *defines,
            "-shared",
            dispatch,
            *objects,
            "-o",
            str(library),
            "-lpthread",
            "-lm",
        ]
        linked = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if linked.returncode:
            raise BuildError(f"{' '.join(command)} cannot link the host executor:\n{linked.stdout.strip()}")
        fresh = output_dir / f".{target.name}.{os.getpid()}"
        shutil.copyfile(library, fresh)
        fresh.chmod(0o755)
        os.replace(fresh, target)
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
