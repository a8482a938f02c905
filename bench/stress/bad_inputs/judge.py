"""One case: the call, its replacements, and whether what happened is right."""

from __future__ import annotations

import re
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any, NamedTuple

import numpy as np

from bench.stress.bad_inputs.caches import CACHE_TARGETS
from bench.stress.bad_inputs.call import Call, parameters
from bench.stress.bad_inputs.calls import OWN_TARGETS
from bench.stress.bad_inputs.compat import COMPAT_TARGETS
from bench.stress.bad_inputs.differential import DIFFERENTIAL_TARGETS
from bench.stress.bad_inputs.distributed_calls import DISTRIBUTED_TARGETS
from bench.stress.bad_inputs.dual_chunks import DUAL_CHUNK_TARGETS
from bench.stress.bad_inputs.linear_calls import LINEAR_TARGETS
from bench.stress.bad_inputs.masks import MASK_TARGETS
from bench.stress.bad_inputs.values import MISSING, Value, draw
from cuattn.errors import CompileError, CuattnError, CuattnWarning

__all__ = ["TARGETS", "Verdict", "bounded_memory", "case"]

TARGETS: dict[str, Callable[[], Call]] = {
    **OWN_TARGETS,
    **COMPAT_TARGETS,
    **CACHE_TARGETS,
    **DIFFERENTIAL_TARGETS,
    **DISTRIBUTED_TARGETS,
    **DUAL_CHUNK_TARGETS,
    **LINEAR_TARGETS,
    **MASK_TARGETS,
}
_NAMES = tuple(TARGETS)
SPARE_BYTES = 3 * 2**30  # of memory that a case may take
WRITTEN = frozenset(("out", "workspace", "k_pages", "v_pages", "pages", "dq", "dk", "dv", "k_cache", "v_cache"))
WRITTEN_BY_APPEND = frozenset(("k_scale", "v_scale", "k_block_scales", "v_block_scales"))
#: Arguments that take any value, and those that take any of some kind: they are still refused rightly or not at all.
ANY_VALUE = frozenset(("cache_key",))
ANY_ITERABLE = frozenset(("seqs",))
ANY_DTYPE = frozenset((("copy_pages", "pages"), ("remove_padding", "x"), ("restore_padding", "x")))
UNREAD = frozenset((("made_plan", "cu_seqlens"),))


class Verdict(NamedTuple):
    """What is wrong ("" if nothing is), of which kind the replacements were, and the case in words."""

    fault: str
    kinds: tuple[str, ...]
    text: str
    refused: bool


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Allow the process so much more memory, and no more: beyond it, the system makes an allocation fail."""
    with open("/proc/self/statm", encoding="ascii") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def case(seed: int, index: int) -> Verdict:
    """The case of that number: a function of seed and number alone."""
    rng = Random(f"{seed}:{index}")
    name = _NAMES[index % len(_NAMES)]
    call = TARGETS[name]()
    names = [n for n in parameters(call) if n not in ANY_VALUE and (name, n) not in UNREAD]
    chosen = rng.sample(names, 2 if len(names) > 1 and rng.random() < 0.25 else 1)
    known = {**call.options, **call.given}
    replaced: dict[str, Value] = {}
    for argument in chosen:
        base = known.get(argument, MISSING)
        others = {n: x for n, x in known.items() if n != argument}
        replaced[argument] = draw(rng, base, others, _is_written(name, argument))
    text = f"{name}({', '.join(f'{n}: {v.kind} {_short(v.value)}' for n, v in replaced.items())})"
    kinds = tuple(value.kind for value in replaced.values())
    fault, refused = _judge(name, call, replaced)
    return Verdict(fault, kinds, f"#{index} {text}", refused)


def _is_written(target: str, argument: str) -> bool:
    if target.startswith("append_kv"):
        return argument in WRITTEN | WRITTEN_BY_APPEND
    if "backward" in target and argument == "out":
        return False
    read = "attention" in target and ("pages" in argument or "cache" in argument)
    return argument in WRITTEN and not read


def _judge(name: str, call: Call, replaced: Mapping[str, Value]) -> tuple[str, bool]:
    given = call.given | {argument: value.value for argument, value in replaced.items()}
    before = _bytes(given)
    result, error = _run(call.function, given)
    if isinstance(error, str):
        return error, True
    if error is not None:
        if _bytes(given) != before:
            return f"written before it raised {error!r}", True
        return _message_fault(name, call, replaced, error), True
    wrong = [
        f"{argument} ({value.kind}) was taken"
        for argument, value in replaced.items()
        if value.never
        and argument not in ANY_ITERABLE
        and (name, argument) not in ANY_DTYPE
        # Programs of flash-attn pass what a tensor of one element holds.
        and not (name in COMPAT_TARGETS and value.kind == "array of one number")
    ]
    if wrong:
        return "; ".join(wrong), False
    if any(value.plain is MISSING for value in replaced.values()):
        return "", False
    plain = TARGETS[name]()
    same = plain.given | {argument: _copy(value.plain) for argument, value in replaced.items()}
    expected, error = _run(plain.function, same)
    if error is not None:
        return f"taken, but not as plain arrays: {error}", False
    return ("" if _equal(result, expected) else "another result than with plain arrays"), False


def _run(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[Any, CuattnError | str | None]:
    """Make the call: its result and None, or the error, in words if it is not of the package."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", CuattnWarning)
            return function(**given), None
    except CuattnError as error:
        return None, error
    except Exception as error:
        return None, f"untyped {type(error).__name__}: {_short(str(error))}"


def _message_fault(name: str, call: Call, replaced: Mapping[str, Value], error: CuattnError) -> str:
    message = str(error)
    wrong = [argument for argument, value in replaced.items() if value.wrong]
    # A relative of a valid value may be refused for what it contradicts: that may be said from the other side.
    allowed = wrong if len(wrong) == len(replaced) else parameters(call)
    if any(re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", message) for argument in allowed):
        return ""
    if isinstance(error, CompileError) and {"code", "options"} & {*replaced}:
        return ""  # the log of the compiler is about them
    if name == "tune" and message.startswith("tune measures on a GPU"):
        return ""
    return f"no argument named: {type(error).__name__}: {_short(message)}"


def _bytes(values: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of all arrays of a call that are not too large to look at."""
    arrays = {name: x for name, x in values.items() if isinstance(x, np.ndarray) and not x.dtype.hasobject}
    return {name: np.asarray(x).tobytes() for name, x in arrays.items() if x.size < 2**24}


def _copy(x: Any) -> Any:
    return x.copy() if isinstance(x, np.ndarray) else x


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, np.ndarray):
        if not isinstance(b, np.ndarray) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        if a.dtype.kind not in "fV" or a.dtype.names:
            return np.asarray(a).tobytes() == np.asarray(b).tobytes()
        # Arrays that lie otherwise may be loaded, and so summed, in another order.
        near = 2.0**-6 if a.dtype.itemsize <= 2 else 1e-5
        return np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=near, atol=near, equal_nan=True)
    return re.sub(r"0x[0-9a-f]+", "", repr(a)) == re.sub(r"0x[0-9a-f]+", "", repr(b))


def _short(value: Any) -> str:
    try:
        if isinstance(value, np.ndarray):
            return f"{value.dtype} {value.shape}"
        text = value if isinstance(value, str) else repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) < 300 else f"{text[:297]}..."
