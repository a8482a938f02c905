"""The environment variables that cuattn reads: one table, one reader.

Variables are read when they are needed, not at import, so a program may set them at any time before the call that they
concern. An empty value counts as not set.

Examples
--------
>>> import os
>>> from cuattn import environment
>>> os.environ["CUATTN_HOST_SEED"] = "7"
>>> environment.host_seed()
7
>>> del os.environ["CUATTN_HOST_SEED"]
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuattn.errors import CuattnWarning, EnvironmentVariableError

PREFIX = "CUATTN_"

#: Architectures that the host executor compiles for. Names with ``a`` are architecture-specific (wgmma and the like).
HOST_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")
#: Checkers of the host executor.
HOST_CHECKS = ("mem", "init", "race")
#: When an asynchronous copy lands on the host executor.
HOST_ASYNC_MODES = ("eager", "late", "random")


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Attributes
    ----------
    name : str
    default : str
        The text that stands for the variable when it is not set.
    parse : callable
        Text to value. Raises `ValueError` for a text that is not allowed.
    allowed : str
        What may be written, for error messages and the documentation.
    doc : str
    """

    name: str
    default: str
    parse: Callable[[str], Any]
    allowed: str
    doc: str


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return parse


def _subset_of(*choices: str) -> Callable[[str], frozenset[str]]:
    def parse(text: str) -> frozenset[str]:
        words = frozenset(word.strip() for word in text.split(","))
        if words == {"all"}:
            return frozenset(choices)
        if words == {"none"}:
            return frozenset()
        if not words <= frozenset(choices):
            raise ValueError(text)
        return words

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text, 10)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _threads(text: str) -> int:
    if text != "auto":
        return _integer(1, 4096)(text)
    if hasattr(os, "sched_getaffinity"):  # honors taskset and container limits; not on every platform
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cache_dir(text: str) -> Path:
    if text:
        parts = Path(text).parts
        return _home().joinpath(*parts[1:]) if parts[0] == "~" else Path(text).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and must be ignored.
    base = Path(xdg) if os.path.isabs(xdg) else _home() / ".cache"
    return base / "cuattn"


def _home() -> Path:
    """The home directory: ``$HOME`` if that is a path, else the one of the user database. Raises `RuntimeError`."""
    home = os.environ.get("HOME", "")
    if os.path.isabs(home):
        return Path(home)
    try:
        import pwd

        home = pwd.getpwuid(os.geteuid()).pw_dir
    except (ImportError, KeyError):  # not POSIX; a user without an entry
        return Path.home()
    if not os.path.isabs(home):
        raise RuntimeError("there is no home directory")
    return Path(home)


def _command(text: str) -> tuple[str, ...]:
    import shlex  # here, because it is rarely needed and this module is on the way of every import

    return tuple(shlex.split(text))


def _nvrtc(text: str) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


_ALL = (
    Variable(
        "CUATTN_CACHE_DIR",
        "",
        _cache_dir,
        "a directory that belongs to you and that others cannot write",
        "Where compiled kernels are kept. Default: $XDG_CACHE_HOME/cuattn, else ~/.cache/cuattn; see below.",
    ),
    Variable(
        "CUATTN_CHECK",
        "0",
        _flag,
        "0 or 1",
        "1: wait for the GPU to check what only it knows: lengths, page indices, slots, positions.",
    ),
    Variable(
        "CUATTN_CC",
        "",
        _command,
        "a command line, such as: gcc-12 -m64",
        "C compiler for the host executor. Default: $CC, else the first of cc, gcc, clang.",
    ),
    Variable(
        "CUATTN_NVRTC",
        "",
        _nvrtc,
        "a file libnvrtc.so.*, or a folder that has one: a CUDA toolkit, for example",
        "The compiler. Default: that of the environment, as CuPy finds it. Read once, when a kernel is first needed.",
    ),
    Variable(
        "CUATTN_HOPPER",
        "auto",
        _one_of("auto", "off"),
        "auto or off",
        "off: compute capability 9.0 takes the portable kernels, too, instead of those of its own instructions.",
    ),
    Variable(
        "CUATTN_HOST_ARCH",
        "sm_80",
        _one_of(*HOST_ARCHS),
        "one of " + ", ".join(HOST_ARCHS),
        "Architecture whose PTX the host executor runs.",
    ),
    Variable(
        "CUATTN_HOST_THREADS",
        "auto",
        _threads,
        "auto, or a number from 1 to 4096",
        "Threads of the host executor; auto is one for each core that the process may use.",
    ),
    Variable(
        "CUATTN_HOST_CHECK",
        "none",
        _subset_of(*HOST_CHECKS),
        "all, none, or a comma-separated list of " + ", ".join(HOST_CHECKS),
        "Checkers that the host executor starts with.",
    ),
    Variable(
        "CUATTN_HOST_ASYNC",
        "eager",
        _one_of(*HOST_ASYNC_MODES),
        "one of " + ", ".join(HOST_ASYNC_MODES),
        "When asynchronous copies land: at once, as late as the kernel's waits allow, or at a seeded random moment.",
    ),
    Variable(
        "CUATTN_HOST_ISA",
        "auto",
        _one_of("auto", "v4", "v3", "base"),
        "auto, v4 (AVX-512), v3 (AVX2) or base",
        "Instruction set of the host executor's handlers; auto is the best that the processor has.",
    ),
    Variable(
        "CUATTN_HOST_SEED",
        "0",
        _integer(0, 2**63 - 1),
        "a number from 0 to 2**63 - 1",
        "Seed of the host executor's random choices.",
    ),
)

