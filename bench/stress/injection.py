"""An exception at any bytecode: what a signal handler, another thread or a failing allocation can do.

A trace function is called before each instruction of the watched modules, and raises at the one that was asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Injected", "raised_at"]


class Injected(BaseException):
    """What is raised: nothing catches it by accident."""


def raised_at(instruction: int, call: Callable[[], Any], watched: Callable[[str], bool]) -> tuple[bool, int, Any]:
    """Call something, and raise `Injected` before the ``instruction``-th bytecode of files for which ``watched`` holds.

    Returns whether that came out of the call, how many such instructions there were so far, and what was returned.
    """
    count = 0

    def on_call(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        if not watched(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return on_instruction

    def on_instruction(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        nonlocal count
        if event == "opcode":
            count += 1
            if count == instruction:
                raise Injected
        return on_instruction

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        result = call()
    except Injected:
        return True, count, None
    finally:
        sys.settrace(before)
    return False, count, result
