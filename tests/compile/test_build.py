"""NVRTC: what is built, its resource figures, and what an error says. None of this needs a GPU."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cuattn import compile as cc
from cuattn.compile import builder, nvrtc, resources, toolkit
from cuattn.errors import ArgumentError, CompileError, NotSupportedError, NVRTCNotFoundError

CONSTANTS = {"Element": "__half", "FACTOR": 3}
TINY = 'extern "C" __global__ void tiny(int* x) { x[threadIdx.x] += 1; }'


def elf_end(image: bytes) -> int:
    """The highest offset that the ELF header, its two tables and its sections speak of."""
    assert image[:6] == b"\x7fELF\x02\x01"
    phoff, shoff = struct.unpack_from("<QQ", image, 0x20)
    phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", image, 0x36)
    end = max(phoff + phentsize * phnum, shoff + shentsize * shnum)
    for number in range(shnum):
        section_type, offset, size = struct.unpack_from("<4xI16xQQ", image, shoff + number * shentsize)
        if section_type != 8:  # SHT_NOBITS takes no room in the file
            end = max(end, offset + size)
    return end


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_cubin_of_every_architecture_is_a_whole_elf_file(kernels: Path, arch: str) -> None:
    binary = cc.build("scale", CONSTANTS, arch=arch, kind="cubin", directory=kernels)
    assert elf_end(binary.image) <= len(binary.image)
    assert binary.path.read_bytes() == binary.image
    figures = binary.resources["scale"]
    assert figures.static_smem_bytes == 64 * 4
    assert 4 <= figures.registers <= 40
    assert figures.barriers == 1
    assert (figures.spill_stores, figures.spill_loads, figures.stack_bytes) == (0, 0, 0)


def test_ptx(kernels: Path) -> None:
    binary = cc.build("scale", CONSTANTS, arch="sm_90a", kind="ptx", directory=kernels)
    text = binary.image.decode("ascii")
    assert ".target sm_90a" in text
    assert ".visible .entry scale(" in text
    assert "\0" not in text
    assert binary.resources == {}
    files = [line.split('"')[1] for line in text.splitlines() if ".file" in line]
    assert {"/cuattn/kernels/scale.cu", "/cuattn/kernels/tools/factor.cuh"} <= set(files)
    # The headers of CUDA are inlined too; where they are installed must not show.
    assert all(name.startswith(("/cuattn/kernels/", "/cuda/include/")) for name in files)


def test_images_name_no_folder_of_this_machine(kernels: Path) -> None:
    places = [str(toolkit.find().include), str(kernels), os.getcwd(), sys.prefix]
    for kind in ("ptx", "cubin"):
        image = cc.build("scale", CONSTANTS, arch="sm_80", kind=kind, directory=kernels).image
        assert not [place for place in places if place.encode() in image]


def test_the_current_folder_changes_nothing(kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / folder / "cache"))
        binary = cc.build("scale", CONSTANTS, arch="sm_80", kind="ptx", directory=kernels)
        free = cc.build_source(TINY, name="tiny.cu", arch="sm_80", kind="ptx")
        images.append((binary.key, binary.image, free.key, free.image))
    assert images[0] == images[1]


def test_cubin_is_assembled_from_the_same_ptx(kernels: Path) -> None:
    # The host executor runs the PTX; what holds for it holds for the CUBIN only if both come from one PTX.
    text = cc.source("scale", CONSTANTS, directory=kernels)
    library = nvrtc.library()
    include = toolkit.find().include
    common = ["-std=c++17", "-default-device", "-lineinfo", f"-I{include}"]
    for arch in ("80", "90a"):
        both = library.compile(text, "/a.cu", [*common, f"-arch=sm_{arch}"], {})
        only = library.compile(text, "/a.cu", [*common, f"-arch=compute_{arch}"], {})
        assert both.cubin
        assert both.ptx == only.ptx


def test_spills_and_stack_are_reported() -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float* x) {
        float value[96];
        #pragma unroll
        for (int i = 0; i < 96; i++) value[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = value[95 - i] * value[(i * 7) % 96];
    }
    extern "C" __global__ void modest(float* x) { x[0] = 1.0f; }
    """
    figures = cc.build_source(text, name="spills.cu", arch="sm_80", kind="cubin").resources
    assert set(figures) == {"greedy", "modest"}
    assert figures["greedy"].spill_stores > 0
    assert figures["greedy"].spill_loads > 0
    assert figures["greedy"].stack_bytes > 0
    assert figures["modest"].spill_stores == figures["modest"].stack_bytes == 0


