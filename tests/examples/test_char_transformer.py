"""The training example: every hand-written gradient, the two runs side by side, and the program."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cuattn
from examples.char_transformer import data, layers, plot, report, training
from examples.char_transformer.adam import Adam
from examples.char_transformer.attention import KernelAttention, ReferenceAttention
from examples.char_transformer.model import CharTransformer, Shape, initial_weights

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(vocabulary=11, context=12, width=32, heads=2, blocks=2)
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the [plot] extra is not installed"
)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def excerpt(shape: Shape = SMALL, batch: int = 3, seqlen: int = 12) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(1).integers(shape.vocabulary, size=(2, batch, seqlen)))


def float64_model(**options) -> CharTransformer:
    weights = {name: w.astype(np.float64) for name, w in initial_weights(SMALL, seed=2).items()}
    return CharTransformer(SMALL, weights, ReferenceAttention(), **options)


def numerical_gradient(loss: Callable[[], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences: wrong by step²/6 of the third derivative, and by roundoff / step: 1e-10 here."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + step
        above = loss()
        x[index] = value - step
        gradient[index] = (above - loss()) / (2 * step)
        x[index] = value
    return gradient


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("forward", "backward", "inputs"),
    [
        (layers.linear, layers.linear_backward, [drawn(2, 3, 4), drawn(4, 5)]),
        (layers.rms_norm, layers.rms_norm_backward, [drawn(2, 3, 4), drawn(4)]),
        (layers.gelu, layers.gelu_backward, [3 * drawn(2, 3, 4)]),
    ],
    ids=["linear", "rms_norm", "gelu"],
)
def test_gradients_of_a_layer(forward, backward, inputs) -> None:
    y, saved = forward(*inputs)
    dy = drawn(*y.shape, seed=1)
    grads = backward(dy, saved)
    for x, gradient in zip(inputs, grads if isinstance(grads, tuple) else (grads,), strict=True):
        expected = numerical_gradient(lambda: float((forward(*inputs)[0] * dy).sum()), x)
        np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


def test_gradient_of_the_embedding() -> None:
    indices, table = np.array([[1, 0, 1], [3, 1, 0]]), drawn(5, 4)
    y, saved = layers.embedding(indices, table)
    np.testing.assert_array_equal(y[1, 0], table[3])
    dy = drawn(*y.shape, seed=1)
    expected = numerical_gradient(lambda: float((layers.embedding(indices, table)[0] * dy).sum()), table)
    np.testing.assert_allclose(layers.embedding_backward(dy, saved), expected, rtol=1e-7, atol=1e-8)


def test_cross_entropy() -> None:
    logits, targets = 2 * drawn(2, 3, 5), np.array([[4, 0, 0], [2, 3, 0]])
    loss, saved = layers.cross_entropy(logits, targets)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert loss == pytest.approx(-np.log(np.take_along_axis(p, targets[..., None], axis=-1)).mean(), rel=1e-14)
    expected = numerical_gradient(lambda: float(layers.cross_entropy(logits, targets)[0]), logits)
    np.testing.assert_allclose(layers.cross_entropy_backward(saved), expected, rtol=1e-7, atol=1e-9)


def test_cross_entropy_of_huge_logits() -> None:
    loss, saved = layers.cross_entropy(np.array([[1e4, 0.0, -1e4]]), np.array([1]))
    assert loss == 1e4
    assert layers.cross_entropy_backward(saved).tolist() == [[1, -1, 0]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_the_whole_model(dropout_p) -> None:
    """Of each weight, along one random direction; the dropout mask is that of the step."""
    model = float64_model(dropout_p=dropout_p, dropout_seed=7)
    tokens, targets = excerpt(seqlen=9)
    _, grads = model.loss_and_grads(tokens, targets, step=5)
    assert grads.keys() == model.weights.keys()
    for name, w in model.weights.items():
        direction, start, step = drawn(*w.shape, seed=3), w.copy(), 1e-5
        losses = []
        for sign in (1, -1):
            w[...] = start + sign * step * direction
            losses.append(float(model.loss_and_grads(tokens, targets, step=5)[0]))
        w[...] = start
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float((grads[name] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name


# What attention rounds, relative to the largest gradient of a weight. float64, float32: unit roundoff times a few
# hundred. float16, bfloat16: q, k, v, P and the gradients in 11 and 8 bits.
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(np.float64, 1e-12), (np.float32, 1e-5), (np.float16, 5e-3), (ml_dtypes.bfloat16, 4e-2)],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_gradients_with_kernels(executor, dtype, bound) -> None:
    options = {"dropout_p": 0.2, "dropout_seed": 7}
    tokens, targets = excerpt()
    loss64, expected = float64_model(**options).loss_and_grads(tokens, targets, step=3)
    around = np.float64 if dtype is np.float64 else np.float32
    weights = {name: executor.array(w.astype(around)) for name, w in initial_weights(SMALL, seed=2).items()}
    loss, grads = CharTransformer(SMALL, weights, KernelAttention(dtype), **options).loss_and_grads(
        tokens, targets, step=3
    )
    assert float(loss) == pytest.approx(float(loss64), rel=bound)
    for name, gradient in grads.items():
        assert gradient.dtype == around
        difference = np.abs(executor.numpy(gradient) - expected[name]).max()
        assert difference <= bound * np.abs(expected[name]).max(), name


def test_small_gradients_survive_float16() -> None:
    """dout of 1e-8 is less than half of float16's smallest number."""
    qkv, dout = drawn(1, 8, 3, 1, 16), 1e-8 * drawn(1, 8, 1, 16)
    grads = []
    for attention in (KernelAttention(np.float16), ReferenceAttention()):
        _, saved = attention.forward(qkv, None, {})
        grads.append(attention.backward(dout, saved)[0])
    np.testing.assert_allclose(grads[0], grads[1], rtol=0, atol=0.05 * np.abs(grads[1]).max())


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_losses_agree_and_fall(dropout) -> None:
    """30 steps. float32 rounds losses of 2 to 1e-7; the training so far multiplies that by a few."""
    corpus = data.Corpus.of("abcdefghijk " * 8)
    shape = Shape(vocabulary=12, context=16, width=32, heads=2, blocks=2)
    batches = data.Batches(corpus.encode(corpus.text), 4, shape.context, seed=0)
    weights = initial_weights(shape, seed=0)
    runs = []
    for dtype, attention in ((np.float32, KernelAttention(np.float32)), (np.float64, ReferenceAttention())):
        own = {name: w.astype(dtype) for name, w in weights.items()}
        model = CharTransformer(shape, own, attention, dropout_p=dropout)
        runs.append(training.Run(model, Adam(own), steps=30))
    for _ in range(30):
        batch = batches.draw()
        for run in runs:
            run.step(*batch)
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=0, atol=5e-6)
    assert runs[0].losses[0] == pytest.approx(np.log(12), abs=0.2)
    assert runs[0].losses[-1] < 0.6 * runs[0].losses[0]
    assert runs[0].time_s > 0


