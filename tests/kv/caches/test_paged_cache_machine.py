"""`PagedKVCache` under any sequence of calls: every invariant after every one, against a model without pages."""

from __future__ import annotations

import hypothesis
import pytest
from cache_model import CacheModel
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cuattn import PagedKVCache, errors

TOKENS = st.lists(st.integers(0, 1), max_size=7)
KEYS = st.sampled_from([None, "adapter"])
NUM_OPEN = 2


class Machine(RuleBasedStateMachine):
    """Drives a `CacheModel`; each rule is something that a user may do at any time."""

    def __init__(self, executor, kv_format):
        super().__init__()
        self.executor, self.kv_format = executor, kv_format
        self.model = None

    @initialize(page_size=st.sampled_from([2, 3, 1]), prefix_caching=st.sampled_from([True, True, False]))
    def start(self, page_size, prefix_caching):
        options = dict(page_size=page_size, kv_format=self.kv_format, prefix_caching=prefix_caching)
        self.model = CacheModel(self.executor, **options)

    @invariant()
    def all_is_well(self):
        if self.model is not None:
            self.model.check()

    def teardown(self):
        if self.model is not None:
            self.model.finish()

    # --- choices ----------------------------------------------------------------------------------------------------

    def idle(self, state="live"):
        """Sequences that are in no open step."""
        busy = {seq for step in self.model.steps for seq in step.sequences}
        return [seq for seq in self.model.seqs if seq not in busy and seq.state == state]

    def some(self, data, seqs, least=1):
        return data.draw(st.lists(st.sampled_from(seqs), min_size=least, max_size=4, unique=True))

    # --- rules ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.model.seqs) < 6)
    @rule(tokens=st.none() | TOKENS, cache_key=KEYS)
    def add(self, tokens, cache_key):
        self.model.add(tokens, cache_key)

    @precondition(lambda self: self.idle() and len(self.model.seqs) < 6)
    @rule(data=st.data())
    def fork(self, data):
        self.model.fork(data.draw(st.sampled_from(self.idle())))

    @precondition(lambda self: self.idle() and len(self.model.steps) < NUM_OPEN)
    @rule(data=st.data(), tell=st.booleans())
    def reserve(self, data, tell):
        seqs = self.some(data, self.idle())
        counts = [data.draw(st.integers(0, 5)) for _ in seqs]
        given = None
        if tell:
            given = []
            for seq, count in zip(seqs, counts, strict=True):
                pending = self.model.seqs[seq].pending[:count]
                new = data.draw(
                    st.lists(st.integers(0, 1), min_size=count - len(pending), max_size=count - len(pending))
                )
                given.append(pending + new)
        self.model.reserve(seqs, counts, given)

    @precondition(lambda self: self.idle() and not self.model.steps)
    @rule(data=st.data())
    def compute_what_is_pending(self, data):
        """A whole step, as a model makes it: a prompt or a part of one, or one more token."""
        seqs = self.some(data, self.idle())
        counts = [data.draw(st.integers(1, max(1, len(self.model.seqs[seq].pending)))) for seq in seqs]
        given = [
            self.model.seqs[seq].pending[:count] or [data.draw(st.integers(0, 1))]
            for seq, count in zip(seqs, counts, strict=True)
        ]
        step = self.model.reserve(seqs, counts, given)
        if step is not None:
            for _ in range(self.model.cache.num_layers):
                self.model.append(step)
            self.model.commit(step)

    @precondition(lambda self: self.model.steps)
    @rule(data=st.data(), do=st.sampled_from(["append", "append", "commit", "commit", "abort"]))
    def go_on(self, data, do):
        """The next thing of an open step; before all layers are there, commit must fail and change nothing."""
        step = data.draw(st.sampled_from(list(self.model.steps)))
        complete = self.model.steps[step].num_appended == self.model.cache.num_layers
        if do == "abort":
            self.model.abort(step)
        elif do == "append" and not complete:
            self.model.append(step)
        elif do == "commit" and not complete and step.num_tokens:
            self.fails(errors.StepError, step.commit)
        elif complete or not step.num_tokens:
            self.model.commit(step)

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def truncate(self, data):
        seq = data.draw(st.sampled_from(self.idle()))
        self.model.truncate(seq, data.draw(st.integers(0, seq.length)))

    @precondition(lambda self: self.idle() or self.idle("swapped"))
    @rule(data=st.data())
    def free(self, data):
        self.model.free(data.draw(st.sampled_from(self.idle() + self.idle("swapped"))))

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def swap_out(self, data):
        self.model.cache.swap_out(self.some(data, self.idle()))

    @precondition(lambda self: self.idle("swapped"))
    @rule(data=st.data())
    def swap_in(self, data):
        self.model.swap_in(self.some(data, self.idle("swapped")))

    @precondition(lambda self: self.model.seqs)
    @rule(data=st.data())
    def misuse(self, data):
        """Calls that must fail, and change nothing."""
        cache = self.model.cache
        seq = data.draw(st.sampled_from(list(self.model.seqs)))
        for call in (cache.fork, cache.free, cache.swap_out, lambda seq: cache.truncate(seq, 0)):
            if seq not in self.idle() and not (call == cache.free and seq.state == "swapped"):
                self.fails(errors.SequenceError, lambda call=call: call(seq))
        if seq not in self.idle("swapped"):
            self.fails(errors.SequenceError, lambda: cache.swap_in([seq]))
        if seq in self.idle():
            self.fails(errors.ArgumentError, lambda: cache.reserve([seq, seq], [1, 1]))
            self.fails(errors.ArgumentError, lambda: cache.reserve([seq], [-1]))
            self.fails(errors.ArgumentError, lambda: cache.truncate(seq, seq.length + 1))
            self.fails(errors.OutOfPagesError, lambda: cache.reserve([seq], 1000))
            self.fails(errors.SequenceError, lambda: other_cache().reserve([seq], 1))

    def fails(self, error, call):
        before = self.model.state()
        with pytest.raises(error):
            call()
        assert self.model.state() == before


def other_cache():
    return PagedKVCache(1, 1, num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")


@pytest.mark.parametrize("kv_format", [None, "int8"])
def test_every_sequence_of_calls(executor, kv_format) -> None:
    examples = max(50, hypothesis.settings().max_examples)
    settings = hypothesis.settings(max_examples=examples, stateful_step_count=40)
    run_state_machine_as_test(lambda: Machine(executor, kv_format), settings=settings)
