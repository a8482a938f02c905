"""PTX text → instructions.

Reads what NVRTC writes, inline assembly included: several statements on a line, comments anywhere, braces that scope
registers and labels (the same names recur in nested scopes), vectors in braces, ``d|p`` destinations, forward labels.
"""

from __future__ import annotations

import bisect
import re

from ..errors import UnsupportedPTXError
from .ptx_module import Entry, Module, Parameter, SourceLocation, Variable
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

TYPE_BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
    "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip


class _Scope:
    """A brace-delimited scope: registers and labels, and the operands already resolved in it."""

    __slots__ = ("cache", "labels", "parent", "regs", "suffix")

    def __init__(self, parent: _Scope | None, number: int) -> None:
        self.parent = parent
        self.suffix = f"@{number}" if parent else ""
        self.regs: dict[str, Reg] = {}
        self.labels: dict[str, str] = {}
        self.cache: dict[str, Operand] = {}

    def find_reg(self, name: str) -> Reg | None:
        scope: _Scope | None = self
        while scope:
            if name in scope.regs:
                return scope.regs[name]
            scope = scope.parent
        return None

    def find_label(self, name: str) -> str | None:
        scope: _Scope | None = self
        while scope:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:[^\n]*?inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?[^\n]*")
_REG = re.compile(r"\.reg\s*\.(\w+)\s+(.*)", re.S)
_REG_RANGE = re.compile(r"(\S+)<(\d+)>$")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|common)\s+)?(\.extern\s+)?\.(shared|local|global|const)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?(?:\.v[24]\s+)?\.(\w+)\s+([\w$]+)((?:\s*\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.(?!align)\w+\s*)?(?:\.align\s+\d+\s*)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_ENTRY = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_DIRECTIVE = re.compile(r"\.(\w+)([\s\d,]*)")
_GUARDED = re.compile(r"@(!?)\s*([\w$%]+)\s+(.*)", re.S)
_OPERANDS = re.compile(r"((?:\{[^{}]*\}|\[[^\]]*\]|[^,{}\[\]])+)")
_ADDRESS = re.compile(r"([\w$%.]+)\s*(?:\+\s*)?(-?\s*(?:0[xX][0-9a-fA-F]+|\d+))?$")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_FLOAT32 = re.compile(r"(-?)0[fF]([0-9a-fA-F]{8})$")
_FLOAT64 = re.compile(r"(-?)0[dD]([0-9a-fA-F]{16})$")


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
        version = re.search(r"\.version\s+(\S+)", text)
        target = re.search(r"\.target\s+([\w]+)", text)
        if not version or not target:
            raise UnsupportedPTXError("not PTX: no .version or no .target directive")
        entries: dict[str, Entry] = {}
        outside: list[str] = []
        position = 0
        while match := _ENTRY.search(text, position):
            outside.append(text[position : match.start()])
            entry = Entry(match[1], _parameters(match[2] or ""))
            for directive in _DIRECTIVE.finditer(match[3]):
                entry.directives[directive[1]] = tuple(int(x) for x in re.findall(r"\d+", directive[2]))
            position = self.body(entry, match.end() - 1)
            entries[entry.name] = entry
        outside.append(text[position:])
        rest = "".join(outside)
        section = rest.find(".section")
        files = {int(m[1]): m[2] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', rest)}
        variables = []
        for statement in rest[: section if section >= 0 else len(rest)].split(";"):
            start = re.search(r"(?:\.(?:visible|weak|common|extern)\s+)*\.(?:shared|global|const)\b", statement)
            if start and (variable := _variable(statement[start.start() :].strip())):
                variables.append(variable)
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
            while position < length and text[position].isspace():
                position += 1
            if position >= length:
                raise UnsupportedPTXError(f"kernel {entry.name}: the text ends inside the body")
            char = text[position]
            if char == "{":
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
                scope.labels[match[1]] = unique
                entry.labels[unique] = len(entry.body)
                position = match.end()
                continue
            end = text.index(";", position)
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
            for name in match[2].split(","):
                name = name.strip()
                if ranged := _REG_RANGE.match(name):
                    for number in range(int(ranged[2])):
                        scope.regs[f"{ranged[1]}{number}"] = Reg(f"{ranged[1]}{number}{scope.suffix}", type_name)
                else:
                    scope.regs[name] = Reg(name + scope.suffix, type_name)
            scope.cache.clear()
        elif variable := _variable(statement):
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
            offset = int((match[2] or "0").replace(" ", ""), 0)
            extra = tuple(self.operand(x, scope, line) for x in pieces[1:])
            return Address(self.operand(match[1], scope, line), offset, extra)
        if "|" in text:
            left, _, right = text.partition("|")
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
        if _INTEGER.match(text):
            return Imm(_integer(text))
        if match := _FLOAT32.match(text):
            return Imm(int(match[2], 16) ^ (0x80000000 if match[1] else 0), 32)
        if match := _FLOAT64.match(text):
            return Imm(int(match[2], 16) ^ (1 << 63 if match[1] else 0), 64)
        return Symbol(text)


def _first_word(statement: str) -> tuple[str, str, str]:
    pieces = statement.split(None, 1)
    return pieces[0], " ", pieces[1] if len(pieces) > 1 else ""


def _integer(text: str) -> int:
    text = text.rstrip("U")
    digits = text.lstrip("-")
    if len(digits) > 1 and digits[0] == "0" and digits.isdigit():  # PTX octal, as in C
        return int(digits, 8) * (-1 if text[0] == "-" else 1)
    return int(text, 0)


def _resolve_label(operand: Operand, scope: _Scope, instruction: Instruction) -> Operand:
    if isinstance(operand, Symbol):
        label = scope.find_label(operand.name)
        if label is None:
            raise UnsupportedPTXError(f"line {instruction.line}: unknown label {operand.name!r}")
        return Label(label)
    return operand


def _parameters(text: str) -> list[Parameter]:
    params = []
    offset = 0
    for match in _PARAM.finditer(text):
        size = TYPE_BYTES[match[2]] * int(match[4] or 1)
        align = int(match[1] or TYPE_BYTES[match[2]])
        offset = -(-offset // align) * align
        params.append(Parameter(match[3], offset, size, align))
        offset += size
    return params


def _variable(statement: str) -> Variable | None:
    match = _VARIABLE.match(statement)
    if not match:
        return None
    element = TYPE_BYTES[match[4]]
    size = element
    for extent in re.findall(r"\[\s*(\d*)\s*\]", match[6]):
        size *= int(extent or 0)
    data = _initializer(match[7], match[4], size, statement) if match[7] else None
    return Variable(match[5], match[2], int(match[3] or element), size, bool(match[1]), data)


def _initializer(text: str, type_name: str, size: int, statement: str) -> bytes:
    element = TYPE_BYTES[type_name]
    out = bytearray()
    for piece in text.replace("{", " ").replace("}", " ").split(","):
        piece = piece.strip()
        if match := _FLOAT32.match(piece) or _FLOAT64.match(piece):
            out += int(match[2], 16).to_bytes(element, "little")
        elif _INTEGER.match(piece):
            out += (_integer(piece) & ((1 << (8 * element)) - 1)).to_bytes(element, "little")
        elif piece:
            raise UnsupportedPTXError(f"initial value {piece!r} in {statement.split('=')[0].strip()!r}")
    return bytes(out).ljust(size, b"\0")


def parse(text: str) -> Module:
    """Parse a PTX module. Raises `UnsupportedPTXError` with the line for what it cannot read."""
    return _Parser(text).module()