def test_the_first_step_of_adam_moves_by_the_rate() -> None:
    weights = {"w": np.array([1.0, 2.0, 3.0])}
    adam = Adam(weights)
    adam.step({"w": np.array([10.0, -0.01, 0.0])}, rate=0.1)
    np.testing.assert_allclose(weights["w"], [0.9, 2.1, 3.0], rtol=1e-6)
    # Means 0.9·10 + 0.1·(-10) and 0.99·100·0.01 + 0.01·100 by the paper's formulas, with their divisors.
    adam.step({"w": np.array([-10.0, 0.0, 0.0])}, rate=0.1)
    mean, square = (0.9 * 1 - 1) / (1 - 0.9**2), (0.99 * 1 + 1) / (1 - 0.99**2)
    assert weights["w"][0] == pytest.approx(0.9 - 0.1 * mean / np.sqrt(square), rel=1e-6)


def test_adam_wants_a_gradient_for_each_weight() -> None:
    with pytest.raises(ValueError, match=r"\['v', 'w'\] are only weights or only gradients"):
        Adam({"w": np.zeros(2)}).step({"v": np.zeros(2)}, rate=0.1)


def test_learning_rate_rises_and_falls() -> None:
    rates = [training.learning_rate(step, 100) for step in range(100)]
    assert 0 < rates[0] < rates[10] < max(rates) <= training.RATE
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert 0 < rates[-1] < 0.02 * training.RATE


def test_continuation_goes_beyond_the_context() -> None:
    model = float64_model()
    prompt = np.array([3, 1, 4])
    tokens = training.continuation(model, prompt, 15)
    assert tokens.shape == (18,) and tokens[:3].tolist() == [3, 1, 4]
    assert tokens[3] == model.logits(prompt[None])[0, -1].argmax()
    assert tokens[-1] == model.logits(tokens[None, -13:-1])[0, -1].argmax()


# --- text -----------------------------------------------------------------------------------------------------------


def test_the_text_comes_with_python() -> None:
    text = data.zen_of_python()
    assert text.startswith("The Zen of Python, by Tim Peters\n\nBeautiful is better than ugly.\n")
    assert len(text) == 856


def test_encode_and_decode() -> None:
    corpus = data.Corpus.of("hello, world")
    assert corpus.characters == " ,dehlorw"
    assert corpus.decode(corpus.encode("who, he")) == "who, he"
    with pytest.raises(data.TextError, match="'x' does not occur"):
        corpus.encode("hex")


def test_targets_are_the_characters_that_follow() -> None:
    batches = data.Batches(np.arange(10), batch_size=200, seqlen=8, seed=0)
    tokens, targets = batches.draw()
    assert tokens.shape == targets.shape == (200, 8)
    np.testing.assert_array_equal(targets, tokens + 1)
    assert set(tokens[:, 0]) == {0, 1}  # both excerpts that there are
    again = data.Batches(np.arange(10), batch_size=200, seqlen=8, seed=0)
    np.testing.assert_array_equal(again.draw()[0], tokens)


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(data.TextError, match="8 characters; at least 9 are needed"):
        data.Batches(np.arange(8), batch_size=1, seqlen=8, seed=0)


