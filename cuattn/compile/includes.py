"""Which files a source may make the compiler read, and what is in them: a part of every cache key.

NVRTC does not tell what it has read. So the directives are found by their text, in comments and in branches that are
not taken as well, and each name is looked up wherever the compiler could look it up. What is found is at least what is
read: it may build once too often, never too seldom. A name that only the preprocessor could compute makes the source
*volatile*: its binaries are not taken from the cache. Headers of CUDA are known by the version of the toolkit.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SPLICE = re.compile(rb"\\[ \t]*\r?\n")
_COMMENT = rb"/\*[^*]*\*+(?:[^/*][^*]*\*+)*/"
_GAP = rb"(?:[ \t]|" + _COMMENT + rb")*"
_DIRECTIVE = re.compile(rb"#" + _GAP + rb"(?:include_next|include|import|embed)\b" + _GAP + rb"([^\n]*)")
_QUESTION = re.compile(rb"\b__has_(?:include|include_next|embed)\b" + _GAP + rb"(\(?)[ \t]*([^\n]*)")
_ASKS_FOR_OPERATOR = re.compile(rb"(?:ifn?def|defined|defined[ \t]*\()[ \t]*$")
_NAME = re.compile(rb'<([^>\n]+)>|"([^"\n]+)"')
_IN_VALUE = re.compile(rb"/[/*].*|[ \t\r]+$", re.DOTALL)  # what follows a macro's value or an operand
_MACRO = re.compile(rb"[A-Za-z_]\w*")
_STRING = re.compile(rb'"([^"\\]+)"')
_DEFINITION = re.compile(rb"#[ \t]*define[ \t]+([A-Za-z_]\w*)[ \t]+([^\n]*)")
_PCH = ("-pch", "--pch", "--use-pch", "--create-pch", "--pch-dir", "-use-pch", "-create-pch")
_FOLDER = ("--include-path", "-I")
_BEFORE = ("--pre-include", "-include")
_DEFINE = ("--define-macro", "-D")


@dataclass(slots=True)
class Includes:
    """What a source reads besides the headers of CUDA.

    Attributes
    ----------
    files : dict of str to str
        Path to a hash of its contents, or to what is there instead.
    volatile : bool
        Whether there may be more than that.
    """

    files: dict[str, str] = field(default_factory=dict)
    volatile: bool = False

    def digest(self) -> str:
        """Stands for all of `files`; empty when there are none."""
        return hashlib.sha256(repr(sorted(self.files.items())).encode()).hexdigest() if self.files else ""


def find(text: str, name: str, options: Sequence[str], toolkit: Path | None) -> Includes:
    """Everything that NVRTC may read for a source, which seems to lie at ``name``, with these options."""
    place = name if name.startswith("/") else f"/{name}"
    return _Search(options, toolkit).run(text.encode(), os.path.dirname(place))


class _Search:
    def __init__(self, options: Sequence[str], toolkit: Path | None) -> None:
        self._toolkit = toolkit
        self._folders = [os.path.abspath(folder) for folder in _values(options, _FOLDER)]
        self._before = list(_values(options, _BEFORE))
        self._macros: dict[bytes, list[bytes]] = {}
        self._pending: list[tuple[bytes, str]] = []  # texts that have not been looked at, and their folders
        self._computed: list[tuple[bytes, str]] = []  # operands that are no names, and the folder of their file
        self._result = Includes(volatile=any(option.startswith(_PCH) for option in options))
        for definition in _values(options, _DEFINE):
            macro, _, value = definition.encode().partition(b"=")
            self._macros.setdefault(macro.strip(), []).append(value)

    def run(self, text: bytes, folder: str) -> Includes:
        for name in self._before:
            self._look_up(name, os.getcwd())
        self._scan(text, folder, is_source=True)
        while self._pending or self._computed:
            if self._pending:
                self._scan(*self._pending.pop(), is_source=False)
            else:  # names that macros stand for, once every definition is known
                self._compute(*self._computed.pop())
        return self._result

    def _scan(self, text: bytes, folder: str, *, is_source: bool) -> None:
        if b"\\" in text:
            text = _SPLICE.sub(b"", text)
        if b"%:" in text:
            text = text.replace(b"%:", b"#")  # the same token
        for match in _DIRECTIVE.finditer(text):
            self._operand(match[1], folder, is_source)
        if b"__has_" in text:
            for match in _QUESTION.finditer(text):
                if match[1]:
                    self._operand(match[2], folder, is_source)
                elif not _ASKS_FOR_OPERATOR.search(text, max(0, match.start() - 40), match.start()):
                    self._result.volatile = True  # the operator by another name
        for match in _DEFINITION.finditer(text):
            self._macros.setdefault(match[1], []).append(match[2])

    def _operand(self, operand: bytes, folder: str, is_source: bool) -> None:
        match = _NAME.match(operand)
        if match is None:
            self._computed.append((operand, folder))
            return
        name = os.fsdecode(match[1] or match[2])
        # Headers of CUDA that the source itself names are handed to the compiler; no folder is searched for them.
        if not (is_source and "/" not in name and self._toolkit and (self._toolkit / name).is_file()):
            self._look_up(name, folder)

    def _compute(self, operand: bytes, folder: str) -> None:
        """Look up what ``#include OPERAND`` may mean: the strings that the definitions of a macro spell out."""
        pending, seen = [operand], set()
        while pending:
            value = _IN_VALUE.sub(b"", pending.pop().strip())
            if match := _STRING.fullmatch(value):
                self._look_up(os.fsdecode(match[1]), folder)
            elif _MACRO.fullmatch(value) and value in self._macros:
                pending += self._macros[value] if value not in seen else ()
                seen.add(value)
            else:
                self._result.volatile = True

    def _look_up(self, name: str, folder: str) -> None:
        for place in (folder, *self._folders):
            self._read(os.path.join(place, name))

    def _read(self, path: str) -> None:
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)  # one name for one folder, so that no cycle of includes goes on for ever
        path = os.path.join(folder, name)
        if path in self._result.files or (self._toolkit and path.startswith(f"{self._toolkit}/")):
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            self._result.files[path] = f"no file: {error.args[0]}"
            return
        try:
            kind = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(kind):
                self._result.files[path] = f"no file but {stat.S_IFMT(kind):o}"
                return
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read()
        finally:
            os.close(descriptor)
        self._result.files[path] = hashlib.sha256(data).hexdigest()
        self._pending.append((data, folder))


def _values(options: Sequence[str], names: tuple[str, ...]) -> Iterator[str]:
    """Values of an option that is written ``-Ivalue``, ``-I=value``, ``-I value`` or as two strings."""
    for index, option in enumerate(options):
        for name in names:
            if option == name:
                yield from options[index + 1 : index + 2]
            elif option.startswith(name) and (len(name) == 2 or option[len(name)] in "= "):
                yield option[len(name) :].lstrip("= ")
            else:
                continue
            break
