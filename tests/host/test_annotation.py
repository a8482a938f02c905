"""Counters of source lines, and the source with them beside it."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import host
from cuattn.errors import ArgumentError

SOURCE = """extern "C" __global__ void k(float* y, const float* x) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 8) {
    y[threadIdx.x] = s[threadIdx.x] + 1;
  }
}
"""


@pytest.fixture(scope="module")
def profile() -> host.Profile:
    kernel = host.RawModule(code=SOURCE).get_function("k")
    with host.profile() as profile:
        kernel((1,), (32,), (np.zeros(32, np.float32), np.zeros(32, np.float32)))
    return profile


def columns(profile: host.Profile) -> dict[int, list[str]]:
    """The counters of each line that has some."""
    (file,) = {line.rpartition(":")[0] for line in profile.lines}
    text = profile.annotate(file, SOURCE).splitlines()
    assert len(text) == 1 + len(SOURCE.splitlines())
    assert [line.endswith(source) for line, source in zip(text[1:], SOURCE.splitlines(), strict=True)].count(False) == 0
    width = text[0].index(file)
    return {number: line[:width].split() for number, line in enumerate(text[1:], 1) if line[:width].split()}


def test_lines_have_their_own_lanes_and_bytes(profile: host.Profile) -> None:
    found = columns(profile)
    assert found[3][2:] == ["128", "128"] and float(found[3][1]) > 24  # read from one memory, written to the other
    assert found[6][2:] == ["32", "32"] and float(found[6][1]) == 8
    assert found[4][0] == "1"


def test_what_lines_have_is_what_the_launch_has(profile: host.Profile) -> None:
    counts = profile.line_counts.values()
    assert sum(of.instructions for of in counts) == profile.warp_instructions == sum(profile.lines.values())
    assert sum(of.lanes for of in counts) == sum(profile.lanes.values())
    for space, moved in (
        ("global", sum(of.global_bytes for of in counts)),
        ("shared", sum(of.shared_bytes for of in counts)),
    ):
        assert moved == sum(profile.bytes[space].values())
    assert profile.kernels == {"k": 1} and profile.lines.keys() <= profile.lines_of_code


def test_kernels_of_the_package_are_found_by_name() -> None:
    with host.profile() as profile:
        cuattn.softmax(np.zeros((2, 8), np.float32))
    text = profile.annotate("softmax_rows.cuh")
    assert text.splitlines()[0].endswith("softmax_rows.cuh") and "for (" in text


def test_files_that_are_not_there(profile: host.Profile) -> None:
    (file,) = {line.rpartition(":")[0] for line in profile.lines}
    with pytest.raises(ArgumentError, match=r"no line of 'other\.cu' was executed; files are"):
        profile.annotate("other.cu")
    with pytest.raises(ArgumentError, match="give the text"):
        profile.annotate(file)
