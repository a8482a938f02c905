"""Files that a source makes the compiler read belong to the key, however it names them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cuattn import compile as cc
from cuattn.compile import builder, includes, toolkit

KERNEL = '\nextern "C" __global__ void k(int* x) { *x = VALUE; }\n'
# How a source gets at VALUE, which {dir}/value.h defines; and options.
WAYS: dict[str, tuple[str, list[str]]] = {
    "absolute": ('#include "{dir}/value.h"', []),
    "-I": ("#include <value.h>", ["-I{dir}"]),
    "-I apart": ("#include <value.h>", ["-I", "{dir}"]),
    "--include-path": ("#include <value.h>", ["--include-path={dir}"]),
    "--pre-include": ("", ["--pre-include={dir}/value.h"]),
    "nested": ('#include "{dir}/outer.h"', []),
    "beside a nested one": ("#include <outer.h>", ["-I{dir}"]),
    "macro": ('#define HEADER "{dir}/value.h"\n#include HEADER', []),
    "macro of a macro": ('#define HEADER "{dir}/value.h"\n#define NAME HEADER // which\n#include NAME', []),
    "macro from outside": ("#include HEADER", ['-DHEADER="{dir}/value.h"']),
    "stringized": ("#define S(x) #x\n#define Q(x) S(x)\n#include Q({dir}/value.h)", []),
    "spliced": ('#inc\\\nlude "{dir}/value.h"', []),
    "digraph": ('%:include "{dir}/value.h"', []),
    "comments": ('/* a */ # /* b */ include /* c */ "{dir}/value.h"', []),
    "up and down": ('#include "{dir}/../{base}/value.h"', []),
    "next": ("#include <first.h>", ["-I{dir}/other", "-I{dir}"]),
}


def build(text: str, options: list[str]) -> cc.Binary:
    cc.forget()
    return cc.build_source(text, name="k.cu", arch="sm_80", kind="ptx", options=options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "headers"
    (folder / "other").mkdir(parents=True)
    (folder / "outer.h").write_text('#include "value.h"\n')
    (folder / "other" / "first.h").write_text("#include_next <first.h>\n")
    (folder / "first.h").write_text('#include "value.h"\n')
    (folder / "value.h").write_text("#define VALUE 11\n")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_an_edited_header_builds_anew(way: str, folder: Path) -> None:
    text, options = WAYS[way]
    text = text.replace("{dir}", str(folder)).replace("{base}", folder.name) + KERNEL
    options = [option.replace("{dir}", str(folder)) for option in options]
    first = build(text, options)
    assert b"11;" in first.image
    (folder / "value.h").write_text("#define VALUE 12\n")
    assert b"12;" in build(text, options).image
    (folder / "value.h").write_text("#define VALUE 11\n")
    assert build(text, options).image == first.image


@pytest.mark.parametrize("question", ['__has_include("{dir}/late.h")', "__has_include(<late.h>)"])
def test_a_header_that_appears_builds_anew(question: str, folder: Path) -> None:
    text = f"#if {question.replace('{dir}', str(folder))}\n#define VALUE 12\n#else\n#define VALUE 11\n#endif{KERNEL}"
    options = [f"-I{folder}"]
    assert b"11;" in build(text, options).image
    (folder / "late.h").touch()
    assert b"12;" in build(text, options).image


def test_a_header_that_comes_first_in_the_search_builds_anew(folder: Path) -> None:
    text, options = "#include <value.h>" + KERNEL, [f"-I{folder}/other", f"-I{folder}"]
    assert b"11;" in build(text, options).image
    (folder / "other" / "value.h").write_text("#define VALUE 12\n")
    assert b"12;" in build(text, options).image


def test_unchanged_headers_are_taken_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, options = "#include <outer.h>" + KERNEL, [f"-I{folder}"]
    first = build(text, options)
    monkeypatch.setattr(builder, "_make", lambda *args: pytest.fail("compiled again"))
    assert build(text, options).image == first.image


def test_relative_folders_are_those_of_the_caller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert b"11;" in build("#include <value.h>" + KERNEL, ["-Iheaders"]).image
    monkeypatch.chdir(folder)
    assert b"11;" in build("#include <value.h>" + KERNEL, ["-I."]).image


def test_a_header_that_changes_during_a_compilation_is_not_kept_under_its_old_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuattn.compile import nvrtc

    text, options = "#include <value.h>" + KERNEL, [f"-I{folder}"]
    compile = nvrtc.compile

    def edit_and_compile(*args: object, **keywords: object) -> nvrtc.Result:
        (folder / "value.h").write_text("#define VALUE 12\n")
        return compile(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(nvrtc, "compile", edit_and_compile)
    assert b"12;" in build(text, options).image
    monkeypatch.setattr(nvrtc, "compile", compile)
    (folder / "value.h").write_text("#define VALUE 11\n")
    assert b"11;" in build(text, options).image


def find(text: str, options: list[str] | None = None) -> includes.Includes:
    return includes.find(text, "/a.cu", options or [], toolkit.find().include)


@pytest.mark.parametrize(
    "text",
    [
        "#include UNKNOWN",
        "#define H(x) <x>\n#include H(a.h)",
        "#define D a\n#define H <D/b.h>\n#include H",
        '#define P "a"\n#define H P "b"\n#include H',
        "#if __has_include(NAME)\n#endif",
        "#define HAS __has_include\n#if HAS(<a.h>)\n#endif",
    ],
)
def test_what_only_the_preprocessor_knows_is_volatile(text: str) -> None:
    assert find(text).volatile


def test_precompiled_headers_are_volatile() -> None:
    assert find("", ["--use-pch=a.pch"]).volatile


def test_a_source_without_headers_of_its_own_reads_nothing_else() -> None:
    text = (
        "#include <cuda_fp16.h>\n#ifdef __has_include\n#endif\n#if defined(__has_include)\n#endif\n#define include 3\n"
    )
    found = find(text)
    assert (found.files, found.volatile, found.digest()) == ({}, False, "")


def test_hostile_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cycle.h").write_text(f'#include "../{tmp_path.name}/cycle.h"\n')
    os.mkfifo(tmp_path / "fifo.h")
    (tmp_path / "loop.h").symlink_to("loop.h")
    (tmp_path / "folder.h").mkdir()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.h")
    for number in range(1500):
        (tmp_path / f"deep{number}.h").write_text(f'#include "deep{number + 1}.h"\n')
    names = ("cycle", "fifo", "loop", "folder", "socket", "deep0", "zero\0byte", "x" * 5000)
    text = "\n".join(f'#include "{tmp_path}/{name}.h"' for name in names) + "\n# /*" + "/* */" * 5000
    assert len(find(text).files) == len(names) + 1500
