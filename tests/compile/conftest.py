"""Every test here gets an empty cache of its own; `kernels` is a small folder of kernels to compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuattn import compile as cc
from cuattn.compile import cache

# The tests give it the constants Element (a type) and FACTOR.
KERNEL = """\
// Scales a vector.
#include "tools/factor.cuh"
#include "common.cuh"

extern "C" __global__ void scale(Element* x, int count) {
    __shared__ float s_copy[64];
    int idx = blockIdx.x * blockDim.x + threadIdx.x;
    s_copy[threadIdx.x % 64] = idx < count ? float(x[idx]) : 0.0f;
    __syncthreads();
    if (idx < count) x[idx] = scaled(s_copy[threadIdx.x % 64]);
}
"""
COMMON = """\
#pragma once
/* The type comes from the constants:
#include "not_this.cuh"
*/
__device__ Element clamped(Element value) { return value; }
"""
FACTOR = """\
#pragma once
#include "common.cuh"
__device__ Element scaled(Element value) { return clamped(value * Element(FACTOR)); }
"""


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, not yet created."""
    path = tmp_path / "cache"
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(path))
    monkeypatch.setattr(cache, "_fallback", None)
    cc.forget()
    return path


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder with ``scale.cu`` and two headers, one of them in a folder of its own and included twice."""
    folder = tmp_path / "kernels"
    (folder / "tools").mkdir(parents=True)
    (folder / "scale.cu").write_text(KERNEL)
    (folder / "common.cuh").write_text(COMMON)
    (folder / "tools" / "factor.cuh").write_text(FACTOR)
    return folder
