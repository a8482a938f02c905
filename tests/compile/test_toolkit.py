"""Finding NVRTC: in wheels, in an installed toolkit, of the right version. The libraries here are empty files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuattn.compile import nvrtc, program, toolkit
from cuattn.errors import NVRTCNotFoundError

FROM_LOADER = toolkit._from_loader
HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime_api.h")


@pytest.fixture
def real_library() -> Path:
    """The NVRTC of the machine that the test runs on."""
    return Path(toolkit.find().library)


@pytest.fixture(autouse=True)
def bare_machine(real_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with no CUDA at all, and an empty ``site`` on the import path."""
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(toolkit, "_SYSTEM_PREFIX", str(tmp_path / "usr-local-cuda"))
    monkeypatch.setattr(toolkit, "_from_loader", lambda: iter(()))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    toolkit.find.cache_clear()
    yield
    toolkit.find.cache_clear()


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def put_headers(folder: Path) -> Path:
    for name in HEADERS:
        put(folder / name, name)
    return folder


def put_cuda12_wheels(site: Path) -> Path:
    put(site / "nvidia_cuda_nvrtc_cu12-12.9.86.dist-info" / "METADATA")
    put(site / "nvidia_cuda_runtime_cu12-12.9.79.dist-info" / "METADATA")
    put_headers(site / "nvidia" / "cuda_runtime" / "include")
    put(site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc-builtins.so.12.9")
    put(site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.alt.so.12")
    return put(site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12")


def put_cuda13_wheels(site: Path) -> Path:
    put(site / "nvidia_cuda_nvrtc-13.0.88.dist-info" / "METADATA")
    put(site / "nvidia_cuda_runtime-13.0.96.dist-info" / "METADATA")
    put_headers(site / "nvidia" / "cu13" / "include")
    return put(site / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13")


def test_cuda12_wheels(tmp_path: Path) -> None:
    library = put_cuda12_wheels(tmp_path / "site")
    kit = toolkit.find()
    assert (kit.library, kit.version, kit.major) == (str(library), "12.9.86", 12)
    assert kit.include == tmp_path / "site" / "nvidia" / "cuda_runtime" / "include"
    assert kit.include_version == "12.9.79"


def test_cuda13_wheels(tmp_path: Path) -> None:
    library = put_cuda13_wheels(tmp_path / "site")
    kit = toolkit.find()
    assert (kit.library, kit.version) == (str(library), "13.0.88")
    assert (kit.include, kit.include_version) == (tmp_path / "site" / "nvidia" / "cu13" / "include", "13.0.96")


@pytest.mark.parametrize(("cupy", "version"), [(None, "13.0.88"), ("12x", "12.9.86"), ("13x", "13.0.88")])
def test_cupy_decides_between_two(tmp_path: Path, cupy: str | None, version: str) -> None:
    put_cuda12_wheels(tmp_path / "site")
    put_cuda13_wheels(tmp_path / "site")
    if cupy:
        put(tmp_path / "site" / f"cupy_cuda{cupy}-14.2.0.dist-info" / "METADATA")
    assert toolkit.find().version == version


@pytest.mark.parametrize("variable", ["CUDA_PATH", "CUDA_HOME"])
def test_installed_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    library = put(tmp_path / "cuda" / "lib64" / "libnvrtc.so.12.4.127")
    (library.parent / "libnvrtc.so.12").symlink_to(library.name)
    include = put_headers(tmp_path / "cuda" / "include")
    with pytest.raises(NVRTCNotFoundError):
        toolkit.find()
    monkeypatch.setenv(variable, str(tmp_path / "cuda"))
    kit = toolkit.find()
    assert (kit.version, kit.include) == ("12.4.127", include)
    # Nothing tells the version of these headers, but other headers must give another cache key.
    before = kit.include_version
    put(include / "cuda_bf16.h", "a longer one")
    toolkit.find.cache_clear()
    assert toolkit.find().include_version != before


def test_library_of_a_wheel_with_installed_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "site" / "nvidia_cuda_nvrtc_cu12-12.9.86.dist-info" / "METADATA")
    put(tmp_path / "site" / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12")
    put(tmp_path / "site" / "cupy_cuda12x-14.2.0.dist-info" / "METADATA")
    for major, minor in ((13, 0), (12, 4)):
        put(tmp_path / f"cuda-{major}" / "lib64" / f"libnvrtc.so.{major}.{minor}.1")
        put_headers(tmp_path / f"cuda-{major}" / "include")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda-13"))
    assert toolkit.find().include is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-12"))
    toolkit.find.cache_clear()
    kit = toolkit.find()
    assert (kit.version, kit.include) == ("12.9.86", tmp_path / "cuda-12" / "include")


def test_version_comes_from_the_library_where_no_name_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_library: Path
) -> None:
    link = tmp_path / "cuda" / "lib64" / f"libnvrtc.so.{real_library.name.split('.so.')[1].split('.')[0]}"
    link.parent.mkdir(parents=True)
    link.symlink_to(real_library)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    major, minor = toolkit.find().version.split(".")
    assert int(major) >= 12
    assert minor.isdigit()


def test_cuda_11_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = put(tmp_path / "cuda" / "lib64" / "libnvrtc.so.11.2")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    with pytest.raises(NVRTCNotFoundError, match="too old") as caught:
        toolkit.find()
    assert str(library) in str(caught.value)


def test_broken_library_is_named(tmp_path: Path) -> None:
    library = put_cuda12_wheels(tmp_path / "site")
    nvrtc.library.cache_clear()
    try:
        with pytest.raises(NVRTCNotFoundError, match="cannot be loaded") as caught:
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()
    assert str(library) in str(caught.value)


def put_anywhere(folder: Path) -> None:
    """What an attacker, or an unpacked archive, may leave in a folder."""
    put_cuda13_wheels(folder)
    put(folder / "lib64" / "libnvrtc.so.99.1")
    put_headers(folder / "include")


@pytest.mark.parametrize("entry", ["", ".", "{here}"])
def test_nothing_is_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    here = tmp_path / "download"
    put_anywhere(here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [entry.replace("{here}", str(here)), *sys.path])
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, ".")
    with pytest.raises(NVRTCNotFoundError):
        toolkit.find()
    library = put_cuda12_wheels(tmp_path / "site")
    assert toolkit.find().library == str(library)


def test_nothing_is_taken_from_the_folder_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_anywhere(tmp_path / "program")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "program"), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program" / "main.py")])
    with pytest.raises(NVRTCNotFoundError):
        toolkit.find()


def test_packages_may_be_installed_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "lib" / "site-packages"
    library = put_cuda12_wheels(site)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.chdir(site)
    assert toolkit.find().library == str(library)


def test_a_loader_that_searches_the_current_folder_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "_from_loader", FROM_LOADER)
    monkeypatch.setattr(program, "version_of", lambda name: pytest.fail(f"{name} was loaded"))
    for path in ("", ":/usr/lib", "/usr/lib:", "lib", "/usr/lib:./lib"):
        monkeypatch.setenv("LD_LIBRARY_PATH", path)
        with pytest.raises(NVRTCNotFoundError):
            toolkit.find()


