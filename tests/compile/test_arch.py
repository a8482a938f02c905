"""Which architecture a device gets, and what each architecture offers."""

from __future__ import annotations

import pytest

from cuattn import compile as cc
from cuattn.compile import arch, nvrtc
from cuattn.compile.arch import Target
from cuattn.errors import ArgumentError, NotSupportedError

NVRTC_12_0 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
NVRTC_12_8 = (*NVRTC_12_0, 100, 101, 120)
NVRTC_12_9 = (*NVRTC_12_0, 100, 101, 103, 120, 121)
NVRTC_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 107, 110, 120, 121)


@pytest.mark.parametrize(
    ("device", "supported", "expected"),
    [
        # exact, with the suffix from 9.0 on
        ((8, 0), NVRTC_12_9, Target("sm_80", "cubin")),
        ((8, 6), NVRTC_12_9, Target("sm_86", "cubin")),
        ((8, 7), NVRTC_12_9, Target("sm_87", "cubin")),
        ((8, 9), NVRTC_12_9, Target("sm_89", "cubin")),
        ((9, 0), NVRTC_12_0, Target("sm_90a", "cubin")),
        ((10, 0), NVRTC_12_9, Target("sm_100a", "cubin")),
        ((10, 3), NVRTC_12_9, Target("sm_103a", "cubin")),
        ((11, 0), NVRTC_13, Target("sm_110a", "cubin")),
        ((12, 0), NVRTC_13, Target("sm_120a", "cubin")),
        ((12, 1), NVRTC_12_9, Target("sm_121a", "cubin")),
        # the same major version: no suffix, and none of an embedded device
        ((8, 9), (80, 86), Target("sm_86", "cubin")),
        ((8, 9), (80, 86, 87), Target("sm_86", "cubin")),
        ((10, 3), NVRTC_12_8, Target("sm_100", "cubin")),
        ((12, 1), NVRTC_12_8, Target("sm_120", "cubin")),
        # another major version: PTX of the newest that is older
        ((10, 0), NVRTC_12_0, Target("sm_90", "ptx")),
        ((12, 0), NVRTC_12_0, Target("sm_90", "ptx")),
        ((13, 0), NVRTC_13, Target("sm_121", "ptx")),
        ((8, 0), (80,), Target("sm_80", "cubin")),
    ],
)
def test_target_of_a_device(device: tuple[int, int], supported: tuple[int, ...], expected: Target) -> None:
    target = arch.for_device(device, supported)
    assert target == expected
    arch.capability(target.arch)  # what is chosen can be built


@pytest.mark.parametrize("device", [(7, 5), (7, 0), (6, 1)])
def test_old_devices_are_refused(device: tuple[int, int]) -> None:
    with pytest.raises(NotSupportedError, match=rf"{device[0]}\.{device[1]}.*8\.0"):
        arch.for_device(device, NVRTC_12_9)


def test_nvrtc_that_is_too_new_for_the_device() -> None:
    with pytest.raises(NotSupportedError, match="sm_80"):
        arch.for_device((8, 0), (90, 100))


@pytest.mark.parametrize(
    ("name", "capability", "smem_kib"),
    [
        ("sm_80", (8, 0), 163),
        ("sm_86", (8, 6), 99),
        ("sm_89", (8, 9), 99),
        ("sm_90", (9, 0), 227),
        ("sm_90a", (9, 0), 227),
        ("sm_100a", (10, 0), 227),
        ("sm_120a", (12, 0), 99),
    ],
)
def test_facts(name: str, capability: tuple[int, int], smem_kib: int) -> None:
    assert arch.capability(name) == capability
    assert cc.smem_limit_bytes(name) == smem_kib * 1024


@pytest.mark.parametrize("name", ["sm_70", "sm_72", "sm_75"])
def test_old_architectures_are_refused(name: str) -> None:
    with pytest.raises(NotSupportedError, match=name):
        arch.capability(name)


@pytest.mark.parametrize(
    "name", ["", "sm_", "90", "compute_90", "sm_90b", "sm_80a", "sm_8", "sm_9000", "SM_80", "sm_84"]
)
def test_unknown_architectures_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="sm_80, "):
        arch.capability(name)


def test_every_name_that_this_nvrtc_knows_compiles() -> None:
    supported = nvrtc.library().supported_archs()
    for name in arch.names():
        major, minor = arch.capability(name)
        if major * 10 + minor in supported:
            text = 'extern "C" __global__ void none() {}'
            assert f".target {name}" in cc.build_source(text, name="none.cu", arch=name, kind="ptx").image.decode()


def test_device_of_this_nvrtc() -> None:
    assert cc.for_device((9, 0)) == Target("sm_90a", "cubin")
