"""A rule of bulk copies: a kernel that breaks it or keeps it, and what is reported."""

from __future__ import annotations

from dataclasses import dataclass

from cuattn import errors


@dataclass
class Case:
    error: type[errors.KernelFault] | tuple[type[errors.KernelFault], ...]
    words: str
    body: str
    eager: bool = True  # the fault shows when copies land at once, too
    cluster: int = 1
    init: bool = True  # with the init checker, which may see it first