#: Name to `Variable`, read-only.
VARIABLES: Mapping[str, Variable] = types.MappingProxyType({variable.name: variable for variable in _ALL})

_warned: set[str] = set()
_parsed: dict[str, tuple[str, Any]] = {}  # the last text of a variable and its value: a call asks for several


def read(name: str) -> Any:
    """Read and parse the variable `name`.

    Raises
    ------
    EnvironmentVariableError
        The variable is set to something that is not allowed. The message names what is.
    """
    variable = VARIABLES[name]
    if "checked" not in _warned:
        warn_unknown()
    given = os.environ.get(name, "")
    known = _parsed.get(name)
    if known is not None and known[0] == given:
        return known[1]
    text = given.strip() or variable.default
    try:
        value = variable.parse(text)
        if not isinstance(value, Path):  # which may stand for another place tomorrow
            _parsed[name] = given, value
        return value
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # the last two: no home, no current folder
        raise EnvironmentVariableError(f"{name}={text!r} is not allowed: use {variable.allowed}") from error


def warn_unknown() -> None:
    """Warn, once a process and name, about set variables that start with ``CUATTN_`` and mean nothing."""
    _warned.add("checked")
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in VARIABLES and name not in _warned:
            _warned.add(name)
            import difflib  # here, for the same reason as shlex above

            near = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(VARIABLES)}"
            warnings.warn(f"environment variable {name} is not known to cuattn{hint}", CuattnWarning, stacklevel=3)


def cache_dir() -> Path:
    """``CUATTN_CACHE_DIR`` as an absolute path. It need not exist."""
    value: Path = read("CUATTN_CACHE_DIR")
    return value


def check() -> bool:
    """``CUATTN_CHECK``: whether a call waits for the GPU to check lengths and indices that lie there."""
    value: bool = read("CUATTN_CHECK")
    return value


def c_compiler() -> tuple[str, ...]:
    """``CUATTN_CC`` as an argument list; empty when not set."""
    value: tuple[str, ...] = read("CUATTN_CC")
    return value


def nvrtc() -> Path | None:
    """``CUATTN_NVRTC`` as an absolute path; None when not set."""
    value: Path | None = read("CUATTN_NVRTC")
    return value


def hopper() -> str:
    """``CUATTN_HOPPER``: ``"auto"`` or ``"off"``."""
    value: str = read("CUATTN_HOPPER")
    return value


def host_arch() -> str:
    """``CUATTN_HOST_ARCH``, such as ``"sm_80"``."""
    value: str = read("CUATTN_HOST_ARCH")
    return value


def host_threads() -> int:
    """``CUATTN_HOST_THREADS`` as a number, at least 1."""
    value: int = read("CUATTN_HOST_THREADS")
    return value


def host_check() -> frozenset[str]:
    """``CUATTN_HOST_CHECK`` as a subset of ``{"mem", "init", "race"}``."""
    value: frozenset[str] = read("CUATTN_HOST_CHECK")
    return value


def host_isa() -> str:
    """``CUATTN_HOST_ISA``: ``"auto"``, ``"v4"``, ``"v3"`` or ``"base"``."""
    value: str = read("CUATTN_HOST_ISA")
    return value


def host_async() -> str:
    """``CUATTN_HOST_ASYNC``: ``"eager"``, ``"late"`` or ``"random"``."""
    value: str = read("CUATTN_HOST_ASYNC")
    return value


def host_seed() -> int:
    """``CUATTN_HOST_SEED``."""
    value: int = read("CUATTN_HOST_SEED")
    return value
