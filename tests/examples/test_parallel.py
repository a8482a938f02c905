"""The transformer on several ranks: the losses of one rank, and the bytes of the formulas, in every way."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cuattn.distributed import ThreadGroup
from examples.parallel import of_blocks, smollm2
from examples.parallel.__main__ import compare, train, ways
from examples.parallel.common import Setting, Shape, shape_of
from examples.smollm2.plain import PlainModel
from examples.smollm2.weights import Block, Weights
from examples.smollm2.weights import Shape as ModelShape


def small(size: int, **changes: int) -> Setting:
    shape = shape_of(size)
    return Setting(size, Shape(shape.vocabulary, context=12, width=8 * size, heads=size, blocks=2), **changes)


@pytest.mark.parametrize(("size", "batch"), [(4, 4), (3, 5)])
def test_losses_and_bytes(size, batch) -> None:
    setting = small(size, batch=batch)
    rows = ThreadGroup.run(size, compare, setting, 3, timeout=60.0)[0]
    assert [row["way"] for row in rows] == [way.name for way in ways(setting)]
    assert len({round(loss, 6) for loss in rows[0]["losses"]}) == 3  # it learns: a wrong gradient would show
    for row in rows:
        assert row["difference"] < 1e-6, row["way"]
        assert max(row["sent"]) == pytest.approx(row["formula"], rel=1e-15), row["way"]


def test_a_wrong_gradient_shows() -> None:
    setting = small(2, batch=2)

    def losses(group, factor):
        way = ways(setting)[0]

        def wrong(*arguments):
            loss, grads = way.step(*arguments)
            return loss, grads | {"logits": grads["logits"] * factor + (factor != 1) * 1e-3}

        return train(group, setting, way.__class__(way.name, wrong, "", way.bytes), 3)[0]

    right, planted = (ThreadGroup.run(2, losses, factor)[0] for factor in (1.0, 1.01))
    assert np.abs(np.subtract(right, planted)).max() > 1e-6


@pytest.mark.parametrize(("stages", "pieces"), [(1, 4), (4, 4), (4, 16), (3, 1)])
def test_the_bubble_is_what_the_schedule_leaves_idle(stages, pieces) -> None:
    expected = of_blocks.bubble(stages, pieces)
    assert expected == Fraction(stages - 1, pieces + stages - 1)
    for group in ThreadGroup.create(stages):
        assert of_blocks.idle_ticks(group, pieces) == expected


def drawn_weights(seed: int) -> Weights:
    """A model of 9 query and 3 key/value heads, as SmolLM2 has them."""
    rng = np.random.default_rng(seed)
    extents = {"width": 96, "blocks": 2, "heads": 9, "kv_heads": 3, "head_dim": 32, "inner": 64, "context": 100}
    shape = ModelShape(vocabulary=50, **extents, rope_base=10000.0, rms_eps=1e-5)

    def drawn(*sizes: int) -> np.ndarray:
        return (1.5 * rng.standard_normal(sizes) / np.sqrt(sizes[-1])).astype(np.float32)

    ones = np.ones(shape.width, np.float32)
    heads = shape.heads * shape.head_dim
    blocks = [
        Block(ones, drawn(15 * 32, shape.width), drawn(shape.width, heads), ones, drawn(128, 96), drawn(96, 64))
        for _ in range(shape.blocks)
    ]
    return Weights(shape, drawn(shape.vocabulary, shape.width) * np.float32(3), tuple(blocks), ones)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("division", ["heads", "keys"])
def test_a_language_model_writes_the_same_tokens(size, division) -> None:
    weights, prompt = drawn_weights(3), [3, 1, 4, 1, 5, 9, 2, 6]
    plain, expected = PlainModel(weights), list(prompt)
    for _ in range(6):
        expected.append(int(plain.logits(expected).argmax()))
    answers = ThreadGroup.run(size, smollm2.generate, weights, prompt, 6, division)
    assert answers == [expected[len(prompt) :]] * size
    assert len(set(answers[0])) > 2
