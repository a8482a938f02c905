"""Declarations of PTX: parameters, variables and their initial values, checked for what PTX allows.

A text that was damaged, or made up, must not make the parser loop, allocate without bound or divide by zero.
"""

from __future__ import annotations

import re

from ..errors import UnsupportedPTXError
from .ptx_module import Parameter, Variable

TYPE_BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
    "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip
MAX_PARAM_BYTES = 32764  # of a kernel, as PTX has it
MAX_ALIGNMENT = 1 << 12
#: Bytes of a variable by its state space: what a CTA or a thread may have at most, and more than any GPU's memory.
MAX_BYTES = {"shared": 1 << 20, "local": 512 << 10, "const": 1 << 26, "global": 1 << 36}

# Possessive quantifiers (``*+``) where a text that does not match could otherwise be tried in ever more ways.
_SPACE = re.compile(r"\.(?:shared|local|global|const)\b")
_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s++(?:\.attribute\([^)]*+\)\s*+)?"
    r"(?:\.align\s++(\d{1,9})\s++)?(?:\.v[24]\s++)?\.(\w++)\s++([\w$]++)((?:\s*+\[\s*+\d*+\s*+\])*+)\s*+(?:=\s*+(.*))?$",
    re.S,
)
_EXTENT = re.compile(r"\[\s*+(\d*+)\s*+\]")
_PARAM = re.compile(
    r"\.param\s++(?:\.align\s++(\d{1,9})\s++)?\.(\w++)\s++"
    r"(\.ptr\s*+(?:\.(?!align)\w++\s*+)?(?:\.align\s++\d++\s*+)?)?([\w$]++)(?:\s*+\[\s*+(\d{1,9})\s*+\])?$"
)
_DIGITS = 20  # of an extent: more than 64 bits take
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]{1,32}|0[bB][01]{1,128}|\d{1,40})U?$")
FLOAT32 = re.compile(r"(-?)0[fF]([0-9a-fA-F]{8})$")
FLOAT64 = re.compile(r"(-?)0[dD]([0-9a-fA-F]{16})$")


def integer(text: str) -> int:
    """Return the value of a literal that `INTEGER` matches."""
    text = text.rstrip("U")
    digits = text.lstrip("-")
    if len(digits) > 1 and digits[0] == "0" and digits.isdigit():  # PTX octal, as in C
        return int(digits, 8) * (-1 if text[0] == "-" else 1)
    return int(text, 0)


def parameters(kernel: str, text: str) -> list[Parameter]:
    """Parse the parameters that stand in the parentheses behind a kernel's name."""
    params: list[Parameter] = []
    offset = 0
    for piece in text.split(",") if text.strip() else ():
        match = _PARAM.match(piece.strip())
        if not match or match[2] not in TYPE_BYTES:
            raise UnsupportedPTXError(f"kernel {kernel}: cannot read the parameter {piece.strip()[:80]!r}")
        size = TYPE_BYTES[match[2]] * int(match[5] or 1)
        align = _alignment(match[1], TYPE_BYTES[match[2]], piece)
        offset = -(-offset // align) * align
        kind, pointer = "struct" if match[5] else match[2], True if match[3] else None
        params.append(Parameter(match[4], offset, size, kind, pointer, align))
        offset += size
        if not size or offset > MAX_PARAM_BYTES:
            raise UnsupportedPTXError(
                f"kernel {kernel}: parameter {match[4]} of {size} bytes; the parameters have 1 to {MAX_PARAM_BYTES}"
            )
    if any(p.pointer for p in params):  # who writes .ptr writes it at all of them
        for p in params:
            p.pointer = bool(p.pointer)
    return params


def variable(statement: str) -> Variable | None:
    """Parse the variable that a statement declares, whatever precedes its state space; None if it declares none."""
    start = _SPACE.search(statement)
    match = _VARIABLE.match(statement, start.start()) if start else None
    if start is None or match is None:
        return None
    space, alignment, type_name, name, extents, value = match.groups()
    if type_name not in TYPE_BYTES:
        raise UnsupportedPTXError(f"variable {name} has type .{type_name}")
    element = size = TYPE_BYTES[type_name]
    for extent in _EXTENT.findall(extents):
        size *= int(extent[:_DIGITS] or 0)
        if size > MAX_BYTES[space]:
            raise UnsupportedPTXError(f"variable {name} is larger than the {MAX_BYTES[space]} bytes of .{space} memory")
    extern = statement[: start.start()].rstrip().endswith(".extern")
    data = _initial_bytes(value, type_name, size, name) if value else None
    return Variable(name, space, _alignment(alignment, element, statement), size, extern, data)


def _alignment(text: str | None, element: int, statement: str) -> int:
    alignment = int(text or element)
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UnsupportedPTXError(f"alignment {alignment} in {statement.strip()[:80]!r}")
    return alignment


def _initial_bytes(text: str, type_name: str, size: int, name: str) -> bytes:
    """Return the bytes of the initial value, at most ``size``; the rest of the variable is zeros."""
    element = TYPE_BYTES[type_name]
    out = bytearray()
    for piece in text.replace("{", " ").replace("}", " ").split(","):
        piece = piece.strip()
        match = FLOAT32.match(piece) or FLOAT64.match(piece)
        if match and len(match[2]) == 2 * element:
            out += int(match[0].lstrip("-")[2:], 16).to_bytes(element, "little")
            out[-1] ^= 0x80 if match[1] else 0
        elif INTEGER.match(piece):
            out += (integer(piece) & ((1 << (8 * element)) - 1)).to_bytes(element, "little")
        elif piece:
            raise UnsupportedPTXError(f"initial value {piece[:80]!r} of variable {name}")
    if len(out) > size:
        raise UnsupportedPTXError(f"variable {name} has {size} bytes and an initial value of {len(out)}")
    return bytes(out)
