"""Every exception and warning that cuattn raises.

All of them derive from `CuattnError` (or `CuattnWarning`), so one ``except`` catches the library. Each also derives
from the built-in type that says the same thing, so code that catches `ValueError` or `TypeError` keeps working.

Examples
--------
>>> from cuattn import errors
>>> issubclass(errors.ShapeError, ValueError)
True
"""

from __future__ import annotations

from collections.abc import Sequence


class CuattnError(Exception):
    """Base of every exception of this package."""


# --- arguments ------------------------------------------------------------------------------------------------------


class ArgumentError(CuattnError, ValueError):
    """An argument has a value that the function does not accept."""


class ShapeError(ArgumentError):
    """An array has the wrong rank, or its shape does not fit the other arrays."""


class OverlapError(ArgumentError):
    """An output array shares memory with an input."""


class NonFiniteError(ArgumentError):
    """A scalar option that must be finite is NaN or infinite."""


class DTypeError(CuattnError, TypeError):
    """An array has a dtype that the operation does not take, or the dtypes do not fit each other."""


class ArrayTypeError(CuattnError, TypeError):
    """An argument is not an array, or the arrays live in different places (NumPy and CuPy)."""


class NotSupportedError(CuattnError, NotImplementedError):
    """The request is meaningful, but this version cannot do it yet."""


class EnvironmentVariableError(CuattnError, ValueError):
    """An environment variable ``CUATTN_*`` has a value that is not allowed."""


class OutOfMemoryError(CuattnError, MemoryError):
    """The host has not got the memory that a call asks for. Nothing has been written."""


# --- compilation and launch -----------------------------------------------------------------------------------------


class CacheError(CuattnError, OSError):
    """The kernel cache is unusable: not a directory, or not exclusively the current user's."""


class NVRTCNotFoundError(CuattnError, RuntimeError):
    """No usable NVRTC library, or no CUDA headers, were found."""


class NvdisasmNotFoundError(CuattnError, RuntimeError):
    """There is no nvdisasm, which inspecting the machine code of a kernel needs; no other call does."""


class DisassemblyError(CuattnError, RuntimeError):
    """nvdisasm cannot be run, or refuses a CUBIN."""


class CompileError(CuattnError, RuntimeError):
    """NVRTC refused a kernel.

    Attributes
    ----------
    log : str
        The program log of NVRTC, with the file names and lines of the ``.cu`` and ``.cuh`` files.
    source : str
        The expanded source that was given to NVRTC.
    """

    def __init__(self, message: str, *, log: str = "", source: str = "") -> None:
        super().__init__(message)
        self.log = log
        self.source = source

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only attributes are restored from the state, so that the error survives a process pool.
        return (type(self), self.args, self.__dict__)


class LaunchError(CuattnError, ValueError):
    """A kernel launch was refused before it started: grid, block, shared memory or arguments are not legal."""


class DeclarationError(CuattnError, RuntimeError):
    """Python and a kernel disagree about a struct or an argument, by name, kind or size: a fault of this package.

    Nothing was launched.
    """


# --- host executor --------------------------------------------------------------------------------------------------


class HostExecutorError(CuattnError, RuntimeError):
    """Base of everything that the host executor reports."""


class HostUnavailableError(HostExecutorError):
    """The host executor cannot run here: no compiled library and no C compiler to build one."""


class UnsupportedPTXError(HostExecutorError):
    """The PTX contains an instruction, or a form of one, that the host executor does not implement.

    Attributes
    ----------
    instruction : str
        The instruction as it stands in the PTX.
    location : str
        Where it comes from: ``"file.cu:12, inlined at ..."``, or the line of the PTX.
    """

    def __init__(self, message: str, *, instruction: str = "", location: str = "") -> None:
        super().__init__(message)
        self.instruction = instruction
        self.location = location

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class KernelFault(HostExecutorError):
    """A kernel did something that no GPU defines, or that never ends. The host executor stopped it.

    Attributes
    ----------
    kernel : str
        Entry name of the kernel.
    ctaid, tid : tuple of int, or None
        ``(x, y, z)`` of the CTA and of the first thread concerned.
    address : int or None
        The address concerned, where there is one.
    location : str
        ``"file.cu:12, inlined at ..."``; empty where the kernel has no line information.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str = "",
        ctaid: Sequence[int] | None = None,
        tid: Sequence[int] | None = None,
        address: int | None = None,
        location: str = "",
    ) -> None:
        super().__init__(message)
        self.kernel = kernel
        self.ctaid = None if ctaid is None else tuple(ctaid)
        self.tid = None if tid is None else tuple(tid)
        self.address = address
        self.location = location

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class MemoryFaultError(KernelFault):
    """An access outside every allocation, or one that is not aligned to its size."""


class UninitializedReadError(KernelFault):
    """A read of memory that nothing wrote."""


class RaceError(KernelFault):
    """Two threads touch one location, one of them writes, and nothing orders them."""


class DeadlockError(KernelFault):
    """No warp can make progress any more."""


class DivergenceError(KernelFault):
    """A warp-collective instruction was executed without all the lanes that it names."""


class AsyncCopyError(KernelFault):
    """An asynchronous operation was used wrongly.

    Its result was used, or its source changed, before it was waited for; a fence or a wait is missing; an mbarrier was
    misused; or a CTA ended with something outstanding.
    """


# --- key/value caches -----------------------------------------------------------------------------------------------


class CacheFullError(CuattnError, MemoryError):
    """A cache has no room for what a call would add. Nothing has changed."""


class OutOfPagesError(CacheFullError):
    """A paged cache has fewer pages to give than a call needs. Nothing has changed.

    Attributes
    ----------
    needed : int
        Pages that the call needs.
    allocatable : int
        Pages that could be had: the free ones, and those kept for their prefix only.
    """

    def __init__(self, message: str, *, needed: int = 0, allocatable: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.allocatable = allocatable

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class SequenceError(CuattnError, RuntimeError):
    """A sequence is in no state for the call: freed, of another cache, swapped out, or in an open step."""


class StepError(CuattnError, RuntimeError):
    """A call out of order in a step of a cache: a layer appended twice or not at all, or a step that is over."""


# --- several ranks ---------------------------------------------------------------------------------------------------


class DistributedError(CuattnError, RuntimeError):
    """Base of what goes wrong between the ranks of a group. The group is of no use afterwards."""


class PeerError(DistributedError):
    """Another rank has raised, or has left, in the middle of a call that takes all of them.

    Attributes
    ----------
    rank : int
        The rank that raised first, as far as is known here; -1 where it is not.
    """

    def __init__(self, message: str, *, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class GroupTimeoutError(DistributedError, TimeoutError):
    """A rank has not come to a call within the timeout of its group: it is gone, late, or somewhere else."""


class MismatchError(DistributedError, ArgumentError):
    """Ranks have called with shapes, dtypes or options that do not fit each other. Nothing has been sent."""


# --- warnings -------------------------------------------------------------------------------------------------------


class CuattnWarning(UserWarning):
    """Base of every warning of this package."""


class SlowHostCallWarning(CuattnWarning):
    """A call on NumPy arrays is so large that the host executor will take minutes."""


class CacheWarning(CuattnWarning):
    """The kernel cache could not be used, or an entry of it was damaged and has been rebuilt."""
