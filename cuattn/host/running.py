"""Running a launch: one call of C, which returns when C has stopped, whatever is raised meanwhile.

Between the start of that call and its return no bytecode of the caller runs, so nothing that the launch reads can be
released too early. The call gives the interpreter's lock back, and looks every few milliseconds whether the thread has
something to raise: a signal handler's exception in the main thread, one from ``PyThreadState_SetAsyncExc`` in any. It
then stops the launch, and the exception leaves the call as from any function.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from typing import Any

from . import library


def _look() -> None:
    """Do nothing: the interpreter raises what is pending when it enters a function."""


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


_CALLER = library.CallerStruct(
    release=_address(ctypes.pythonapi.PyEval_SaveThread),
    acquire=_address(ctypes.pythonapi.PyEval_RestoreThread),
    call=_address(ctypes.pythonapi.PyObject_CallObject),
    drop=_address(ctypes.pythonapi.Py_DecRef),
    look=id(_look),
)
_CALLER_ADDRESS = ctypes.addressof(_CALLER)

_ended = False  # the process ends: threads that are left must not run on


def run(launch: library.LaunchStruct) -> None:
    """Run a launch to its end, or to the first exception."""
    interpreter = library.load()
    if _ended:
        _stay()
    interpreter.run(ctypes.addressof(launch), _CALLER_ADDRESS)
    if launch.stop and not launch.report.kind:
        _stay()


def _stay() -> None:
    """Never return to a daemon thread that has been stopped: the end of the process takes its variables away."""
    if threading.current_thread() is not threading.main_thread():
        threading.Event().wait()


@atexit.register
def _end() -> None:
    global _ended
    _ended = True
    interpreter = library.loaded()
    if interpreter is not None:
        interpreter.stop_all()
