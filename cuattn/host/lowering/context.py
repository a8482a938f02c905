"""What a lowering rule may ask about the kernel that it lowers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ptx_types import Reg

SHARED_BASE = 1024  # executor.h
LOCAL_BASE = 64
GENERIC_SHARED = 1 << 60
GENERIC_LOCAL = 1 << 61


@dataclass(slots=True)
class Context:
    """Addresses of the kernel's names. Shared and local ones are final; global and const ones are known at load."""

    params: dict[str, int]  # offset in the parameter block
    shared: dict[str, int]
    local: dict[str, int]
    module: dict[str, str]  # names of .global and .const variables → space
    entry_registers: int = 0  # registers a thread starts with, 0 unknown
    param_bytes: int = 0
    scratch: int = 0
    param_registers: dict[Reg, int] = field(default_factory=dict)  # registers that hold a parameter's address

    def new_register(self, type_name: str) -> Reg:
        """Make a register of the lowering's own."""
        self.scratch += 1
        return Reg(f"%lowered{self.scratch}", type_name)
