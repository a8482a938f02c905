"""`cuattn-bench doctor`: what it says of a sound machine, and of one where something is broken or missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cuattn.benchmark import doctor, machine
from cuattn.compile import toolkit
from cuattn.compile.sass import nvdisasm
from cuattn.errors import CompileError, HostUnavailableError, NVRTCNotFoundError

Examine = Callable[[], dict[str, doctor.Finding]]


def only(check: str) -> dict[str, doctor.Finding]:
    return {one.what: one for one in doctor.CHECKS[check]()}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_this_machine_is_sound() -> None:
    result = command()
    assert result.exit_code == 0, result.output
    for words in ("they compile", "a softmax is right", "ok", "pip install", "no driver"):
        assert words in result.stdout or machine.has_gpu()
    found = {one["what"]: one for one in json.loads(command("--json").stdout)}
    assert found["NVRTC"]["state"] == "ok" and found["cache"]["state"] == "ok"
    assert found["peer flash-attn 2"]["mend"] == "pip install flash-attn" or found["peer flash-attn 2"]["state"] == "ok"
    assert all(one["mend"] for one in found.values() if one["what"].startswith("peer"))


def test_a_finding_that_is_broken_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[doctor.Finding]:
        raise ValueError("odd")

    broken = doctor.Finding("a thing", "broken", "it is", "mend it")
    monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: iter([broken]), "two": fails})
    result = command()
    assert result.exit_code == 1
    assert "mend it" in result.stdout and "2 broken" in result.stdout
    assert "the check failed: ValueError: odd" in result.stdout
    monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: iter([broken._replace(state="missing")])})
    assert command().exit_code == 0


def test_a_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(file))
    assert only("cache")["cache"].state == "broken" and "not a directory" in only("cache")["cache"].found
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(open_to_all))
    assert f"chmod go-w {open_to_all}" in only("cache")["cache"].found


def test_a_compiler_that_is_missing_or_does_not_fit_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = toolkit.find()

    def refuses(*arguments: object, **options: object) -> None:
        raise CompileError("no such type")

    monkeypatch.setattr(doctor.compile, "build_source", refuses)
    one = only("NVRTC")["NVRTC"]
    assert one.state == "broken" and "no such type" in one.found
    assert (
        one.mend.startswith("pip install 'nvidia-cuda-runtime") and ".".join(found.version.split(".")[:2]) in one.mend
    )

    def missing() -> None:
        raise NVRTCNotFoundError("there is none")

    monkeypatch.setattr(doctor.toolkit, "find", missing)
    assert only("NVRTC")["NVRTC"] == doctor.Finding("NVRTC", "broken", "there is none", "pip install 'cuattn[cuda12]'")


def test_a_host_executor_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuattn.host import library

    def missing() -> None:
        raise HostUnavailableError("no C compiler was found")

    monkeypatch.setattr(library, "load", missing)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert only("host executor")["host executor"].mend == "apt-get install gcc"


def test_variables_that_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUATTN_HOST_TREADS", "2")
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_70")
    found = only("environment variables")
    assert {name: one.mend for name, one in found.items()} == {
        "CUATTN_HOST_ARCH": "unset CUATTN_HOST_ARCH",
        "CUATTN_HOST_TREADS": "unset CUATTN_HOST_TREADS",
    }


def test_a_gpu_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "--query-gpu": [["550.1", "H200", "345 MHz", "1980 MHz", "3 %", "31"]],
        "--query-compute-apps": [["4242", "1000 MiB"]],
    }
    monkeypatch.setattr(doctor, "_smi", lambda fields, query="--query-gpu": answers[query])
    monkeypatch.setattr(machine, "cupy_version", lambda: "cupy-cuda12x 14")
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "gpu", lambda: {"gpu": "H200", "compute_capability": "90"})
    found = only("GPU")
    assert found["driver"].found == "550.1" and found["GPU"].state == "ok"
    assert "345 MHz of 1980 MHz, 3 % busy, 31 °C; it is idle" in found["clock of H200"].found
    assert found["other processes"].state == "broken" and "process 4242 with 1000 MiB" in found["other processes"].found
    answers["--query-compute-apps"] = []
    assert only("GPU")["other processes"].state == "ok"
    monkeypatch.setattr(machine, "gpu", lambda: {"gpu": "V100", "compute_capability": "70"})
    assert only("GPU")["GPU"].state == "broken"
    monkeypatch.setattr(machine, "cupy_version", lambda: None)
    assert only("GPU")["CuPy"] == doctor.Finding(
        "CuPy", "broken", "not installed: NumPy arrays only", "pip install 'cuattn[cuda12]'"
    )


def test_no_disassembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdisasm, "_candidates", lambda: iter(()))
    assert only("extras")["nvdisasm"].mend == "pip install 'cuattn[inspect]'"
