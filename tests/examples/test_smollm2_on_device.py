"""The example that generates text, with arrays of a stand-in for CuPy: nothing is mixed, and only logits come back."""

from __future__ import annotations

import pytest

pytest.importorskip("gguf", reason="the [examples] extra is not installed")
pytest.importorskip("tokenizers", reason="the [examples] extra is not installed")

import simulated_cupy
from test_smollm2 import NEVER, PROMPTS, drawn_weights

from cuattn.ops.rotary.arguments import turn_words
from examples.smollm2.demonstrations import Demonstrations


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for CuPy that computes."""
    with simulated_cupy.installed(monkeypatch, simulated_cupy.ComputingCupy) as module:
        yield module
        turn_words.cache_clear()  # it holds arrays of this stand-in


def demonstrations() -> Demonstrations:
    return Demonstrations(drawn_weights(), NEVER, device="cuda", count=5, page_size=4)


def test_answers_on_a_device(cupy) -> None:
    shown = demonstrations()
    assert isinstance(shown.on_device.embedding, cupy.ndarray)
    rows = shown.greedy(PROMPTS)
    assert all(row.passed for row in rows)
    assert cupy.num_synchronizations == 5  # the logits of five steps
    assert len(cupy.stream_waits) == 1 + 4  # for the angles of the rotation, and for the plan of each decode step
    assert {launch.device for launch in cupy.launches} == {0}


def test_shared_pages_on_a_device(cupy) -> None:
    shown = demonstrations()
    rows = shown.prefix([[*range(20, 29), 3], [*range(20, 29), 4, 5]])
    assert [row.answer.from_cache for row in rows] == [0, 8]
    assert all(row.passed for row in rows)
    requests, used = shown.samples(PROMPTS[2], 3, temperature=1.0, seed=0)
    here, _ = Demonstrations(drawn_weights(), NEVER, count=5, page_size=4).samples(PROMPTS[2], 3, 1.0, 0)
    assert [request.answer for request in requests] == [request.answer for request in here]
    assert used == 8 + 2 * 3
