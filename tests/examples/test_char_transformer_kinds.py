"""The kinds of attention and of positions that the training example has: their gradients, and the kernels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from examples.char_transformer.__main__ import main
from examples.char_transformer.attention import KernelAttention, ReferenceAttention
from examples.char_transformer.kinds import KINDS
from examples.char_transformer.model import CharTransformer, Positions, Shape, initial_weights, sines

SMALL = Shape(vocabulary=11, context=20, width=32, heads=2, blocks=2)


def shape_of(kind: str, positions: Positions) -> Shape:
    return replace(SMALL, positions=positions, gates=KINDS[kind].num_gates(SMALL.heads))


def excerpt(seqlen: int = 19) -> Any:
    return np.random.default_rng(1).integers(SMALL.vocabulary, size=(2, 2, seqlen))


def model_of(kind: str, positions: Positions, attention: Any, dtype: Any, array: Any = np.asarray) -> CharTransformer:
    shape = shape_of(kind, positions)
    weights = {name: array(w.astype(dtype)) for name, w in initial_weights(shape, seed=2).items()}
    return CharTransformer(shape, weights, attention)


def reference_of(kind: str, positions: Positions) -> CharTransformer:
    return model_of(kind, positions, ReferenceAttention(KINDS[kind], rotate=positions == "rope"), np.float64)


CASES = [*((kind, "learned") for kind in KINDS), ("softmax", "sincos"), ("softmax", "rope"), ("gated", "rope")]


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_gradients_of_the_whole_model(kind: str, positions: Positions) -> None:
    """Of each weight, along one random direction."""
    model = reference_of(kind, positions)
    tokens, targets = excerpt()
    _, grads = model.loss_and_grads(tokens, targets)
    assert grads.keys() == model.weights.keys()
    assert ("positions" in grads) == (positions == "learned")
    for name, w in model.weights.items():
        direction, start, step = np.random.default_rng(3).standard_normal(w.shape), w.copy(), 1e-5
        losses = []
        for sign in (1, -1):
            w[...] = start + sign * step * direction
            losses.append(float(model.loss_and_grads(tokens, targets)[0]))
        w[...] = start
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float((grads[name] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize(("kind", "positions"), [*((kind, "learned") for kind in KINDS), ("softmax", "rope")])
def test_gradients_with_kernels(executor: Any, kind: str, positions: Positions) -> None:
    """float32: unit roundoff times a few hundred, of the largest gradient of a weight."""
    tokens, targets = excerpt()
    loss64, expected = reference_of(kind, positions).loss_and_grads(tokens, targets)
    attention = KernelAttention(np.float32, KINDS[kind], rotate=positions == "rope")
    loss, grads = model_of(kind, positions, attention, np.float32, executor.array).loss_and_grads(tokens, targets)
    assert float(loss) == pytest.approx(float(loss64), rel=1e-5)
    for name, gradient in grads.items():
        difference = np.abs(executor.numpy(gradient) - expected[name]).max()
        assert difference <= 1e-5 * np.abs(expected[name]).max(), name


def test_a_window_hides_what_is_far_away() -> None:
    """Of the last character, 16 characters of each of two blocks: the first of 40 is beyond them."""
    shape = replace(SMALL, context=40, positions="rope")
    weights = {name: w.astype(np.float64) for name, w in initial_weights(shape, seed=2).items()}
    tokens = np.random.default_rng(1).integers(SMALL.vocabulary, size=(1, 40))
    other = tokens.copy()
    other[0, 0] = (other[0, 0] + 1) % SMALL.vocabulary
    for kind, hidden in (("window", True), ("softmax", False)):
        model = CharTransformer(shape, weights, ReferenceAttention(KINDS[kind], rotate=True))
        assert (model.logits(tokens)[0, -1] == model.logits(other)[0, -1]).all() == hidden


def test_turned_positions_are_relative() -> None:
    """The same characters behind others that nobody sees: with a window, the same logits."""
    shape = replace(SMALL, context=40, positions="rope", blocks=1)
    weights = {name: w.astype(np.float64) for name, w in initial_weights(shape, seed=2).items()}
    model = CharTransformer(shape, weights, ReferenceAttention(KINDS["window"], rotate=True))
    tokens = np.random.default_rng(1).integers(SMALL.vocabulary, size=(1, 40))
    np.testing.assert_allclose(model.logits(tokens)[:, -5:], model.logits(tokens[:, 10:])[:, -5:], rtol=1e-10)


def test_sines_and_cosines() -> None:
    table = sines(50, 6) / sines(1, 6)[0, 1]
    for column, slower in enumerate((1, 1, 10000 ** (-1 / 3), 10000 ** (-1 / 3), 10000 ** (-2 / 3), 10000 ** (-2 / 3))):
        expected = (np.sin, np.cos)[column % 2](np.arange(50) * slower)
        np.testing.assert_allclose(table[:, column], expected, atol=1e-12)


def test_all_kinds_in_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = tmp_path / "text"
    text.write_text("to be or not to be, " * 5, encoding="utf-8")
    image = tmp_path / "losses.svg"
    options = ("--attention", "all", "--positions", "rope", "--data", str(text), "--plot", str(image))
    result = CliRunner().invoke(main, ["--steps", "2", "--write", "0", *options])
    assert result.exit_code == 0, result.output
    judged = re.findall(r"^(\w+): largest difference of the losses in the first 2 steps: .* ok$", result.output, re.M)
    assert judged == list(KINDS)
    assert "100 characters, 8 different ones" in result.output
    pytest.importorskip("matplotlib", reason="the [plot] extra is not installed")
    drawn = image.read_text(encoding="utf-8")
    assert all(f"<!-- {kind} -->" in drawn for kind in KINDS)
