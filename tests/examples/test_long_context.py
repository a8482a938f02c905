"""The example of needles in a long context: what each kind of attention finds, on a shorter one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cuattn
from examples import long_context
from examples.long_context import KINDS, NEEDLES, Task, task


def right(name: str, given: Task) -> list[bool]:
    out = KINDS[name](given.q, given.k, given.v)
    return (out[0, -NEEDLES:, 0].astype(np.float32).argmax(axis=1) == given.symbols).tolist()


def test_the_haystack() -> None:
    given = task(1500)
    assert given.q.shape == (1, 1500, 1, 64) and (np.diff(given.places) > 100).all()
    said = given.v[0, given.places, 0]
    assert (said.argmax(axis=1) == given.symbols).all() and (said.sum(axis=1) == 1).all()
    assert np.unique(given.symbols).size == NEEDLES


@pytest.mark.parametrize("kind", ["full", "block-sparse", "full, turned", "dual-chunk, turned"])
def test_kinds_that_find_every_needle(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "CHUNK", 256)
    monkeypatch.setattr(long_context, "LOCAL", 64)
    assert all(right(kind, task(1500)))


def test_a_window_finds_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "WINDOW", 700)
    given = task(1500)
    near = (1500 - NEEDLES + np.arange(NEEDLES)) - given.places < 700
    assert 0 < near.sum() < NEEDLES
    assert right(f"window {2048}", given) == near.tolist()


def test_what_is_too_far_away_is_turned_against_its_question() -> None:
    """A base of 500 instead of 10,000 turns so much faster that 1500 tokens are too many."""
    given = task(1500)
    q, k = (cuattn.rope(x, np.arange(1500), base=500.0) for x in (given.q, given.k))
    out = cuattn.attention(q, k, given.v, causal=True)[0, -NEEDLES:, 0].astype(np.float32)
    found = out.argmax(axis=1) == given.symbols
    assert found[-1] and not found.all()


def test_it_prints_a_line_for_each_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "needles.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        long_context.main(["--tokens", "600"])
    else:
        long_context.main(["--tokens", "600", "--plot", str(image)])
        assert image.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines[3 : 3 + len(KINDS)]] == list(KINDS)
    assert lines[3].endswith(" ".join("+" * NEEDLES))
