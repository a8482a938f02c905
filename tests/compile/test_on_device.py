"""What only a GPU can confirm: the driver loads what was built, and CuPy's own compilation of the source agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cuattn import compile as cc
from cuattn.testing.executors import executor_names

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("cuda" not in executor_names(), reason="no GPU answers"),
]

CONSTANTS = {"Element": "__half", "FACTOR": 3}


def scaled_by(module: object) -> np.ndarray:
    import cupy

    x = cupy.arange(200, dtype=np.float16)
    module.get_function("scale")((4,), (64,), (x, np.int32(150)))  # type: ignore[attr-defined]
    return x.get()


def test_driver_loads_cubin_and_ptx(kernels: Path) -> None:
    import cupy

    device = cupy.cuda.Device().compute_capability
    target = cc.for_device((int(device[:-1]), int(device[-1])))
    expected = np.arange(200, dtype=np.float16)
    expected[:150] *= 3
    for arch, kind in ((target.arch, target.kind), ("sm_80", "ptx")):
        binary = cc.build("scale", CONSTANTS, arch=arch, kind=kind, directory=kernels)
        np.testing.assert_array_equal(scaled_by(cupy.RawModule(path=str(binary.path))), expected)


def test_figures_are_the_driver_s(kernels: Path) -> None:
    import cupy

    device = cupy.cuda.Device().compute_capability
    target = cc.for_device((int(device[:-1]), int(device[-1])))
    binary = cc.build("scale", CONSTANTS, arch=target.arch, kind="cubin", directory=kernels)
    function = cupy.RawModule(path=str(binary.path)).get_function("scale")
    figures = binary.resources["scale"]
    assert function.num_regs == figures.registers
    assert function.shared_size_bytes == figures.static_smem_bytes
    assert function.local_size_bytes == figures.stack_bytes


def test_source_runs_through_cupy_alone(kernels: Path) -> None:
    import cupy

    text = cc.source("scale", CONSTANTS, directory=kernels)
    module = cupy.RawModule(code=text, options=("-std=c++17", "-default-device"))
    expected = np.arange(200, dtype=np.float16)
    expected[:150] *= 3
    np.testing.assert_array_equal(scaled_by(module), expected)
