"""PTX text → instructions.

Reads what NVRTC writes, inline assembly included: several statements on a line, comments anywhere, braces that scope
registers and labels (the same names recur in nested scopes), vectors in braces, ``d|p`` destinations, forward labels.
"""

from __future__ import annotations

import bisect
import re

from ..errors import UnsupportedPTXError
from . import ptx_declarations
from .ptx_module import Entry, Module, SourceLocation
from .ptx_types import (
    Address,
    Imm,
    Instruction,
    Label,
    Negated,
    Operand,
    Pair,
    Reg,
    Sink,
    Special,
    Symbol,
    Vector,
)

MAX_DEPTH = 64  # of braces
MAX_DIRECTIVE = 1024  # a number of threads, registers or CTAs in one direction
MAX_LITERAL = 40  # characters of a number: far more than 64 bits take


class _Scope:
    """A brace-delimited scope: registers and labels, and the operands already resolved in it."""

    __slots__ = ("cache", "counts", "depth", "labels", "parent", "regs", "suffix")

    def __init__(self, parent: _Scope | None, number: int) -> None:
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent else 0
        self.suffix = f"@{number}" if parent else ""
        self.regs: dict[str, Reg] = {}
        self.counts: dict[str, tuple[int, str]] = {}  # of ``%r<9>``, by prefix: how many registers, and their type
        self.labels: dict[str, str] = {}
        self.cache: dict[str, Operand] = {}

    def find_reg(self, name: str) -> Reg | None:
        scope: _Scope | None = self
        prefix = name.rstrip("0123456789")
        while scope:
            if name in scope.regs:
                return scope.regs[name]
            if prefix in scope.counts and scope.is_numbered(name, prefix):
                reg = scope.regs[name] = Reg(name + scope.suffix, scope.counts[prefix][1])
                return reg
            scope = scope.parent
        return None

    def is_numbered(self, name: str, prefix: str) -> bool:
        digits = name[len(prefix) :]
        return 0 < len(digits) <= MAX_LITERAL and str(int(digits)) == digits and int(digits) < self.counts[prefix][0]

    def find_label(self, name: str) -> str | None:
        scope: _Scope | None = self
        while scope:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


# Possessive quantifiers (``*+``) where a text that does not match could otherwise be tried in ever more ways.
_SPACE = re.compile(r"\s*+")
_COMMENT = re.compile(r"/\*.*?(?:\*/|\Z)|//[^\n]*+", re.S)
_LABEL = re.compile(r"([\w$%]++)\s*+:(?!:)")
_LOC = re.compile(
    r"\.loc\s++(\d{1,9})\s++(\d{1,9})\s++(\d{1,9})(?:[^\n]*?inlined_at\s++(\d{1,9})\s++(\d{1,9})\s++(\d{1,9}))?[^\n]*+"
)
_REG = re.compile(r"\.reg\s*+\.(\w++)\s++(.*)", re.S)
_REG_RANGE = re.compile(r"([\w$%]++)<(\d{1,9})>$")
_REG_NAME = re.compile(r"[\w$%]++$")
_ENTRY = re.compile(r"\.entry\s++([\w$]++)\s*+(?:\(([^)]*+)\))?+([^{;]*+)(.?)", re.S)
_VERSION = re.compile(r"\s*+\.version\s++(\d++\.\d++)\s")
_TARGET = re.compile(r"\.target\s++(sm_\d{2,3}[af]?)\b")
_DIRECTIVE = re.compile(r"\.(\w++)([\s\d,]*+)")
_FILE = re.compile(r'\.file\s++(\d{1,9})\s++"([^"\n]*+)"')
_GUARDED = re.compile(r"@(!?)\s*+([\w$%]++)\s++(.*)", re.S)
_OPERANDS = re.compile(r"((?:\{[^{}]*+\}|\[[^\[\]]*+\]|[^,{}\[\]])++)")
_ADDRESS = re.compile(r"([\w$%.]++)\s*+(?:\+\s*+)?(-?\s*+(?:0[xX][0-9a-fA-F]++|\d++))?$")


