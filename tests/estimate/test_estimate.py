"""`cuattn.estimate` against published counts, and against what is counted when kernels and caches do the work."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import estimate
from cuattn.benchmark import memory
from cuattn.errors import ArgumentError
from cuattn.estimate import Config
from cuattn.formats import KV_FORMATS

ROOT = Path(__file__).resolve().parents[2]

#: Parameters as the makers' weight files hold them: the sum that Hugging Face shows for the safetensors of the
#: repository that is named (of MiniLM and BERT without the buffer of position ids and the heads of pre-training).
PUBLISHED = {
    "SmolLM2-135M": (134_515_008, "HuggingFaceTB/SmolLM2-135M"),
    "MiniLM": (22_713_216, "sentence-transformers/all-MiniLM-L6-v2"),
    "BERT-base": (109_482_240, "google-bert/bert-base-uncased"),
    "GPT-2": (124_439_808, "openai-community/gpt2"),
    "Llama-2-7B": (6_738_415_616, "meta-llama/Llama-2-7b-hf"),
    "Llama-3-8B": (8_030_261_248, "meta-llama/Meta-Llama-3-8B"),
    "Llama-3-70B": (70_553_706_496, "meta-llama/Meta-Llama-3-70B"),
    "Qwen2.5-7B": (7_615_616_512, "Qwen/Qwen2.5-7B"),
    "Mistral-7B": (7_241_732_096, "mistralai/Mistral-7B-v0.1"),
    "Gemma-2-9B": (9_241_705_984, "google/gemma-2-9b"),
}


def test_every_model_has_its_published_number_of_parameters() -> None:
    assert {name: estimate.parameters(name) for name in estimate.MODELS} == {
        name: count for name, (count, _) in PUBLISHED.items()
    }


@pytest.mark.parametrize("hidden", (64, 768))
def test_a_layer_is_its_formula(hidden: int) -> None:
    config = Config(hidden, 5, 4)
    assert estimate.layer_parameters(config) == 12 * hidden**2 + 13 * hidden
    assert estimate.parameters(config) == 5 * (12 * hidden**2 + 13 * hidden)
    with_vocab = Config(hidden, 5, 4, vocab=100, tied=False)
    assert estimate.parameters(with_vocab) == estimate.parameters(config) + 2 * 100 * hidden + 2 * hidden


@pytest.mark.parametrize("seqlen", (1, 7, 128))
def test_products_are_their_formula(seqlen: int) -> None:
    config, hidden, batch = Config(64, 3, 4), 64, 2
    matrices = 12 * batch * seqlen * hidden**2 * 3
    assert estimate.macs(config, batch, seqlen) == matrices + 3 * 2 * batch * hidden * seqlen**2
    causal = estimate.macs(config, batch, seqlen, causal=True)
    assert causal == matrices + 3 * 2 * batch * hidden * seqlen * (seqlen + 1) // 2
    assert estimate.flops(config, batch, seqlen, phase="training") == 6 * estimate.macs(config, batch, seqlen)
    # A causal prefill is its tokens decoded one after the other.
    steps = sum(estimate.macs(config, batch, n + 1, phase="decode") for n in range(seqlen))
    assert steps == causal


def test_logits_are_products_with_the_vocabulary() -> None:
    config = estimate.model("GPT-2")
    more = estimate.macs(config, 3, 10, logits=2) - estimate.macs(config, 3, 10)
    assert more == 3 * 2 * config.vocab * config.hidden


def test_formats_are_those_of_the_caches() -> None:
    assert set(estimate.FORMATS) == set(KV_FORMATS)
    for name, row in KV_FORMATS.items():
        assert estimate.FORMATS[name].row_bytes(128) == row.bytes_per_head(128)


OF_CACHES = [(name, False) for name in KV_FORMATS] + [(name, True) for name in ("e4m3fn", "e5m2", "int8")]


@pytest.mark.parametrize(("kv_format", "calibrated"), OF_CACHES)
def test_cached_bytes_are_those_of_a_cache(kv_format: str, calibrated: bool) -> None:
    row = KV_FORMATS[kv_format]
    dtype = np.dtype(np.float16)
    if not row.quantized:
        dtype = np.dtype(ml_dtypes.bfloat16 if kv_format == "bfloat16" else kv_format)
    more = {"kv_format": kv_format if row.quantized else None}
    if calibrated:
        more |= {"k_scale": np.ones((3, 2), np.float32), "v_scale": np.ones((3, 2), np.float32)}
    cache = cuattn.PagedKVCache(6, 16, num_layers=3, num_kv_heads=2, head_dim=32, dtype=dtype, **more)
    config = Config(128, 3, 4, kv_heads=2, head_dim=32)
    per_token = estimate.kv_cache_bytes(config, 2, 48, kv_format, scales="head" if calibrated else "slot")
    calibrated_bytes = 2 * 3 * 2 * 4 if calibrated else 0  # the caller's own arrays
    assert per_token - calibrated_bytes == cache.nbytes


def test_memory_is_what_is_allocated() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 24, 2, 32)).astype(np.float16)
    k = v = rng.standard_normal((2, 40, 1, 32)).astype(np.float16)
    expected = estimate.attention_memory(2, 2, 24, 40, 32, kv_heads=1)
    _, fused = memory.of_call(lambda: cuattn.attention(q, k, v, return_lse=True), (q, k, v))
    assert fused == expected.flash
    assert expected.standard - expected.flash == 2 * 2 * 24 * 40 * (4 + 2)


@pytest.mark.parametrize(
    ("seqlen", "standard", "flash"),
    [(256, 1_574_912, 526_336), (512, 5_246_976, 1_052_672), (2048, 71_319_552, 4_210_688)],
)
def test_memory_is_that_of_the_table_in_the_docs(seqlen: int, standard: int, flash: int) -> None:
    """docs/benchmarks.md, "Memory saved": counted from allocations, float32, B = 2, one head, D = 64."""
    found = estimate.attention_memory(2, 1, seqlen, seqlen, 64, itemsize=4)
    assert (found.standard, found.flash) == (standard, flash)


def test_the_matrix_of_128_mib_is_that_of_two_heads() -> None:
    """Published as that of one, of which 256 would take 32 GB: they take 16 GiB."""
    assert estimate.attention_memory(2, 1, 4096, 4096, 64, itemsize=4).scores == 128 * 2**20
    assert estimate.attention_memory(16, 16, 4096, 4096, 64, itemsize=4).scores == 16 * 2**30


@pytest.mark.parametrize(("n", "m", "d", "e"), [(512, 512, 64, 64), (100, 333, 40, 24), (0, 5, 8, 8), (5, 0, 8, 8)])
def test_traffic_is_its_formula(n: int, m: int, d: int, e: int) -> None:
    for itemsize, block in ((2, 64), (4, 128), (8, 1)):
        found = estimate.attention_traffic(n, m, d, e, itemsize, block)
        assert found.least == (n * d + m * d + m * e + n * e) * itemsize
        assert found.standard == found.least + 4 * n * m * itemsize
        assert found.flash == (n * (d + e) + math.ceil(n / block) * m * (d + e)) * itemsize


def test_flops_of_a_causal_call_are_its_visible_pairs() -> None:
    for n, m in ((5, 5), (3, 9), (9, 3), (1, 1), (0, 4)):
        visible = sum(j <= i + m - n for i in range(n) for j in range(m))
        assert estimate.attention_flops(n, m, 8, 4, causal=True) == 2 * visible * 12


def test_roofline_has_two_sides() -> None:
    slow_memory = estimate.GPU(100.0, 10.0, 1, "sm_80", 1)
    assert estimate.roofline(slow_memory, 1000, 50) == (10.0, "compute", 20.0, 10.0, 100.0)
    assert estimate.roofline(slow_memory, 100, 100) == (10.0, "memory", 1.0, 10.0, 10.0)
    assert estimate.roofline(slow_memory, 0, 0).time_s == 0
    assert estimate.arithmetic_intensity(5, 0) == math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: Config(100, 1, 3),
        lambda: Config(64, 1, 4, kv_heads=3),
        lambda: Config(64, 1, 4, bias="all"),  # type: ignore[arg-type]
        lambda: Config(64.0, 1, 4),  # type: ignore[arg-type]
        lambda: Config(64, True, 4),
        lambda: estimate.parameters("GPT-7"),
        lambda: estimate.macs("GPT-2", -1, 1),
        lambda: estimate.macs("GPT-2", 1, 1, phase="pretraining"),  # type: ignore[arg-type]
        lambda: estimate.kv_cache_bytes("GPT-2", 1, 1, "float12"),
        lambda: estimate.kv_cache_bytes("GPT-2", 1, 1, scales="block"),  # type: ignore[arg-type]
        lambda: estimate.attention_traffic(1, 1, 1, 1, 2, 0),
        lambda: estimate.attention_memory(1, 3, 1, 1, 1, kv_heads=2),
        lambda: estimate.roofline("H300", 1, 1),
        lambda: estimate.roofline(estimate.GPU(0.0, 1.0, 1, "sm_80", 1), 1, 1),
    ],
    ids=range(14),
)
def test_wrong_arguments_are_errors(call: object) -> None:
    with pytest.raises(ArgumentError):
        call()  # type: ignore[operator]


def test_nothing_heavy_is_imported() -> None:
    program = "import sys; from cuattn import estimate; estimate.parameters('GPT-2'); print('numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
