"""A wheel, built with a C compiler and without one, holds what an installation needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "cuattn", "cli")


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build in a copy, so that nothing is left in the checkout; without isolation, so that no network is needed."""
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tree / name)
    code = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def package_files() -> set[str]:
    """What a checkout has and must be in every wheel."""
    package = ROOT / "cuattn"
    patterns = ("**/*.py", "kernels/**/*.cu", "kernels/**/*.cuh", "host/c/*.c", "host/c/*.h", "py.typed")
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in package.glob(pattern)}


@pytest.mark.slow
def test_wheel_with_a_compiler_runs_without_one(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    names = contents(wheel)
    assert package_files() <= names
    assert {"cuattn/ops/attention/dense.py", "cuattn_cli/main.py"} <= names
    assert [name for name in names if name.endswith(".so")] != []
    assert "-py3-none-linux_" in wheel.name  # ctypes loads the library: bound to the platform, not to a Python version

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import numpy as np, cuattn\n"
        "x = np.ones((1, 2, 1, 8), np.float32)\n"
        "print(cuattn.__file__, bool((cuattn.attention(x, x, x) == 1).all()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CUATTN_CC": "no-such-compiler"}
    environment["CUATTN_CACHE_DIR"] = str(tmp_path / "cache")  # no library built by an earlier run
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "site/cuattn/__init__.py"), "True"]


@pytest.mark.slow
def test_wheel_without_a_compiler_is_complete_but_for_the_library(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CUATTN_CC="no-such-compiler")
    names = contents(wheel)
    assert package_files() <= names
    assert [name for name in names if name.endswith(".so")] == []
    assert wheel.name.endswith("-py3-none-any.whl")

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import numpy as np, cuattn\n"
        "x = np.ones((1, 2, 1, 8), np.float32)\n"
        "try:\n    cuattn.attention(x, x, x)\n"
        "except cuattn.errors.HostUnavailableError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CUATTN_CC": "no-such-compiler"}
    environment["CUATTN_CACHE_DIR"] = str(tmp_path / "cache")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "no-such-compiler" in result.stdout
