"""What pages save: less than a page a sequence is wasted, and what is shared is there once."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.benchmark.cache_sharing import beam_search, parallel_sampling, serve, waste_of

LENGTHS = [128, 256, 64, 512, 32, 384, 96, 448]


@pytest.mark.smoke
def test_pages_take_what_is_needed_and_a_reservation_twice_that() -> None:
    found = waste_of(LENGTHS)
    assert (found.pages, found.reserved_pages, found.fraction) == (120, 240, 0.0)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_less_than_a_page_of_a_sequence_is_wasted(page_size) -> None:
    lengths = np.random.default_rng(0).integers(1, 600, 20).tolist()
    found = waste_of(lengths, page_size=page_size)
    assert found.tokens == sum(lengths)
    assert found.pages == sum(-(-length // page_size) for length in lengths)
    assert found.fraction == pytest.approx(1 - found.tokens / (found.pages * page_size))
    assert found.pages * page_size - found.tokens <= len(lengths) * (page_size - 1)


@pytest.mark.parametrize("seed", range(2))
def test_random_workloads_waste_less_than_four_percent(seed) -> None:
    assert 0 < serve(16, seed=seed) < 0.04


@pytest.mark.parametrize(("num_samples", "prompt_len"), [(2, 32), (4, 37), (6, 5)])
def test_samples_of_a_prompt_share_its_full_pages(num_samples, prompt_len) -> None:
    found = parallel_sampling(num_samples, prompt_len=prompt_len, output_len=40)
    shared, lengths = prompt_len // 16, prompt_len + 1 + np.arange(40)
    assert found.unshared_pages == num_samples * (-(-lengths // 16)).sum()
    assert found.pages == (shared + num_samples * (-(-lengths // 16) - shared)).sum()
    assert found.copies == (num_samples - 1 if prompt_len % 16 else 0)


def test_beams_share_more_than_samples() -> None:
    samples = parallel_sampling(4, prompt_len=64, output_len=64)
    beams = beam_search(4, prompt_len=64, output_len=64)
    assert beams.unshared_pages == samples.unshared_pages
    assert samples.saved < beams.saved < 0.75
    apart = beam_search(4, prompt_len=64, output_len=64, switch=0.0)
    assert apart == samples
