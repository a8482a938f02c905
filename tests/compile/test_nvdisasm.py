"""nvdisasm: where it is looked for, and what happens where it is not, or fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cuattn.compile import sass
from cuattn.compile.sass import nvdisasm
from cuattn.errors import CuattnError, DisassemblyError, NvdisasmNotFoundError


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No nvdisasm anywhere; the folder returned is on PATH."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(nvdisasm, "_SYSTEM_PREFIX", str(tmp_path / "none"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_without_nvdisasm_the_error_says_what_to_install(nowhere):
    with pytest.raises(NvdisasmNotFoundError, match="pip install nvidia-cuda-nvdisasm") as caught:
        nvdisasm.find()
    assert isinstance(caught.value, CuattnError)
    program(nowhere / "nvdisasm").chmod(0o644)
    with pytest.raises(NvdisasmNotFoundError):
        nvdisasm.find()


def test_where_nvdisasm_is_looked_for(nowhere, monkeypatch):
    system = program(nowhere / "none/bin/nvdisasm")
    assert nvdisasm.find() == system
    on_path = program(nowhere / "nvdisasm")
    assert nvdisasm.find() == on_path
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "home"))
    at_home = program(nowhere / "home/bin/nvdisasm")
    assert nvdisasm.find() == at_home
    old = program(nowhere / "nvidia/cuda_nvdisasm/bin/nvdisasm")
    assert nvdisasm.find() == old
    program(nowhere / "nvidia/cu13/bin/nvdisasm")
    assert nvdisasm.find() == nowhere / "nvidia/cu13/bin/nvdisasm"


def test_what_nvdisasm_refuses(tmp_path):
    path = tmp_path / "broken.cubin"
    path.write_bytes(b"no ELF file")
    with pytest.raises(DisassemblyError, match=r"refused broken\.cubin: "):
        sass.disassemble(path)


def test_a_program_that_cannot_be_run(nowhere):
    program(nowhere / "nvdisasm", "no program at all\0")
    with pytest.raises(DisassemblyError, match="cannot be run"):
        sass.disassemble(nowhere / "any.cubin")
    program(nowhere / "nvdisasm", f"#!{os.path.realpath('/bin/sh')}\nexit 3\n")
    with pytest.raises(DisassemblyError, match="exit code 3"):
        sass.disassemble(nowhere / "any.cubin")