class _Parser:
    def __init__(self, text: str) -> None:
        self.original = text
        self.text = _COMMENT.sub(lambda m: "\n" * m.group().count("\n") or " ", text)
        self.newlines = [m.start() for m in re.finditer("\n", self.text)]
        self.locations: list[SourceLocation] = []
        self.location_index: dict[tuple[int, int, int], int] = {}

    def line_of(self, position: int) -> int:
        return bisect.bisect_left(self.newlines, position) + 1

    def module(self) -> Module:
        text = self.text
        version, target = _VERSION.match(text), _TARGET.search(text)
        if not version or not target:
            raise UnsupportedPTXError("not PTX: it does not begin with .version and .target directives")
        entries: dict[str, Entry] = {}
        outside: list[str] = []
        position = 0
        while match := _ENTRY.search(text, position):
            outside.append(text[position : match.start()] + ";")
            if match[4] != "{":
                if match[4] != ";":
                    raise UnsupportedPTXError(f"kernel {match[1]}: the text ends before the body")
                position = match.end()  # a declaration only
                continue
            entry = Entry(match[1], ptx_declarations.parameters(match[1], match[2] or ""))
            for directive in _DIRECTIVE.finditer(match[3]):
                entry.directives[directive[1]] = _extents(entry, directive[1], directive[2])
            position = self.body(entry, match.end() - 1)
            if entry.name in entries:
                raise UnsupportedPTXError(f"kernel {entry.name} is defined twice")
            entries[entry.name] = entry
        outside.append(text[position:])
        rest = "".join(outside)
        section = rest.find(".section")
        files = {int(m[1]): m[2] for m in _FILE.finditer(rest)}
        statements = rest[: section if section >= 0 else len(rest)].split(";")
        variables = [v for s in statements if (v := ptx_declarations.variable(s.strip())) and v.space != "local"]
        return Module(version[1], target[1], entries, variables, files, self.locations)

    def body(self, entry: Entry, start: int) -> int:
        """Parse the braces that open at ``start``; returns the position behind them."""
        text = self.text
        scope: _Scope | None = None
        scopes = 0
        location = -1
        position = start
        length = len(text)
        branches: list[tuple[Instruction, _Scope]] = []
        while True:
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing as well
            if position >= length:
                raise UnsupportedPTXError(f"kernel {entry.name}: the text ends inside the body")
            char = text[position]
            if char == "{":
                if scope is not None and scope.depth >= MAX_DEPTH:
                    raise UnsupportedPTXError(f"kernel {entry.name}: more than {MAX_DEPTH} braces in each other")
                scope = _Scope(scope, scopes)
                scopes += 1
                position += 1
                continue
            if char == "}":
                assert scope is not None
                scope = scope.parent
                position += 1
                if scope is None:
                    break
                continue
            assert scope is not None
            if char == "." and (match := _LOC.match(text, position)):
                location = self.location(match)
                position = match.end()
                continue
            if char not in ".@" and (match := _LABEL.match(text, position)):
                unique = match[1] + scope.suffix
                if match[1] in scope.labels:
                    raise UnsupportedPTXError(f"kernel {entry.name}: label {match[1]} stands twice")
                scope.labels[match[1]] = unique
                entry.labels[unique] = len(entry.body)
                position = match.end()
                continue
            end = text.find(";", position)
            if end < 0:
                raise UnsupportedPTXError(f"kernel {entry.name}: the text ends inside the body")
            statement = text[position:end].strip()
            if char == ".":
                self.declaration(entry, scope, statement)
            elif statement:
                instruction = self.instruction(statement, scope, location, self.line_of(position))
                entry.body.append(instruction)
                if instruction.parts[0] in ("bra", "brx"):
                    branches.append((instruction, scope))
            position = end + 1
        for instruction, where in branches:
            instruction.operands = tuple(_resolve_label(x, where, instruction) for x in instruction.operands)
        return position

    def location(self, match: re.Match[str]) -> int:
        key = (int(match[1]), int(match[2]), int(match[3]))
        inlined = -1
        if match[4]:
            inlined = self.location_index.get((int(match[4]), int(match[5]), int(match[6])), -1)
            if inlined < 0:
                inlined = len(self.locations)
                self.locations.append(SourceLocation(int(match[4]), int(match[5]), int(match[6]), -1))
        index = len(self.locations)
        self.locations.append(SourceLocation(*key, inlined))
        self.location_index[key] = index
        return index

    def declaration(self, entry: Entry, scope: _Scope, statement: str) -> None:
        if match := _REG.match(statement):
            type_name = match[1]
            if type_name != "pred" and type_name not in ptx_declarations.TYPE_BYTES:
                raise UnsupportedPTXError(f"kernel {entry.name}: registers of type .{type_name}")
            for name in match[2].split(","):
                name = name.strip()
                ranged = _REG_RANGE.match(name)
                if ranged and not ranged[1][-1].isdigit():
                    scope.counts[ranged[1]] = (int(ranged[2]), type_name)
                elif _REG_NAME.match(name):
                    known = scope.regs.get(name)
                    if known is None or known.type != type_name:
                        scope.regs[name] = Reg(name + scope.suffix, type_name)
                else:
                    raise UnsupportedPTXError(f"kernel {entry.name}: cannot read the register {name[:80]!r}")
            scope.cache.clear()
        elif variable := ptx_declarations.variable(statement):
            entry.variables.append(variable)
        elif statement.startswith(".param"):
            raise UnsupportedPTXError(f"kernel {entry.name}: calls of a function that was not inlined are refused")
        elif not statement.startswith((".pragma", ".branchtargets", ".file")):
            raise UnsupportedPTXError(f"kernel {entry.name}: directive {statement.split()[0]!r} is not supported")

    def instruction(self, statement: str, scope: _Scope, location: int, line: int) -> Instruction:
        text = statement
        guard: Reg | None = None
        negated = False
        if statement[0] == "@":
            match = _GUARDED.match(statement)
            if not match:
                raise UnsupportedPTXError(f"line {line}: cannot read {text!r}")
            negated = bool(match[1])
            guard = scope.find_reg(match[2])
            if guard is None:
                raise UnsupportedPTXError(f"line {line}: unknown guard predicate {match[2]}")
            statement = match[3]
        opcode, _, rest = statement.partition(" ") if "\t" not in statement else _first_word(statement)
        operands: tuple[Operand, ...] = ()
        rest = rest.strip()
        if rest:
            cache = scope.cache
            found = rest.split(",") if "{" not in rest and "[" not in rest else _OPERANDS.findall(rest)
            result = []
            for piece in found:
                piece = piece.strip()
                operand = cache.get(piece)
                if operand is None:
                    operand = cache[piece] = self.operand(piece, scope, line)
                result.append(operand)
            operands = tuple(result)
        return Instruction(opcode, tuple(opcode.split(".")), operands, guard, negated, location, line, text)

    def operand(self, text: str, scope: _Scope, line: int) -> Operand:
        first = text[0]
        if first == "{":
            return Vector(tuple(self.operand(x.strip(), scope, line) for x in _OPERANDS.findall(text[1:-1])))
        if first == "[":
            pieces = [x.strip() for x in _OPERANDS.findall(text[1:-1])]
            match = _ADDRESS.match(pieces[0])
            if not match:
                raise UnsupportedPTXError(f"line {line}: cannot read the address {text!r}")
            offset = ptx_declarations.integer((match[2] or "0").replace(" ", ""))
            extra = tuple(self.operand(x, scope, line) for x in pieces[1:])
            return Address(self.operand(match[1], scope, line), offset, extra)
        if "|" in text:
            left, _, right = text.partition("|")
            if "|" in right:
                raise UnsupportedPTXError(f"line {line}: cannot read the operand {text[:80]!r}")
            return Pair(self.operand(left.strip(), scope, line), self.operand(right.strip(), scope, line))
        if first == "!":
            reg = scope.find_reg(text[1:].strip())
            if reg is None:
                raise UnsupportedPTXError(f"line {line}: unknown predicate {text!r}")
            return Negated(reg)
        if text == "_":
            return Sink()
        if reg := scope.find_reg(text):
            return reg
        if first == "%":
            return Special(text)
        if ptx_declarations.INTEGER.match(text):
            return Imm(ptx_declarations.integer(text))
        if match := ptx_declarations.FLOAT32.match(text):
            return Imm(int(match[2], 16) ^ (0x80000000 if match[1] else 0), 32)
        if match := ptx_declarations.FLOAT64.match(text):
            return Imm(int(match[2], 16) ^ (1 << 63 if match[1] else 0), 64)
        return Symbol(text)


