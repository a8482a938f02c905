"""What ptxas has to say about the speed of a kernel, read from NVRTC's log.

ptxas numbers its remarks, ``ptxas info : (C7510) Potential Performance Loss: ...``, and NVRTC hands them on, with or
without ``-v``. Remarks on code for Hopper, all of which mean that the kernel is slower than it was written to be:

==========  ==========================================================================================================
C7504-08    ``setmaxnreg`` is ignored: separate compilation, debugging, or no register count at entry because the
            kernel has no ``__launch_bounds__``
C7509-16    wgmma runs one at a time: calls between them, too few registers, accumulators that are touched on the way
C7517-19    a wait or ``wgmma.fence`` was missing and is added: right, but later than need be
==========  ==========================================================================================================

>>> log = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register ..."
>>> notes(log)[0].code
'C7508'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NOTE = re.compile(r"^ptxas (?:info|warning)\s*:\s*\((C\d+)\)\s*(.+?)\s*$", re.MULTILINE)
_FUNCTION = re.compile(r"function '([^']+)'")


@dataclass(frozen=True, slots=True)
class Note:
    """A numbered remark: ``code`` such as ``"C7510"``, its text, and the function it names, empty if it names none."""

    code: str
    text: str
    function: str


def notes(log: str) -> tuple[Note, ...]:
    """Every numbered remark of a log, in its order."""
    return tuple(
        Note(match[1], match[2], name[1] if (name := _FUNCTION.search(match[2])) else "")
        for match in _NOTE.finditer(log)
    )
