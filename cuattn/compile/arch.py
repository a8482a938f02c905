"""GPU architectures: which are supported, what they offer, and which one to compile for on a given device."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cuattn.errors import ArgumentError, NotSupportedError
from cuattn.messages import shown

#: Dynamic shared memory that one CTA may use, in KiB, by compute capability (CUDA C++ Programming Guide, "Technical
#: Specifications per Compute Capability": the maximum per thread block).
SMEM_KIB: Mapping[tuple[int, int], int] = types.MappingProxyType(
    {
        (8, 0): 163,
        (8, 6): 99,
        (8, 7): 163,
        (8, 9): 99,
        (9, 0): 227,
        (10, 0): 227,
        (10, 3): 227,
        (11, 0): 227,
        (12, 0): 99,
        (12, 1): 99,
    }
)

OLDEST = (8, 0)
# Their CUBINs run on no other capability (CUDA C++ Programming Guide, "Binary Compatibility").
_EMBEDDED = frozenset({(8, 7), (11, 0)})

_NAME = re.compile(r"sm_(\d{2,3})(a?)")


@dataclass(frozen=True, slots=True)
class Target:
    """What to compile for: ``arch`` such as ``"sm_90a"``, and ``kind``, ``"cubin"`` or ``"ptx"``."""

    arch: str
    kind: str


def capability(arch: str) -> tuple[int, int]:
    """Compute capability of an architecture name: ``"sm_90a"`` is ``(9, 0)``.

    Raises
    ------
    NotSupportedError
        The architecture is real but older than sm_80.
    ArgumentError
        No such architecture.
    """
    match = _NAME.fullmatch(arch) if isinstance(arch, str) else None
    if match is None:
        raise ArgumentError(f"arch={shown(arch)} is not an architecture name: use one of {', '.join(names())}")
    pair = divmod(int(match[1]), 10)
    if pair < OLDEST:
        raise NotSupportedError(f"{arch} is not supported: {_too_old()}")
    if pair not in SMEM_KIB or (match[2] and pair < (9, 0)):
        raise ArgumentError(f"arch={arch!r} is not known: use one of {', '.join(names())}")
    return pair


def names() -> tuple[str, ...]:
    """Every architecture name that `capability` accepts, oldest first."""
    result = []
    for major, minor in SMEM_KIB:
        result.append(f"sm_{major}{minor}")
        if major >= 9:
            result.append(f"sm_{major}{minor}a")
    return tuple(result)


def smem_limit_bytes(arch: str) -> int:
    """Shared memory, in bytes, that one CTA may use on `arch` (static and dynamic together)."""
    return SMEM_KIB[capability(arch)] * 1024


def for_device(device: tuple[int, int], supported: Sequence[int]) -> Target:
    """Choose what to compile for on a device.

    Parameters
    ----------
    device : (int, int)
        Compute capability of the device.
    supported : sequence of int
        Architectures of the NVRTC at hand, as it lists them: ``[75, 80, 86, 89, 90, ...]``.

    Returns
    -------
    Target
        The exact capability, with the ``a`` suffix where there is one; else the highest CUBIN of the same major version
        that the device runs; else PTX, which the driver compiles.

    Raises
    ------
    NotSupportedError
        The device is older than sm_80, or NVRTC knows nothing that it could run.

    Examples
    --------
    >>> for_device((9, 0), [80, 86, 89, 90])
    Target(arch='sm_90a', kind='cubin')
    >>> for_device((8, 9), [80, 86])
    Target(arch='sm_86', kind='cubin')
    >>> for_device((12, 0), [80, 86, 89, 90])
    Target(arch='sm_90', kind='ptx')
    """
    number = device[0] * 10 + device[1]
    if device < OLDEST:
        raise NotSupportedError(f"compute capability {device[0]}.{device[1]} is not supported: {_too_old()}")
    usable = [known for known in supported if divmod(known, 10) in SMEM_KIB]
    portable = [known for known in usable if known < number and divmod(known, 10) not in _EMBEDDED]
    if number in usable:
        return Target(f"sm_{number}a" if number >= 90 else f"sm_{number}", "cubin")
    # CUBINs with a suffix run on their exact capability only, so from here on there is none.
    same_major = [known for known in portable if known // 10 == device[0]]
    if same_major:
        return Target(f"sm_{max(same_major)}", "cubin")
    if portable:
        return Target(f"sm_{max(portable)}", "ptx")
    raise NotSupportedError(f"NVRTC compiles for {list(supported)}, and none of these runs on sm_{number}: update it")


def _too_old() -> str:
    return "the kernels use instructions of compute capability 8.0 (Ampere) and newer"
