"""Environment variables: values, defaults, and what is said about wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cuattn import environment
from cuattn.compile import arch
from cuattn.errors import CuattnWarning, EnvironmentVariableError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(environment.PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_warned", set())


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert environment.cache_dir() == Path("/home/someone/.cache/cuattn")
    assert environment.hopper() == "auto"
    assert environment.host_arch() == "sm_80"
    assert environment.host_threads() == len(os.sched_getaffinity(0))
    assert environment.host_check() == frozenset()
    assert environment.host_async() == "eager"
    assert environment.host_seed() == 0
    assert environment.check() is False
    assert environment.c_compiler() == ()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("CUATTN_CACHE_DIR", "/some/where", Path("/some/where")),
        ("CUATTN_CACHE_DIR", "relative", Path.cwd() / "relative"),
        ("CUATTN_CHECK", "1", True),
        ("CUATTN_CHECK", " 0 ", False),
        ("CUATTN_CHECK", "", False),
        ("CUATTN_CC", "gcc-12 '-I/a b'", ("gcc-12", "-I/a b")),
        ("CUATTN_HOPPER", "off", "off"),
        ("CUATTN_HOST_ARCH", "sm_90a", "sm_90a"),
        ("CUATTN_HOST_THREADS", "3", 3),
        ("CUATTN_HOST_CHECK", "all", frozenset({"mem", "init", "race"})),
        ("CUATTN_HOST_CHECK", "none", frozenset()),
        ("CUATTN_HOST_CHECK", "race, mem", frozenset({"mem", "race"})),
        ("CUATTN_HOST_ASYNC", "random", "random"),
        ("CUATTN_HOST_SEED", "123", 123),
    ],
)
def test_values(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(name, text)
    assert environment.read(name) == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("CUATTN_CHECK", "yes", "0 or 1"),
        ("CUATTN_CC", "gcc '", "command line"),
        ("CUATTN_HOST_ARCH", "sm_75", "sm_80, sm_86"),
        ("CUATTN_HOST_ARCH", "90a", "sm_90a"),
        ("CUATTN_HOST_THREADS", "0", "from 1"),
        ("CUATTN_HOST_THREADS", "many", "auto"),
        ("CUATTN_HOST_CHECK", "mem,rade", "mem, init, race"),
        ("CUATTN_HOST_CHECK", "mem,all", "mem, init, race"),
        ("CUATTN_HOST_ASYNC", "Late", "eager, late, random"),
        ("CUATTN_HOST_SEED", "-1", "from 0"),
        ("CUATTN_HOST_SEED", "1.5", "from 0"),
    ],
)
def test_wrong_values_name_the_allowed_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, allowed: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(EnvironmentVariableError, match=allowed) as caught:
        environment.read(name)
    assert f"{name}={text!r}" in str(caught.value)


def test_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert environment.cache_dir() == Path("/xdg/cuattn")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid by the specification, to be ignored
    assert environment.cache_dir() == Path("/home/someone/.cache/cuattn")
    monkeypatch.setenv("CUATTN_CACHE_DIR", "~/kernels")
    assert environment.cache_dir() == Path("/home/someone/kernels")


def test_unknown_variables_are_mentioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUATTN_CACHEDIR", "/tmp")
    monkeypatch.setenv("CUATTN_XYZZY", "1")
    with pytest.warns(CuattnWarning) as caught:
        environment.host_seed()
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "CUATTN_CACHEDIR" in messages[0] and "did you mean CUATTN_CACHE_DIR?" in messages[0]
    assert "CUATTN_XYZZY" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.host_seed()


def test_table_is_complete_and_consistent() -> None:
    with pytest.raises(TypeError):
        environment.VARIABLES["CUATTN_NEW"] = environment.VARIABLES["CUATTN_CC"]  # type: ignore[index]
    for name, variable in environment.VARIABLES.items():
        assert name == variable.name and name.startswith(environment.PREFIX)
        assert variable.allowed and variable.doc.endswith(".")
        variable.parse(variable.default)
    assert set(environment.HOST_ARCHS) <= set(arch.names())


def test_reading_imports_nothing_large() -> None:
    root = Path(environment.__file__).parents[1]
    code = (
        "import sys, cuattn; from cuattn import environment, errors; environment.cache_dir(); cuattn.__version__\n"
        "print(*sorted({'numpy', 'cupy', 'scipy', 'ctypes', 'hashlib'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert run.stdout.split() == [], run.stderr
