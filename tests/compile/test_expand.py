"""Expansion of includes and constants into one source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cuattn import compile as cc
from cuattn.compile import expand
from cuattn.errors import ArgumentError, CompileError

CONSTANTS = {"Element": "float", "FACTOR": 3}


def located(text: str) -> dict[tuple[str, int], str]:
    """(file, line) to text, by the ``#line`` directives alone, as a compiler reads them."""
    result, here, count = {}, "", 0
    for line in text.split("\n"):
        if line.startswith("#line"):
            _, number, name = line.split()
            here, count = name.strip('"'), int(number)
        else:
            result.setdefault((here, count), line)
            count += 1
    return result


def test_every_line_keeps_its_place(kernels: Path) -> None:
    lines = located(cc.source("scale", CONSTANTS, directory=kernels))
    for path in kernels.rglob("*.cu*"):
        virtual = f"/cuattn/kernels/{path.relative_to(kernels).as_posix()}"
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.startswith("#"):  # includes and #pragma once have been dealt with
                assert lines[virtual, number] == line


def test_headers_come_once_and_nothing_is_left_to_include(kernels: Path) -> None:
    text = cc.source("scale", CONSTANTS, directory=kernels)
    assert text.count("Element clamped(Element value)") == 1
    assert text.count("Element scaled(Element value)") == 1
    assert "#pragma once" not in text
    # The one in a comment stays a comment; it names no file, so expanding it would have failed.
    assert text.count("#include") == 1
    assert '#include "not_this.cuh"' in text
    assert str(kernels) not in text


def test_system_includes_stay(kernels: Path) -> None:
    (kernels / "common.cuh").write_text(
        "#pragma once\n#include <cuda_fp16.h>\ninline Element clamped(Element v) { return v; }"
    )
    assert "#include <cuda_fp16.h>" in cc.source("scale", CONSTANTS, directory=kernels)


def test_headers_that_include_each_other(kernels: Path) -> None:
    (kernels / "common.cuh").write_text('#pragma once\n#include "tools/factor.cuh"\nint common;')
    text = cc.source("scale", CONSTANTS, directory=kernels)
    assert text.count("int common;") == 1


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (64, "constexpr int X = 64;"),
        (-1, "constexpr int X = -1;"),
        (np.int32(7), "constexpr int X = 7;"),
        (2**31, "constexpr long long X = 2147483648LL;"),
        (-(2**31), "constexpr long long X = -2147483648LL;"),
        (True, "constexpr bool X = true;"),
        (np.bool_(False), "constexpr bool X = false;"),
        (1.0, "constexpr float X = 1.0f;"),
        (1e-5, "constexpr float X = 1e-05f;"),
        (np.float32(0.1), "constexpr float X = 0.10000000149011612f;"),
        ("float4", "using X = float4;"),
    ],
)
def test_constants(value: expand.Constant, line: str) -> None:
    assert expand.prologue({"X": value}) == [line]


def test_constants_of_every_kind_compile() -> None:
    values = {"A": 2**40, "B": True, "C": 1e-5, "D": "__nv_bfloat16", "E": -(2**31), "F": "__half2", "G": 1e30}
    numbers = "static_assert(A == 1099511627776 && B && C > 0.9e-5f && C < 1.1e-5f && E < 0 && G > 1e29f);"
    types = "static_assert(sizeof(D) == 2 && sizeof(F) == 4);"
    text = "\n".join([*expand.prologue(values), numbers, types, 'extern "C" __global__ void none() {}'])
    cc.build_source(text, name="constants.cu", arch="sm_80", kind="ptx")


def test_order_of_constants_does_not_matter(kernels: Path) -> None:
    backwards = dict(reversed(CONSTANTS.items()))
    assert cc.source("scale", CONSTANTS, directory=kernels) == cc.source("scale", backwards, directory=kernels)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"X": 2**63}, "does not fit 64 bits"),
        ({"X": float("inf")}, "not finite"),
        ({"X": None}, "NoneType"),
        ({"1X": 1}, "not a C identifier"),
        ({"X; int y": 1}, "not a C identifier"),
    ],
)
def test_constants_that_c_cannot_hold(constants: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        expand.prologue(constants)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nothing", "../scale", "scale.cu", "", "/etc/passwd"])
def test_unknown_kernel_names_the_known_ones(kernels: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="there are scale"):
        cc.source(name, {}, directory=kernels)


def test_missing_header_is_located(kernels: Path) -> None:
    (kernels / "common.cuh").write_text('#pragma once\n\n#include "gone.cuh"\n')
    with pytest.raises(CompileError, match=r"/cuattn/kernels/common\.cuh\(3\): error: no such file") as caught:
        cc.source("scale", CONSTANTS, directory=kernels)
    assert "gone.cuh" in caught.value.log


def test_header_outside_the_folder_is_refused(kernels: Path) -> None:
    (kernels.parent / "outside.cuh").write_text("")
    (kernels / "common.cuh").write_text('#include "../outside.cuh"\n')
    with pytest.raises(CompileError, match="no such file among the kernels"):
        cc.source("scale", CONSTANTS, directory=kernels)


def test_include_inside_a_condition_is_refused(kernels: Path) -> None:
    # Expanded once: taken out of the untaken branch, the header would be missing for everyone after it.
    (kernels / "common.cuh").write_text('#if 0\n#include "tools/factor.cuh"\n#endif\n')
    with pytest.raises(CompileError, match=r"common\.cuh\(2\).*inside #if"):
        cc.source("scale", CONSTANTS, directory=kernels)


def test_an_edited_header_is_seen_at_once(kernels: Path) -> None:
    before = cc.source("scale", CONSTANTS, directory=kernels)
    header = kernels / "tools" / "factor.cuh"
    header.write_text(header.read_text().replace("value * Element", "value + Element"))
    after = cc.source("scale", CONSTANTS, directory=kernels)
    assert before != after
    assert "value + Element(FACTOR)" in after


def test_every_kernel_of_the_package_expands() -> None:
    names = cc.kernel_names()
    assert names
    for name in names:
        assert f'#line 1 "/cuattn/kernels/{name}.cu"' in cc.source(name, {})