def test_figures_of_a_log_with_a_called_function() -> None:
    log = """\
ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function 'k2' for 'sm_90a'
ptxas info    : Function properties for k2
ptxas         .     400 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for helper
ptxas         .     16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 3 barriers, 400 bytes cumulative stack size, 1024+16 bytes smem
"""
    assert resources.parse(log) == {"k2": resources.Resources(32, 8, 12, 400, 1040, 3)}


def test_error_shows_the_line_of_the_header(kernels: Path) -> None:
    header = kernels / "tools" / "factor.cuh"
    header.write_text(
        header.read_text() + "\n// one more line\n__device__ int wrong() { return missing_name; }\n// after\n"
    )
    with pytest.raises(CompileError) as caught:
        cc.build("scale", CONSTANTS, arch="sm_80", kind="ptx", directory=kernels)
    message = str(caught.value)
    assert "/cuattn/kernels/tools/factor.cuh:6" in message.splitlines()[0]
    assert ">     6 | __device__ int wrong() { return missing_name; }" in message
    assert "      5 | // one more line" in message
    assert "      7 | // after" in message
    assert 'identifier "missing_name" is undefined' in caught.value.log
    assert "missing_name" in caught.value.source


def test_error_of_the_assembler_shows_the_line_too(kernels: Path) -> None:
    # A typical mistake in inline assembly: NVRTC lets it pass, and ptxas names a line of the PTX only.
    header = kernels / "common.cuh"
    header.write_text(
        "#pragma once\ninline Element clamped(Element v) {\n\n"
        '    asm volatile("wgmma.fence.sync.aligned;");\n    return v;\n}\n'
    )
    with pytest.raises(CompileError) as caught:
        cc.build("scale", CONSTANTS, arch="sm_80", kind="cubin", directory=kernels)
    first = str(caught.value).splitlines()[0]
    assert "/cuattn/kernels/common.cuh:4" in first
    assert "wgmma.fence" in first
    assert '>     4 |     asm volatile("wgmma.fence.sync.aligned;");' in str(caught.value)


def test_error_in_a_free_source() -> None:
    with pytest.raises(CompileError, match=r"free\.cu:2") as caught:
        cc.build_source("int fine;\nint 2wrong;\n", name="free.cu", arch="sm_80", kind="ptx")
    assert ">     2 | int 2wrong;" in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.log, copy.source) == (str(caught.value), caught.value.log, caught.value.source)


