"""Calls as plain data: files, programs, arrays from seeds; and what is drawn for each operation."""

from __future__ import annotations

import inspect
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import cuattn
from cuattn.errors import ArgumentError
from cuattn.testing.fuzzing import OPERATIONS, Array, Case
from cuattn.testing.fuzzing.arrays import ELEMENT_KINDS, values
from cuattn.testing.fuzzing.catalogue import choose
from cuattn.testing.fuzzing.coverage import Coverage

#: Public functions that no call of the fuzzer goes through, by why.
NOT_DRAWN = {
    "hosts: masks of blocks and lists, whose tests are exhaustive or drawn in tests/": (
        *("bigbird_mask", "global_mask", "local_mask", "streaming_mask", "strided_mask", "vertical_slash_mask"),
        *("block_tables_from_csr", "csr_from_block_tables", "slot_mapping", "tensor_map", "dual_chunk_positions"),
        *("dual_chunk_logit_factor", "lambda_init", "differential_lambda", "rope_frequencies", "dropout_mask"),
    ),
    "say how a call would run, or measure it": (
        *("forward_path", "tune", "plan_decode", "attention_backward_workspace_size"),
    ),
    "made of calls that are drawn, with drawn tests of their own": (
        *("cascade_attention", "copy_pages", "sparse_attention", "strided_attention_backward"),
        *("block_sparse_attention_varlen", "block_sparse_attention_varlen_backward", "differential_decode"),
        *("dual_chunk_decode", "linear_attention_summary"),
    ),
}


def test_every_public_function_is_drawn_or_said_not_to_be() -> None:
    functions = {name for name in cuattn.__all__ if inspect.isfunction(getattr(cuattn, name))}
    drawn = {name for one in OPERATIONS.values() for name in one.functions}
    left_out = {name for names in NOT_DRAWN.values() for name in names}
    assert drawn | left_out == functions
    assert not drawn & left_out


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_drawn_is_data_that_can_be_made_again(name: str) -> None:
    """Cases of several skeletons go through JSON, and through the program that is printed; their arrays exist."""
    operation, rng = OPERATIONS[name], random.Random(name)
    found: list[Case] = []
    for _ in range(4):

        @hypothesis.seed(rng.randrange(1000))
        @hypothesis.settings(max_examples=4, database=None, phases=[hypothesis.Phase.generate])
        @hypothesis.given(operation.cases(operation.skeleton(rng)))
        def draw(case: Case) -> None:
            found.append(case)

        draw()
    for case in found:
        assert Case.from_json(case.to_json()) == case
        made: dict[str, Case] = {}
        exec(case.snippet().replace("run(case)", ""), made)
        assert made["case"] == case
        for value in case.arguments.values():
            if isinstance(value, Array):
                assert value.make().array.shape == value.shape


@pytest.mark.parametrize("name", OPERATIONS)
def test_skeletons_reach_every_option(name: str) -> None:
    operation, rng = OPERATIONS[name], random.Random(1)
    drawn = [operation.skeleton(rng) for _ in range(400)]
    assert {option for one in drawn for option in one["options"]} == set(operation.options)


@pytest.mark.parametrize("kind", ELEMENT_KINDS)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"))
def test_elements_are_finite_and_follow_from_the_seed(kind: str, dtype: str) -> None:
    one, other = values((3, 5, 8), dtype, kind, 7), values((3, 5, 8), dtype, kind, 7)
    assert one.tobytes() == other.tobytes() != values((3, 5, 8), dtype, kind, 8).tobytes()
    assert np.isfinite(one.astype(np.float64)).all()


def test_one_huge_among_tiny() -> None:
    x = np.abs(values((4, 50), "float16", "one_huge", 0).astype(np.float64))
    assert (x > 100).sum() == 1 and np.median(x) < 0.01


def test_a_case_is_as_large_as_its_arrays() -> None:
    small, large = (Case("softmax", {"x": Array((n, 3), "float32"), "axis": -1}) for n in (2, 5))
    assert small.size < large.size


@pytest.mark.parametrize("text", ("", "{}", "[1]", '{"operation": "softmax"}', '{"operation": 1, "arguments": 2}'))
def test_other_files_are_no_cases(text: str) -> None:
    with pytest.raises(ArgumentError, match="no case of the fuzzer"):
        Case.from_json(text)


def test_an_unknown_operation_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="no operation 'sofmax'"):
        choose(["sofmax"])


@hypothesis.given(st.integers(0, 2**32))
@hypothesis.settings(max_examples=20)
def test_coverage_of_processes_adds_up(seed: int) -> None:
    """What a copy lacks, added to it, is the whole; and a skeleton that was counted is less new than before."""
    rng, operation = random.Random(seed), OPERATIONS["attention"]
    whole, copy = Coverage(), Coverage()
    skeletons = [operation.skeleton(rng) for _ in range(4)]
    for index, skeleton in enumerate(skeletons):
        if index == 2:
            copy.merge(whole)
        before = whole.novelty("attention", skeleton)
        whole.cases["attention"] += 1
        whole.count(operation.name, skeleton)
        assert whole.novelty("attention", skeleton) < before
    copy.merge(whole.since(copy))
    assert copy.features == whole.features and copy.cases == whole.cases
