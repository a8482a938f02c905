"""flash-attn's own tests of versions 2 and 3, over `cuattn.compat`, where their source is given.

FLASH_ATTN_SOURCE=DIR   a checkout of flash-attn; nothing of it is in this project
FLASH_ATTN_CASES=N      cases of each of their tests (2)
FLASH_ATTN_SEED=S       which ones (0)

Their tensors are made on the CPU, so the kernels run on the host executor: cases are drawn from the smaller ones. Left
out are tests of C++ entry points, dropout where they compare the stored probabilities (here nothing stores them), and
what `cuattn.compat` does not offer: qv.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SOURCE = os.environ.get("FLASH_ATTN_SOURCE")
if SOURCE is None:
    pytest.skip("FLASH_ATTN_SOURCE names no source", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("einops")

from drawn_cases import run  # noqa: E402
from flash_attn_modules import modules  # noqa: E402
from torch_arrays import on_cpu  # noqa: E402

CASES, SEED = (int(os.environ.get(f"FLASH_ATTN_{name}", default)) for name, default in (("CASES", 2), ("SEED", 0)))
MAX_LENGTH, MAX_HEAD_DIM = 260, 128
REPEATS = 2  # of what they repeat up to 1,000 times

WANTED = {
    "seqlen_q": lambda n: n <= MAX_LENGTH,
    "seqlen_k": lambda n: n <= 4 * MAX_LENGTH,
    "seqlen": lambda n: n <= MAX_LENGTH,
    "d": lambda n: n <= MAX_HEAD_DIM,
    "has_qv": lambda flag: not flag,
    "V_colmajor": lambda flag: not flag,
    "paged_kv_block_size": lambda n: n is None or n <= 256,
    "num_splits": lambda n: n <= 33,
}
NO_DROPOUT = {"dropout_p": lambda p: p == 0}
SECOND = {
    "test_flash_attn_qkvpacked": NO_DROPOUT,
    "test_flash_attn_varlen_qkvpacked": NO_DROPOUT,
    "test_flash_attn_output": NO_DROPOUT,
    "test_flash_attn_varlen_output": NO_DROPOUT,
    "test_flash_attn_causal": {},
    "test_flash_attn_varlen_causal": {},
    "test_flash_attn_splitkv": {},
    "test_flash_attn_kvcache": {},
    "test_flash_attn_race_condition": {},
    "test_flash_attn_bwd_overflow": {},
    "test_flash_attn_bwd_transpose": {},
    "test_flash_attn_bwd_varlen_overflow": {},
    "test_flash_attn_deterministic": {},
    "test_flash_attn_varlen_deterministic": {},
    "test_flash_attn_kvcache_paged_block_table_bounds": {},
}
# With one key gradients of q and k are 0, PyTorch has no error there, and the bound of their test is its error.
MORE_KEYS = {"seqlen_k": lambda n: 1 < n <= 4 * MAX_LENGTH}
THIRD = {
    "test_flash_attn_output": MORE_KEYS,
    "test_flash_attn_varlen_output": MORE_KEYS,
    "test_flash_attn_kvcache": {},
    "test_flash_attn_race_condition": {},
    "test_flash_attn_combine": {},
}


def offered(*lists):
    """`itertools.product` with value dims that `cuattn.compat` takes."""
    first, second = map(list, lists)
    if first and not isinstance(first[0], bool) and not isinstance(second[0], bool):
        first = [x for x in first if x <= 512]
    return itertools.product(first, second)


@pytest.fixture(scope="module")
def suites():
    """Their two files as modules, that import ours."""
    loaded = {}
    with pytest.MonkeyPatch.context() as patch, on_cpu():
        for name, module in modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "test_util", raising=False)
        for version, path in (("2", "tests/test_flash_attn.py"), ("3", "hopper/test_flash_attn.py")):
            path = Path(SOURCE) / path
            patch.syspath_prepend(str(path.parent))
            spec = importlib.util.spec_from_file_location(f"flash_attn_{version}_suite", path)
            loaded[version] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[version])
            loaded[version].range = lambda *numbers: range(*(n if n < 50 else REPEATS for n in numbers))
        loaded["3"].itertools = SimpleNamespace(product=offered)
        yield loaded


@pytest.mark.parametrize("name", SECOND)
def test_of_version_2(suites, name):
    assert run(getattr(suites["2"], name), CASES, WANTED | SECOND[name], SEED)


@pytest.mark.parametrize("name", THIRD)
def test_of_version_3(suites, name):
    assert run(getattr(suites["3"], name), CASES, WANTED | THIRD[name], SEED)
