"""What the documentation says is true today."""

from __future__ import annotations

import ast
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuattn.environment import VARIABLES
from cuattn.head_dims import COLUMNS, HEAD_DIM_BUCKETS
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS, can_add_dq
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})


@pytest.mark.smoke
def test_environment_page_is_the_table() -> None:
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    rows = []
    for variable in VARIABLES.values():
        default = f"`{variable.default}`" if variable.default else "(not set)"
        rows.append(f"| `{variable.name}` | {default} | {variable.allowed} | {variable.doc} |")
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


def test_the_page_of_the_forward_kernel_shows_the_table_of_shapes() -> None:
    page = (ROOT / "docs/kernels/attention_forward.md").read_text(encoding="utf-8")
    rows = [
        f"| {row.products} | {row.itemsize} | {row.max_head_dim} "
        f"| {f'up to {row.max_seqlen_q}' if row.max_seqlen_q else 'any'} | {'any' if row.score_options else 'none'} "
        f"| {row.block_m} × {row.block_n} | {row.num_warps} | {row.num_stages} "
        f"| {row.smem_bytes(row.max_head_dim, COLUMNS[row.max_head_dim][0]):,} |"
        for row in FLASH_FWD_CONFIGS
    ]
    assert [line for line in page.splitlines() if re.match(r"\| (mma|fma) ", line)] == rows


def test_the_page_of_the_hopper_kernel_shows_the_table_of_shapes() -> None:
    page = (ROOT / "docs/kernels/attention_forward_hopper.md").read_text(encoding="utf-8")
    rows = [
        f"| {row.itemsize} | {row.max_head_dim}, {row.max_head_dim_v} "
        f"| {f'up to {row.max_seqlen_q}' if row.max_seqlen_q else 'any'} | {'any' if row.score_options else 'none'} "
        f"| {'yes' if row.chunks else 'no'} | {row.block_m} × {row.block_n} | {row.num_consumers} "
        f"| {row.producer_registers}, {row.consumer_registers} "
        f"| {'yes' if row.ping_pong else 'no'} | {row.num_stages} "
        f"| {row.smem_bytes(row.max_head_dim, row.max_head_dim_v):,} |"
        for row in HOPPER_FWD_CONFIGS
    ]
    assert [line for line in page.splitlines() if re.match(r"\| \d \| \d+, \d+ ", line)] == rows


def test_the_page_of_the_backward_kernel_shows_the_table_of_shapes() -> None:
    page = (ROOT / "docs/kernels/attention_backward.md").read_text(encoding="utf-8")
    rows = []
    for row in FLASH_BWD_CONFIGS:
        size = max(d for d in HEAD_DIM_BUCKETS if d <= row.max_head_dim and row.is_legal(d, d, 227 * 1024))
        adds = row.own == "keys" and can_add_dq(row.products, row.itemsize)
        rows.append(
            f"| {row.own} | {row.products} | {row.itemsize} | {row.max_head_dim} "
            f"| {'any' if row.score_options else 'none'} | {row.block_own} × {row.block_other} | {row.num_warps} "
            f"| {row.num_stages} | {'dq' if row.own == 'queries' else 'dv; dk' if row.split_grads else 'dk, dv'} "
            f"| {row.smem_bytes(size, size):,} | {f'{row.smem_bytes(size, size, add_dq=True):,}' if adds else ''} |"
        )
    assert [line for line in page.splitlines() if re.match(r"\| (queries|keys) \| (mma|fma) ", line)] == rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?://|#", target):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_called_after_the_files_they_lead_to(page: Path) -> None:
    links = re.findall(r"\[`([\w/]+\.(?:py|cuh|cu|c|md))`\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    wrong = [(name, to) for name, to in links if not f"{(page.parent / to).resolve()}".endswith(f"/{name}")]
    assert wrong == []


def words_of(path: Path) -> Iterator[str]:
    """What a file says in words: a page without its programs, a source's comments and docstrings without examples."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    elif path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from (token.string for token in tokens if token.type == tokenize.COMMENT)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds):
                yield re.sub(r"^ *(>>>|\.\.\.) .*", "", ast.get_docstring(node) or "", flags=re.MULTILINE)
    else:
        yield from re.findall(r"//.*|/\*.*?\*/", text, re.DOTALL if path.suffix in (".c", ".h") else 0)


def sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in (".py", ".cu", ".cuh", ".c", ".h"))


PROSE = [*PAGES, *sources("cuattn", "cli", "bench", "examples")]
#: Stand for a user's file, or for any file.
MADE_UP = {"file.cu", "scale.cu", "x.cuh", "cuattn/kernels/x.cuh"}


def test_files_that_are_named_are_there() -> None:
    """By their name, with or without the folders above it."""
    files = [*PAGES, *sources("cuattn", "cli", "bench", "examples", "tests"), ROOT / "setup.py"]
    there = {f"/{path.relative_to(ROOT)}" for path in files}
    ends = {place[i + 1 :] for place in there for i, letter in enumerate(place) if letter == "/"}
    lost = set()
    for path in PROSE:
        for words in words_of(path):
            names = re.findall(r"(?<!\w)(?:[\w-]+/)*[\w-]+\.(?:py|cuh|cu|c|md)(?![\w(/-]|\.\w)", words)
            lost |= {(str(path.relative_to(ROOT)), name) for name in names if name not in ends | MADE_UP}
    assert lost == set()


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError:
            continue
        for part in parts[number:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_names_of_the_package_that_are_mentioned_exist() -> None:
    found = {}
    for path in PROSE:
        for words in words_of(path):
            for name in re.findall(r"(?<![\w./@-])(?:cuattn|bench\.stress)(?:\.[A-Za-z]\w*)+", words):
                found.setdefault(name, path.relative_to(ROOT))
    del found["bench.stress.NAME"]  # stands for each of them
    assert len(found) > 50
    assert {name: str(page) for name, page in found.items() if not leads_somewhere(name)} == {}


def test_every_kernel_and_theory_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT)) for page in PAGES if page.parent != ROOT]
    assert [page for page in pages if f"({page})" not in readme] == []


@pytest.mark.smoke
def test_readme_example_prints_what_it_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    expected = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == expected != []


def test_readme_names_every_extra_and_make_target_it_relies_on() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.findall(r"pip install '\.\[(\w+)\]'", readme)
    targets = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    for extra in extras:
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
