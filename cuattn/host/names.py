"""Kernels of a source by their C++ names, ``"scale<float, 4>"``, as ``name_expressions`` of a module.

Each name becomes the initial value of a variable behind the source. That makes the compiler instantiate the template,
and what it writes there is the name that the kernel has in the PTX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PREFIX = "cuattn_name_expression_"
_RESULT = re.compile(rf"^.*\b{_PREFIX}(\d++)\s*+=\s*+(?:generic\()?([\w$]++)\)?;$\n?", re.M)


def ask(source: str, expressions: Sequence[str]) -> str:
    """Add questions to a source; an error in one of them is in line n of the file ``name_expressions``."""
    lines = [f'extern "C" __device__ auto {_PREFIX}{i} = &{text};\n' for i, text in enumerate(expressions)]
    return source + '\n#line 1 "name_expressions"\n' + "".join(lines)


def answers(ptx: str, expressions: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the PTX without the answers, and the name in the PTX of each expression."""
    names = {expressions[int(match[1])]: match[2] for match in _RESULT.finditer(ptx)}
    return _RESULT.sub("", ptx), names
