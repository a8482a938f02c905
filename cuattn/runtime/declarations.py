"""C declarations of the kernels, read from their sources: structs that are passed by value, and parameters of entries.

The source is the only declaration of either. What is read here is a small part of C: a struct of scalars, of arrays of
them and of other structs, with at most one base; an entry that is declared ``extern "C" __global__``. Anything else
raises.

>>> source = "struct Pair { int first, second; }; struct Line { Pair ends; float width[2]; };"
>>> struct = Declarations(source).struct("Line")
>>> [(member.name, member.type, member.length) for member in struct.members]
[('ends', 'Pair', None), ('width', 'float', 2)]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from cuattn.compile import expand
from cuattn.errors import DeclarationError

__all__ = ["Declarations", "Member", "Parameter", "StructDeclaration", "of_kernel"]

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#[^\n]*(?:\\\n[^\n]*)*", re.MULTILINE)
_STRUCT = (
    r"\bstruct\s+(?:alignas\((?P<align>\d+)\)\s*)?{name}\s*"
    r"(?::\s*(?P<base>\w+)(?:\s*<\s*(?P<base_argument>\w+)\s*>)?\s*)?\{{"
)
_TEMPLATE = re.compile(r"template\s*<\s*typename\s+(\w+)\s*>\s*$")
_MEMBER = re.compile(
    r"(?:const\s+)?((?:unsigned\s+)?(?:long\s+long|char|short|int)|unsigned|\w+)(?:\s*<\s*(\w+)\s*>)?\s+(\w.*)",
    re.DOTALL,
)
_DECLARATOR = re.compile(r"\s*(\w+)\s*(?:\[\s*(\w+)\s*\])?\s*")
_ALIAS = re.compile(r"\busing\s+([\w:]+)\s*=\s*([^;]+);")
_CONSTANT = r"\bconstexpr\s+(?:int|unsigned|long\s+long)\s+{name}\s*=\s*(\d+)\s*;"
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__\w+(?:\((?:[^()]|\([^()]*\))*\))?\s+)*(\w+)\s*\(')


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a struct: ``type`` is a scalar type of C or the name of a struct, ``argument`` the template
    argument of that, ``length`` the extent of an array.
    """

    name: str
    type: str
    argument: str | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True)
class StructDeclaration:
    """A struct as it is declared: ``parameter`` is the name of its template parameter, ``align`` what alignas says."""

    name: str
    members: tuple[Member, ...]
    parameter: str | None
    base: Member | None
    align: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an entry: a pointer, or a value of ``type`` (aliases resolved, with its template argument)."""

    name: str
    type: str
    argument: str | None
    pointer: bool


class Declarations:
    """The declarations of one source text, includes expanded."""

    def __init__(self, source: str) -> None:
        self._text = _DIRECTIVE.sub("", _COMMENT.sub(" ", source))
        # The first of a name, as a search for each would find it: most sources are asked for dozens.
        self._aliases = {name: " ".join(text.split()) for name, text in reversed(_ALIAS.findall(self._text))}

    def struct(self, name: str) -> StructDeclaration:
        """Return the struct called ``name``. Raises `DeclarationError` unless there is exactly one."""
        found = [*re.finditer(_STRUCT.format(name=re.escape(name)), self._text)]
        if len(found) != 1:
            raise DeclarationError(f"the source declares {len(found)} structs called {name}; one is needed")
        match = found[0]
        template = _TEMPLATE.search(self._text[: match.start()].rstrip())
        base = Member("", match["base"], match["base_argument"]) if match["base"] else None
        members = []
        for statement in _statements(self._block(match.end())):
            members += self._members(name, statement)
        return StructDeclaration(name, tuple(members), template and template[1], base, int(match["align"] or 1))

    def entries(self) -> tuple[str, ...]:
        """Names of the entries."""
        return tuple(match[1] for match in _ENTRY.finditer(self._text))

    def parameters(self, entry: str) -> tuple[Parameter, ...]:
        """Return the parameters of an entry, in order. Raises `DeclarationError` if there is no such entry."""
        for match in _ENTRY.finditer(self._text):
            if match[1] == entry:
                end = self._text.index(")", match.end())
                text = self._text[match.end() : end]
                return tuple(self._parameter(entry, part) for part in text.split(",") if part.strip())
        raise DeclarationError(f"the source has no entry {entry}; it has {', '.join(self.entries()) or 'none'}")

    def resolve(self, type_name: str) -> str:
        """Return what an alias stands for; ``type_name`` itself if it is none."""
        return self._aliases.get(type_name, type_name)

    def _parameter(self, entry: str, text: str) -> Parameter:
        words = re.sub(r"\b(?:const|__restrict__|__grid_constant__|typename)\b", " ", text)
        match = re.fullmatch(r"\s*([\w:<>\s]+?)\s*(\*?)\s*(\w+)\s*", words)
        if match is None:
            raise DeclarationError(f"{entry}: cannot read the parameter {' '.join(text.split())!r}")
        type_name, argument = _split_argument(self.resolve(" ".join(match[1].split())))
        return Parameter(match[3], type_name, argument, pointer=bool(match[2]))

    def _members(self, struct: str, statement: str) -> list[Member]:
        match = _MEMBER.fullmatch(statement)
        if match is None:
            self._refuse(struct, statement)
        type_name, argument, declarators = " ".join(match[1].split()), match[2], match[3]
        members = []
        for declarator in declarators.split(","):
            parts = _DECLARATOR.fullmatch(declarator)
            if parts is None:
                self._refuse(struct, statement)
            members.append(Member(parts[1], type_name, argument, self._length(parts[2])))
        return members

    def _length(self, text: str | None) -> int | None:
        if text is None or text.isdigit():
            return None if text is None else int(text)
        match = re.search(_CONSTANT.format(name=text), self._text)
        if match is None:
            raise DeclarationError(f"the source has no constant {text}, an array's length")
        return int(match[1])

    def _block(self, start: int) -> str:
        """Return the text from ``start`` to the brace that closes, without what stands in braces of its own."""
        depth = 1
        kept: list[str] = []
        for character in self._text[start:]:
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return "".join(kept)
            if depth == 1:
                kept.append(";" if character == "}" else character)
        raise DeclarationError("a struct does not end")

    @staticmethod
    def _refuse(struct: str, statement: str) -> NoReturn:
        raise DeclarationError(f"struct {struct}: cannot read the member {statement!r}")


def _statements(block: str) -> list[str]:
    """Yield the statements that declare members; functions, whose bodies are gone, are not among them."""
    statements = (" ".join(part.split()) for part in block.split(";"))
    return [text for text in statements if text and "(" not in text and not text.startswith(("static ", "using "))]


def _split_argument(type_name: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"(\w+)\s*<\s*([\w ]+)\s*>", type_name)
    return (type_name, None) if match is None else (match[1], match[2])


@cache
def of_kernel(source_name: str) -> Declarations:
    """Read the declarations of ``kernels/<source_name>.cu`` and of all that it includes."""
    return Declarations(expand.expand(source_name, {}, expand.KERNELS))
