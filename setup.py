"""Builds the host executor's C library into the package, if there is a C compiler. The rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path
from types import ModuleType

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
HOST_PACKAGE = Path("cuattn", "host")


def load_builder() -> ModuleType:
    """cuattn/host/build.py by path: importing cuattn would need NumPy, which a build environment does not have."""
    spec = importlib.util.spec_from_file_location("cuattn_host_build", ROOT / HOST_PACKAGE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class build_host(Command):
    """Compile the host executor; without a C compiler, say so and go on: every other part works without it."""

    description = "build the C library of the host executor (optional)"
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.library: Path | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        assert self.build_lib is not None
        root = ROOT if self.editable_mode else Path(self.build_lib)
        try:
            compiler = shlex.split(os.environ.get("CUATTN_CC", ""))
            self.library = load_builder().build(root / HOST_PACKAGE / "native", compiler)
        except (OSError, RuntimeError) as error:
            self.warn(
                f"the host executor is left out of this installation: {error}\n"
                "The GPU path is complete without it. To run kernels on NumPy arrays, install a C compiler:\n"
                "the library is then built on the first call."
            )

    def get_source_files(self) -> list[str]:
        folder = ROOT / HOST_PACKAGE
        return [str(path.relative_to(ROOT)) for path in (folder / "build.py", *sorted((folder / "c").glob("*.[ch]")))]

    def get_outputs(self) -> list[str]:
        return [str(self.library)] if self.library is not None else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class build_with_host(build):
    sub_commands = [*build.sub_commands, ("build_host", None)]  # noqa: RUF012


class DistributionWithHost(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # the library makes this a platform package, though setuptools does not see it as an extension


class platform_wheel(bdist_wheel):
    """A wheel that holds the library is of one platform, but of no Python version: ctypes loads it."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_host").library is not None
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    packages=[*find_packages(include=["cuattn", "cuattn.*"]), "cuattn_cli"],
    distclass=DistributionWithHost,
    cmdclass={"build": build_with_host, "build_host": build_host, "bdist_wheel": platform_wheel},
)