def test_wheels_win_over_a_newer_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = put_cuda12_wheels(tmp_path / "site")
    for version in ("12.10.1", "13.2.1"):
        put(tmp_path / f"cuda-{version}" / "lib64" / f"libnvrtc.so.{version}")
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / f"cuda-{version}"))
        toolkit.find.cache_clear()
        assert toolkit.find().library == str(library)


def test_another_major_version_than_that_of_cupy_is_refused(tmp_path: Path) -> None:
    put_cuda13_wheels(tmp_path / "site")
    put(tmp_path / "site" / "cupy_cuda12x-14.2.0.dist-info" / "METADATA")
    with pytest.raises(NVRTCNotFoundError, match="CuPy is for CUDA 12"):
        toolkit.find()


@pytest.mark.parametrize("named", ["lib64/libnvrtc.so.12.4.127", "lib64", ""])
def test_a_variable_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    put_cuda13_wheels(tmp_path / "site")
    put(tmp_path / "site" / "cupy_cuda13x-14.2.0.dist-info" / "METADATA")
    library = put(tmp_path / "cuda" / "lib64" / "libnvrtc.so.12.4.127")
    (library.parent / "libnvrtc.so.12").symlink_to(library.name)
    include = put_headers(tmp_path / "cuda" / "include")
    monkeypatch.setenv("CUATTN_NVRTC", str(tmp_path / "cuda" / named))
    kit = toolkit.find()
    assert (kit.library, kit.version, kit.include) == (str(library), "12.4.127", include)
    monkeypatch.setenv("CUATTN_NVRTC", str(tmp_path / "nowhere"))
    toolkit.find.cache_clear()
    with pytest.raises(NVRTCNotFoundError, match=r"CUATTN_NVRTC=.*nowhere"):
        toolkit.find()


def test_a_variable_that_names_a_library_of_the_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_library: Path
) -> None:
    monkeypatch.setenv("CUATTN_NVRTC", str(real_library))
    kit = toolkit.find()
    assert kit.library == str(real_library)
    assert kit.include is not None and kit.include.is_relative_to(real_library.parents[2])
