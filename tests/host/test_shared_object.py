"""The host executor's library: loaded from checked bytes, rebuilt when it is damaged or another one."""

from __future__ import annotations

import _ctypes
import shutil
from pathlib import Path

import pytest

from cuattn.compile import cache
from cuattn.errors import CacheWarning, HostUnavailableError
from cuattn.host import build, library, shared_object


@pytest.fixture(scope="module")
def image() -> bytes:
    library.load()
    name = build.library_name()
    installed = Path(library.__file__).with_name("native") / name
    data = installed.read_bytes() if installed.exists() else cache.read(name.removesuffix(".so"), ".so")
    assert data is not None
    return data


def test_bytes_of_a_library_are_loaded(image):
    assert library.Library(image).ops == library.load().ops


def test_the_second_library_is_not_taken_for_the_first(image):
    # The loader knows libraries by name, and descriptors are numbered alike.
    other = shared_object.load(Path(_ctypes.__file__).read_bytes())
    assert not hasattr(other, "cuattn_isa")
    assert hasattr(shared_object.load(image), "cuattn_isa")


def test_where_a_file_without_a_name_cannot_be_made(image, monkeypatch):
    monkeypatch.delattr(shared_object.os, "memfd_create")
    assert library.Library(image).ops == library.load().ops


@pytest.mark.parametrize("part", [0.0, 1e-4, 0.1, 0.5, 0.9, -1])
def test_a_truncated_library_is_refused(image, part):
    size = len(image) + part if part < 0 else int(part * len(image))
    with pytest.raises(library.ForeignLibraryError):
        library.Library(image[: int(size)])


@pytest.mark.parametrize("what", ["foreign", "noise"])
def test_a_foreign_library_in_the_cache_is_rebuilt(what, image, tmp_path, monkeypatch):
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))  # nothing is installed
    built = tmp_path / "built.so"
    built.write_bytes(image)
    monkeypatch.setattr(build, "build", lambda folder, compiler: Path(shutil.copy(built, folder)))
    key = build.library_name().removesuffix(".so")
    cache.write(
        key, ".so", Path(_ctypes.__file__).read_bytes() if what == "foreign" else b"\x7fELF\x02\x01" + bytes(90)
    )
    with pytest.warns(CacheWarning, match="is not used"):
        assert library._find_or_build().ops == library.load().ops
    assert cache.read(key, ".so") == image


def test_a_compiler_that_makes_something_else_is_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(build, "build", lambda folder, compiler: Path(_ctypes.__file__))
    with pytest.raises(HostUnavailableError, match="cuattn_isa"):
        library._find_or_build()
