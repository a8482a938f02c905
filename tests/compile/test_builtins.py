"""NVRTC finds its builtins library, which from CUDA 13 on it does not look for beside itself."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from cuattn.compile import nvrtc


class FakeLibrary:
    """Any function of it succeeds."""

    def __getattr__(self, name: str) -> object:
        def function(*arguments: object) -> int:
            return 0

        setattr(self, name, function)
        return function


def test_builtins_beside_nvrtc_are_loaded_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0", "libcudart.so.13"):
        (tmp_path / name).touch()
    loaded: list[str] = []

    def load(path: str) -> FakeLibrary:
        loaded.append(Path(path).name)
        return FakeLibrary()

    monkeypatch.setattr(ctypes, "CDLL", load)
    nvrtc.Library(str(tmp_path / "libnvrtc.so.13"))
    assert loaded == ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]


def test_a_name_for_the_system_s_loader_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(path: str) -> FakeLibrary:
        loaded.append(path)
        return FakeLibrary()

    monkeypatch.setattr(ctypes, "CDLL", load)
    nvrtc.Library("libnvrtc.so.13")
    assert loaded == ["libnvrtc.so.13"]