def test_a_failed_build_leaves_nothing_behind(cache_dir: Path) -> None:
    with pytest.raises(CompileError):
        cc.build_source("int 2wrong;", name="free.cu", arch="sm_80", kind="ptx")
    assert list(cache_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"arch": "sm_75"}, NotSupportedError, "8.0"),
        ({"arch": "sm_99"}, ArgumentError, "sm_90a"),
        ({"arch": "ampere"}, ArgumentError, "sm_80"),
        ({"arch": "sm_80a"}, ArgumentError, "sm_80"),
        ({"kind": "fatbin"}, ArgumentError, "cubin"),
        ({"options": ["-arch=sm_80"]}, ArgumentError, "arch="),
    ],
)
def test_bad_requests(keywords: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cc.build_source(TINY, **{"name": "tiny.cu", "arch": "sm_80", "kind": "ptx", **keywords})


def test_options_reach_the_compiler() -> None:
    text = "static_assert(__cplusplus == EXPECTED);\n" + TINY
    for options in (["-DEXPECTED=201703L"], ["-std=c++20", "-DEXPECTED=202002L"]):
        binary = cc.build_source(text, name="tiny.cu", arch="sm_80", kind="ptx", options=options)
        assert b".entry tiny" in binary.image


def test_files_behind_include_options_are_never_stale(tmp_path: Path) -> None:
    header = tmp_path / "mine.h"
    images = []
    for value in (11, 12):
        header.write_text(f"#define VALUE {value}\n")
        text = '#include <mine.h>\nextern "C" __global__ void k(int* x) { *x = VALUE; }'
        options = [f"-I{tmp_path}"]
        images.append(cc.build_source(text, name="k.cu", arch="sm_80", kind="ptx", options=options).image)
    assert b"11;" in images[0]
    assert b"12;" in images[1]


def test_threads_that_want_one_kernel_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = builder._make

    def counting(*args: object) -> cc.Binary:
        made.append(args)
        return make(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(builder, "_make", counting)
    barrier = threading.Barrier(8)
    results = []

    def work() -> None:
        barrier.wait()
        results.append(cc.build_source(TINY, name="tiny.cu", arch="sm_80", kind="cubin"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(results) == 8
    assert len({id(binary) for binary in results}) == 1


def test_lookup_in_memory_is_cheap(kernels: Path) -> None:
    constants = {f"CONSTANT_{number}": number for number in range(12)} | CONSTANTS
    first = cc.build("scale", constants, arch="sm_80", kind="ptx", directory=kernels)
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            again = cc.build("scale", constants, arch="sm_80", kind="ptx", directory=kernels)
        best = min(best, (time.perf_counter() - start) / 100)
    assert again is first
    assert best < 20e-6  # about 3 µs; the rest is for slow and busy machines


def test_equal_constants_of_different_types_are_different_kernels(tmp_path: Path) -> None:
    (tmp_path / "which.cu").write_text(
        "__device__ int of(int) { return 41; }\n__device__ int of(bool) { return 42; }\n__device__ int of(float) "
        '{ return 43; }\nextern "C" __global__ void which(int* x) { *x = of(X); }\n'
    )
    for value, expected in ((1, b"41;"), (True, b"42;"), (1.0, b"43;")):
        image = cc.build("which", {"X": value}, arch="sm_80", kind="ptx", directory=tmp_path).image
        assert expected in image


def test_source_compiles_with_what_cupy_passes(kernels: Path) -> None:
    # What cupy.RawModule(code=..., options=("-std=c++17", "-default-device")) does, but for asking the device.
    cupy_nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    program = cupy_nvrtc.createProgram(cc.source("scale", CONSTANTS, directory=kernels), "scale.cu", (), ())
    options = ("-std=c++17", "-default-device", f"-I{toolkit.find().include}", "-ftz=true", "-arch=compute_80")
    cupy_nvrtc.compileProgram(program, options)
    assert ".entry scale" in str(cupy_nvrtc.getPTX(program))
    cupy_nvrtc.destroyProgram(program)


def test_no_nvrtc_says_what_to_install(tmp_path: Path) -> None:
    # -S leaves site-packages out, and with it the NVIDIA wheels.
    code = (
        "from cuattn import compile as cc, errors\n"
        "from cuattn.compile import toolkit\n"
        "toolkit._installed = toolkit._from_loader = lambda: iter(())\n"
        "try:\n    cc.build_source('int x;', name='x.cu', arch='sm_80', kind='ptx')\n"
        "except errors.NVRTCNotFoundError as error:\n    print(error)\n"
    )
    root = Path(cc.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert "cuattn[cuda12]" in run.stdout, run.stderr


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = toolkit.Toolkit(toolkit.find().library, "12.9.86", None, "none")
    monkeypatch.setattr(toolkit, "find", lambda: kit)
    with pytest.raises(NVRTCNotFoundError, match="CUDA headers"):
        cc.build_source("#include <cuda_fp16.h>\n" + TINY, name="tiny.cu", arch="sm_80", kind="ptx")
    assert b".entry tiny" in cc.build_source(TINY, name="tiny.cu", arch="sm_80", kind="ptx").image
