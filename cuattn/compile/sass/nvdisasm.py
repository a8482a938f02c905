"""Finding and running ``nvdisasm``, NVIDIA's disassembler of CUBINs. Only inspection needs it: no call does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cuattn.compile import toolkit
from cuattn.errors import DisassemblyError, NvdisasmNotFoundError

INSTALL_HINT = 'pip install nvidia-cuda-nvdisasm (the extra "cuattn[inspect]"), or put that of a CUDA toolkit on PATH'
_PROGRAM = "nvdisasm"
_SYSTEM_PREFIX = "/usr/local/cuda"
_TIMEOUT_S = 120


def find() -> Path:
    """The ``nvdisasm`` to use: of the PyPI package, of ``$CUDA_PATH`` or ``$CUDA_HOME``, of PATH, of the system.

    Raises
    ------
    NvdisasmNotFoundError
        There is none.
    """
    for path in _candidates():
        if os.access(path, os.X_OK) and path.is_file():
            return path
    raise NvdisasmNotFoundError(f"{_PROGRAM} was not found: {INSTALL_HINT}")


def disassemble(cubin: Path) -> str:
    """The SASS of every function of a CUBIN file, as ``nvdisasm -c`` prints it.

    Raises
    ------
    NvdisasmNotFoundError
        There is no nvdisasm.
    DisassemblyError
        It cannot be run, or refuses the file: it is no CUBIN, or of an architecture that is newer than the program.
    """
    program = find()
    try:
        # Errors are read by people, the output is parsed: neither may depend on the user's language.
        done = subprocess.run(
            [program, "-c", cubin],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DisassemblyError(f"{program} cannot be run: {error}") from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise DisassemblyError(f"{program} refused {cubin.name}: {reason}")
    return done.stdout.decode(errors="replace")


def _candidates() -> Iterator[Path]:
    for entry in toolkit.search_path():
        # One folder a CUDA major version from CUDA 13 on, one a component before.
        yield from sorted(Path(entry, "nvidia").glob(f"cu[0-9]*/bin/{_PROGRAM}"), reverse=True)
        yield Path(entry, "nvidia", "cuda_nvdisasm", "bin", _PROGRAM)
    for name in ("CUDA_PATH", "CUDA_HOME"):
        if os.path.isabs(prefix := os.environ.get(name, "")):
            yield Path(prefix, "bin", _PROGRAM)
    if os.path.isabs(found := shutil.which(_PROGRAM) or ""):
        yield Path(found)
    yield Path(_SYSTEM_PREFIX, "bin", _PROGRAM)