# --- wrong inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros(4, np.int64), r"must be integers \[batch, seqlen\], not int64 \[4\]"),
        (np.zeros((1, 4)), r"must be integers \[batch, seqlen\], not float64 \[1, 4\]"),
        (np.zeros((1, 13), np.int64), r"\[1, 13\]; this model reads 1 to 12 characters"),
        (np.zeros((0, 4), np.int64), r"\[0, 4\]; this model reads"),
        (np.array([[0, 11]]), "0 to 11; the vocabulary is 0 to 10"),
        (np.array([[-1, 3]]), "-1 to 3; the vocabulary is 0 to 10"),
    ],
)
def test_tokens_that_the_model_cannot_read(tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        float64_model().logits(tokens)


def test_targets_that_do_not_fit() -> None:
    tokens, targets = excerpt()
    with pytest.raises(ValueError, match="targets have shape"):
        float64_model().loss_and_grads(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match="targets are 99 to 99"):
        float64_model().loss_and_grads(tokens, np.full_like(targets, 99))


def test_shapes_that_make_no_model() -> None:
    with pytest.raises(ValueError, match="width 64 is not a multiple of heads 3"):
        Shape(vocabulary=5, heads=3)
    with pytest.raises(ValueError, match="vocabulary is 0"):
        Shape(vocabulary=0)
    with pytest.raises(ValueError, match="positions is 'none'; allowed are learned, sincos, rope"):
        Shape(vocabulary=5, positions="none")


# --- report and plot ------------------------------------------------------------------------------------------------


def test_only_the_first_steps_are_judged() -> None:
    kernel, float64 = (training.Run(float64_model(), Adam({}), steps=500) for _ in range(2))
    kernel.losses, float64.losses = [1.0] * 500, [1.0] * 500
    float64.losses[report.COMPARED_STEPS] = 2.0
    assert report.largest_difference(kernel, float64) == 0
    float64.losses[report.COMPARED_STEPS - 1] = 1.5
    assert report.largest_difference(kernel, float64) == 0.5
    kernel.losses[0] = float("nan")
    assert np.isnan(report.largest_difference(kernel, float64))


def test_agreeing_characters() -> None:
    assert report.agreeing("abcd", "abxd") == 2
    assert report.agreeing("abc", "abcdef") == 3
    assert report.agreeing("", "a") == 0


@needs_matplotlib
def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "losses.png"
    plot.check(path)
    losses = [3.0, 2.0, 1.0], [3.0, 2.0, 1.1]
    for curves in ({"softmax": losses}, {"softmax": losses, "window": losses}):
        plot.save(path, curves, title="a title", kernel_label="kernels")
        assert path.read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_plots_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(plot.PlotError, match="does not end in a format"):
        plot.check(tmp_path / "losses.docx")
    with pytest.raises(plot.PlotError, match="there is no"):
        plot.check(tmp_path / "missing" / "losses.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(plot.PlotError, match="it is a folder"):
        plot.check(tmp_path / "folder.png")


# --- the program ----------------------------------------------------------------------------------------------------


def run(*arguments: str, program: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "examples.char_transformer"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, "-W", "error", *start, *arguments],
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


def test_a_few_steps_end_to_end(tmp_path: Path) -> None:
    image = tmp_path / "losses.svg"
    result = run("--steps", "3", "--dropout", "0.1", "--write", "4", "--plot", str(image))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^ +(\d+) +(\d\.\d{4}) +(\d\.\d{4}) +(\S+) +about \d+ s left$", result.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert all(abs(float(line[1]) - float(line[2])) < 2e-4 for line in lines)
    assert "the Zen of Python: 856 characters, 45 different ones" in result.stdout
    assert "its times say nothing about a GPU" in result.stdout
    assert re.search(r"in the first 3 steps: \S+ \(allowed: 1e-05\) ok", result.stdout)
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot, only figures: matplotlib is not installed" in result.stdout
    else:
        assert "float32, cuattn on the host executor" in image.read_text(encoding="utf-8")


def test_without_matplotlib(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("to be or not to be, " * 5, encoding="utf-8")
    program = (
        "import sys; sys.modules['matplotlib'] = None; from examples.char_transformer.__main__ import main; main()"
    )
    result = run(
        "--steps", "1", "--write", "0", "--text", str(text), "--plot", str(tmp_path / "losses.png"), program=program
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no plot, only figures: matplotlib is not installed; get it with: pip install '.[plot]'" in result.stdout
    assert not (tmp_path / "losses.png").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"short", "the text has 5 characters; at least 65 are needed"), (b"\xff" * 100, "is not a UTF-8 text")],
    ids=["short", "binary"],
)
def test_a_text_of_no_use(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(contents)
    result = run("--text", str(path))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_device_that_is_not_there() -> None:
    if "cuda" in cuattn.testing.executors.executor_names():
        pytest.skip("a GPU answers here")
    result = run("--device", "cuda")
    assert result.returncode == 1
    assert "needs a GPU and CuPy" in result.stderr