def _extents(entry: Entry, name: str, text: str) -> tuple[int, ...]:
    """Read the numbers of a directive such as ``.maxntid 128, 1, 1``."""
    numbers = tuple(int(x[:MAX_LITERAL]) for x in re.findall(r"\d+", text))
    if len(numbers) > 3 or any(not 1 <= x <= MAX_DIRECTIVE for x in numbers):
        raise UnsupportedPTXError(f"kernel {entry.name}: .{name} {text.strip()[:80]}")
    return numbers


def _first_word(statement: str) -> tuple[str, str, str]:
    pieces = statement.split(None, 1)
    return pieces[0], " ", pieces[1] if len(pieces) > 1 else ""


def _resolve_label(operand: Operand, scope: _Scope, instruction: Instruction) -> Operand:
    if isinstance(operand, Symbol):
        label = scope.find_label(operand.name)
        if label is None:
            raise UnsupportedPTXError(f"line {instruction.line}: unknown label {operand.name!r}")
        return Label(label)
    return operand


_BLANK = re.compile(r"(?:\s++|//[^\n]*+|/\*.*?\*/)*+", re.S)


def is_ptx(text: str) -> bool:
    """Whether a text is PTX rather than CUDA C: its first directive is ``.version``, with which no C begins."""
    blank = _BLANK.match(text)
    return blank is not None and text.startswith(".version", blank.end())


def parse(text: str) -> Module:
    """Parse a PTX module. Raises `UnsupportedPTXError` with the line for what it cannot read."""
    return _Parser(text).module()
