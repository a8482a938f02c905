"""The Hopper programs of the instruction table on a device: their answers, and where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import compile
from cuattn.benchmark.suite import failure
from cuattn.host.tensor_map import TensorMap
from cuattn.testing.instructions import hopper_programs
from cuattn.testing.instructions.hopper_programs import ARCH, Program

Answers = dict[str, NDArray[Any]]


def run_programs(executor: str, scratch: Path, key: str, answers: Answers) -> dict[str, Any]:
    """Run every program; figures in the form of a family of the instruction table."""
    differences: list[str] = []
    errors: list[str] = []
    different = 0
    programs = hopper_programs.programs()
    load = _load_host if executor == "host" else _load_cuda
    module = load(scratch)
    for number, program in enumerate(programs):
        try:
            answer = run_on_host(module, program) if executor == "host" else _run_on_cuda(module, program)
        except Exception as error:
            errors.append(f"{program.name}: {failure(error)}")
            continue
        answers[f"{key}_{number}"] = answer
        found = program.mismatches(answer)
        different += bool(found)
        differences += found[:8]
    return {
        "cases": len(programs),
        "opcodes": [program.name for program in programs],
        "different": different,
        "differences": differences,
        "refused": len(errors),
        "errors": errors,
    }


def _load_host(scratch: Path) -> Any:
    from cuattn import host

    return host.RawModule(code=hopper_programs.source(), arch=ARCH)


def _load_cuda(scratch: Path) -> Any:
    import cupy

    binary = compile.build_source(hopper_programs.source(), name="hopper_programs.cu", arch=ARCH, kind="cubin")
    return cupy.RawModule(path=str(binary.path))


def run_on_host(module: Any, program: Program) -> NDArray[np.uint32]:
    """The output of a program on the host executor."""
    from cuattn import host

    def upload(x: NDArray[Any]) -> NDArray[Any]:
        with host.check():  # it counts as written
            array = host.empty(x.shape, x.dtype)  # aligned as memory of a GPU is
        array[...] = x
        return array

    out = program.initial.copy()
    arguments = (out, *program.arguments(upload))
    module.get_function(program.entry)((1,), (program.threads,), arguments, shared_mem=program.smem_bytes)
    return out


def _run_on_cuda(module: Any, program: Program) -> NDArray[np.uint32]:
    import cupy

    def upload(x: NDArray[Any]) -> Any:
        return cupy.asarray(x.view(np.uint8)).view(x.dtype)  # CuPy takes 8-bit floats as views only

    out = cupy.asarray(program.initial)
    arguments = program.arguments(upload)  # alive until the answer is there
    values = tuple(x.value if isinstance(x, TensorMap) else x for x in arguments)
    module.get_function(program.entry)((1,), (program.threads,), (out, *values), shared_mem=program.smem_bytes)
    answer: NDArray[np.uint32] = cupy.asnumpy(out)
    return answer
