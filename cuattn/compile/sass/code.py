"""The way from the text of nvdisasm to functions and instructions.

>>> text = '''
... .text.scale:
...         /*0000*/                   MOV R1, c[0x0][0x28] ;
... .L_x_0:
...         /*0010*/              @!P0 BRA `(.L_x_0) ;
... '''
>>> (function,) = parse(text)
>>> function.name, function.instructions[1].predicate, function.instructions[1].targets
('scale', '!P0', ('.L_x_0',))
>>> function.labels
{'.L_x_0': 1}
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECTION = re.compile(r"^\.text\.([^\s:]+):")
_LABEL = re.compile(r"^(\.L_[\w$]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;")
_PREDICATE = re.compile(r"^@(!?U?P\w+)\s+")
_TARGET = re.compile(r"\.L_[\w$]+")
# These name a label without jumping to it: where warps meet again, and what a register is to hold.
_NO_JUMP = frozenset({"BSSY", "UMOV", "MOV", "CALL", "BMOV", "LEPC"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction.

    Attributes
    ----------
    address : int
        Byte offset in the function.
    predicate : str
        Such as ``"!P0"``; empty where there is none.
    opcode : str
        With its modifiers: ``"HGMMA.64x128x16.F32.BF16"``.
    operands : str
        What follows, as text.
    targets : tuple of str
        Labels it may jump to.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    targets: tuple[str, ...]

    @property
    def base(self) -> str:
        """The opcode without modifiers: ``"HGMMA"``."""
        return self.opcode.partition(".")[0]

    def has(self, *modifiers: str) -> bool:
        """Whether the opcode has all of these modifiers."""
        return set(modifiers) <= set(self.opcode.split(".")[1:])


@dataclass(frozen=True, slots=True)
class Function:
    """The code of one section: a kernel, with the device functions that it calls.

    Attributes
    ----------
    name : str
        Of the kernel.
    instructions : tuple of Instruction
        In the order of their addresses.
    labels : dict
        Label to the index of the instruction that it stands before.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> list[Function]:
    """Every function of a listing, in its order."""
    result: list[Function] = []
    name = ""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}

    def close() -> None:
        if name:
            result.append(Function(name, tuple(instructions), dict(labels)))
        instructions.clear()
        labels.clear()

    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            instructions.append(_instruction(int(match[1], 16), match[2]))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _SECTION.match(line):
            close()
            name = match[1]
    close()
    return result


def _instruction(address: int, text: str) -> Instruction:
    predicate = ""
    if match := _PREDICATE.match(text):
        predicate, text = match[1], text[match.end() :]
    opcode, _, operands = text.partition(" ")
    base = opcode.partition(".")[0]
    targets = () if base in _NO_JUMP else tuple(_TARGET.findall(operands))
    return Instruction(address, predicate, opcode, operands.strip(), targets)
