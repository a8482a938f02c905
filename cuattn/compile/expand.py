"""One self-contained source string from a kernel file, the headers it includes, and its constants.

``#include "x.cuh"`` is replaced by the file's text, once each. ``#line`` directives with virtual absolute paths
(``/cuattn/kernels/x.cuh``) keep every message and every line table on the file that a reader knows, and make the PTX
independent of where the package lives and of the current folder. System includes stay.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from cuattn.errors import ArgumentError, CompileError

Constant: TypeAlias = int | bool | float | str

#: Where the kernels seem to live, in error messages and line tables.
VIRTUAL_ROOT = "/cuattn/kernels/"
#: The kernels of this package.
KERNELS = Path(__file__).resolve().parent.parent / "kernels"

_KERNEL_NAME = re.compile(r"[A-Za-z_]\w*(?:/[A-Za-z_]\w*)*")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_CONDITION = re.compile(r"\s*#\s*(if|ifdef|ifndef|endif)\b")
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
# The header that declares a type which a constant may name.
_TYPE_HEADERS = (("__half", "cuda_fp16.h"), ("__nv_bfloat16", "cuda_bf16.h"), ("__nv_fp8", "cuda_fp8.h"))


def expand(kernel: str, constants: Mapping[str, Constant], directory: Path) -> str:
    """The expanded source of ``<directory>/<kernel>.cu``. See `cuattn.compile.source`."""
    if not _KERNEL_NAME.fullmatch(kernel) or not (directory / f"{kernel}.cu").is_file():
        known = ", ".join(kernel_names(directory)) or "none"
        raise ArgumentError(f"kernel={kernel!r} does not exist: there are {known}")
    lines = [f"// {kernel}.cu with its headers and constants; #line names the file that the lines after it are from."]
    lines += [f'#line 1 "{VIRTUAL_ROOT}{kernel}.constants"', *prologue(constants)]
    _expand_file(f"{kernel}.cu", directory, lines, set())
    return "\n".join(lines) + "\n"


def header(relative: str, directory: Path = KERNELS) -> str:
    """The text of one header with those that it includes, for a source that is no file."""
    lines: list[str] = []
    _expand_file(relative, directory, lines, set())
    return "\n".join(lines) + "\n"


def kernel_names(directory: Path = KERNELS) -> list[str]:
    """Names that `expand` accepts, sorted."""
    return sorted(path.relative_to(directory).with_suffix("").as_posix() for path in directory.rglob("*.cu"))


def prologue(constants: Mapping[str, Constant]) -> list[str]:
    """The lines that define `constants`, sorted by name, so that their order in the mapping changes nothing."""
    types = " ".join(value for value in constants.values() if isinstance(value, str))
    headers = [f"#include <{header}>" for prefix, header in _TYPE_HEADERS if prefix in types]
    return headers + [_definition(name, constants[name]) for name in sorted(constants)]


def _definition(name: str, value: object) -> str:
    if not _IDENTIFIER.fullmatch(name):
        raise ArgumentError(f"constant {name!r} is not a C identifier")
    if isinstance(value, str):
        return f"using {name} = {value};"
    # NumPy scalars count as what they hold: np.bool_ has no __index__, and np.float32 is no float.
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return f"constexpr bool {name} = {'true' if value else 'false'};"
    if hasattr(value, "__index__"):
        number = operator.index(value)
        if -(2**31) < number < 2**31:
            return f"constexpr int {name} = {number};"
        if -(2**63) < number < 2**63:
            return f"constexpr long long {name} = {number}LL;"
        raise ArgumentError(f"constant {name} = {number} does not fit 64 bits")
    if hasattr(value, "__float__"):
        real = float(value)
        if not math.isfinite(real):
            raise ArgumentError(f"constant {name} = {real} is not finite")
        return f"constexpr float {name} = {real!r}f;"
    raise ArgumentError(f"constant {name} has type {type(value).__name__}: use bool, int, float or str")


def _expand_file(relative: str, directory: Path, out: list[str], seen: set[str]) -> None:
    seen.add(relative)
    text, code = _read(directory / relative)
    out.append(f'#line 1 "{VIRTUAL_ROOT}{relative}"')
    depth = 0
    for number, (line, bare) in enumerate(zip(text, code, strict=True), start=1):
        condition = _CONDITION.match(bare)
        if condition:
            depth += -1 if condition[1] == "endif" else 1
        include = _INCLUDE.match(bare)
        if include:
            target = _resolve(include[1], relative, number, directory)
            if depth:
                # Expanded once each: were this branch not taken, the text would be missing everywhere.
                _refuse(relative, number, line, "a kernel header must not be included inside #if; use #pragma once")
            if target in seen:
                out.append("")
            else:
                _expand_file(target, directory, out, seen)
                out.append(f'#line {number + 1} "{VIRTUAL_ROOT}{relative}"')
        else:
            # In the one file that is left, the compiler would warn about #pragma once.
            out.append("" if _ONCE.match(bare) else line)


def _read(path: Path) -> tuple[list[str], list[str]]:
    status = path.stat()
    return _read_version(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _read_version(path: Path, mtime_ns: int, size: int) -> tuple[list[str], list[str]]:
    """Lines of a file, and the same lines without comments. Shared headers are read once, until they change."""
    text = path.read_text(encoding="utf-8")
    bare = _COMMENT_OR_STRING.sub(_blank_comment, text)
    return text.split("\n"), bare.split("\n")


def _blank_comment(match: re.Match[str]) -> str:
    return match[0] if match[0].startswith('"') else " " + "\n" * match[0].count("\n")


def _resolve(name: str, includer: str, number: int, directory: Path) -> str:
    """Path, relative to `directory`, of an included file: beside the includer, else from the root."""
    root = directory.resolve()
    for base in (root / Path(includer).parent, root):
        path = (base / name).resolve()
        if path.is_file() and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    _refuse(includer, number, f'#include "{name}"', "no such file among the kernels")


def _refuse(relative: str, number: int, line: str, reason: str) -> NoReturn:
    log = f"{VIRTUAL_ROOT}{relative}({number}): error: {reason}\n  {line.strip()}"
    raise CompileError(log, log=log)
