"""The layers of the package: an import may only lead down, also one inside a function, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: From the top down. A name stands for the module and all below it that no longer name stands for; modules of one
#: layer that have different names do not know of each other.
LAYERS = (
    ("cuattn_cli", "bench"),
    ("cuattn.__main__",),
    ("cuattn.benchmark", "cuattn.compat"),
    ("cuattn.testing",),
    ("cuattn",),  # the public names
    ("cuattn.catalogue", "cuattn.ops.paths"),  # what every family says about itself, and which kernels calls take
    ("cuattn.distributed",),
    ("cuattn.kv", "cuattn.ops.differential", "cuattn.ops.dual_chunk"),
    ("cuattn.ops.decode", "cuattn.ops.linear", "cuattn.ops.sparse"),
    ("cuattn.ops.attention",),
    ("cuattn.ops.rotary",),
    ("cuattn.ops.merge", "cuattn.ops.padding", "cuattn.ops.softmax"),
    ("cuattn.ops",),
    ("cuattn.runtime",),
    ("cuattn.host",),
    ("cuattn.compile", "cuattn.estimate", "cuattn.reference"),
    ("cuattn.formats",),
    ("cuattn.scalars",),
    ("cuattn.addresses", "cuattn.allocation", "cuattn.dlpack", "cuattn.environment"),
    ("cuattn.typing", "cuattn.dtypes", "cuattn.errors", "cuattn.head_dims", "cuattn.messages", "cuattn.version"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = {
    **{".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "cuattn").rglob("*.py")},
    **{f"cuattn_cli.{path.stem}": path for path in (ROOT / "cli").glob("*.py")},
}
MODULES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, *, at_run_time: bool = False) -> set[str]:
    """The modules of this package that a module names in its imports; ``at_run_time``: not those for annotations."""
    skipped: set[ast.AST] = set()
    if at_run_time:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped.update(ast.walk(node))
    found = set()
    for node in ast.walk(tree(module)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            # `from package import module` names the module, `from module import name` the module too
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in found if name in MODULES and name != module}


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def layer(module: str) -> str:
    """The name in `LAYERS` that stands for a module; "cuattn" stands for the package itself alone."""
    name = module
    while name not in LEVELS or (name == "cuattn" and module != "cuattn"):
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} has no place in LAYERS"
    return name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_lead_down(module: str) -> None:
    own = layer(module)
    # What the public names are is written for type checkers too, and leads nowhere at run time.
    wrong = {
        target
        for target in imports(module, at_run_time=module == "cuattn")
        if target != "cuattn"
        and (LEVELS[layer(target)] < LEVELS[own] or (LEVELS[layer(target)] == LEVELS[own] and layer(target) != own))
    }
    assert not wrong


def test_the_face_is_for_those_above_it() -> None:
    """Modules that the public names come from do not go through them."""
    below = {module for module in MODULES if LEVELS[layer(module)] > LEVELS["cuattn"]}
    offenders = {module for module in below if "cuattn" in imports(module)}
    assert offenders == set()


def test_no_circles() -> None:
    graph = {module: imports(module, at_run_time=True) - {"cuattn"} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_oracle_stands_alone() -> None:
    """Were it to use the library's code, a fault there would be right by definition."""
    ground = {layer for names in LAYERS[LEVELS["cuattn.formats"] :] for layer in names}
    for module in (name for name in MODULES if layer(name) == "cuattn.reference"):
        assert all(layer(target) in ground | {"cuattn.reference"} for target in imports(module)), module
        roots = {
            name.partition(".")[0]
            for node in ast.walk(tree(module))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert roots - set(sys.stdlib_module_names) <= {"cuattn", "numpy", "ml_dtypes"}, module


@pytest.mark.parametrize("module", ["cuattn.runtime.executor", "cuattn.host.module"])
def test_what_the_rules_look_at_is_there(module: str) -> None:
    assert imports(module)
