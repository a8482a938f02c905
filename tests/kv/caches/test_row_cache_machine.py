"""`KVCache` and `StreamingKVCache` under any sequence of calls, against lists; each step through the real kernels."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from row_model import LAYERS, contiguous, streaming

import cuattn
from cuattn import errors

ROPE = cuattn.Rotary(base=50.0)


class Machine(RuleBasedStateMachine):
    """Each rule is something that a user may do at any time."""

    def __init__(self, executor, kind):
        super().__init__()
        self.executor, self.kind = executor, kind
        self.model, self.open, self.gone = None, None, []

    @initialize(data=st.data())
    def start(self, data):
        if self.kind == "contiguous":
            self.model = contiguous(self.executor, max_seqlen=data.draw(st.sampled_from([9, 4])))
        else:
            num_sinks, window = data.draw(st.sampled_from([(2, 3), (0, 1), (1, 2), (3, 4)]))
            self.model = streaming(self.executor, num_sinks, window, max_chunk=2, rope=ROPE)
        self.model.step([self.model.add() for _ in range(2)], [1, 0])

    @invariant()
    def all_is_well(self):
        if self.model is not None:
            self.model.check()

    def idle(self):
        busy = () if self.open is None else self.open.sequences
        return [seq for seq in self.model.streams if seq not in busy]

    @rule()
    def add(self):
        if len(self.model.streams) < self.model.cache.batch:
            self.model.add()
        else:
            self.fails(errors.CacheFullError, self.model.cache.add)

    def some(self, data):
        """Sequences, and how many tokens each gets: mostly as many as there is room for, or fewer."""
        seqs = data.draw(st.lists(st.sampled_from(self.idle()), min_size=1, unique=True))
        return seqs, [data.draw(st.integers(0, min(self.room(seq), 4))) for seq in seqs]

    @precondition(lambda self: self.open is None and self.idle())
    @rule(data=st.data())
    def whole_step(self, data):
        self.model.step(*self.some(data))

    @precondition(lambda self: self.open is None and self.idle())
    @rule(data=st.data())
    def aborted_step(self, data):
        """One that has written and read everything before it is given up."""
        step = self.model.reserve(*self.some(data))
        for layer in range(LAYERS):
            self.model.append(step, layer)
            self.model.attend(step, layer)
        step.abort()

    @precondition(lambda self: self.open is None and self.idle())
    @rule(data=st.data())
    def reserve(self, data):
        self.open, self.next_layer = self.model.reserve(*self.some(data)), 0

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def too_much(self, data):
        seqs, counts = self.some(data)
        counts[-1] = self.room(seqs[-1]) + 1
        self.fails(errors.CacheFullError, lambda: self.model.cache.reserve(seqs, counts))

    def room(self, seq):
        cache, stream = self.model.cache, self.model.streams[seq]
        if self.kind == "contiguous":
            return cache.max_seqlen - stream.length
        return max(cache.num_sinks - stream.length, 0) + cache.window + cache.max_chunk - len(stream.latest)

    @precondition(lambda self: self.open is not None)
    @rule(do=st.sampled_from(["layers", "layers", "layers", "layer", "commit", "abort"]))
    def go_on(self, do):
        step, complete = self.open, self.next_layer == LAYERS
        if do == "abort":
            step.abort()
            self.open = None
        elif do == "commit" and not complete and step.num_tokens:
            self.fails(errors.StepError, step.commit)
        elif do == "commit" or complete:
            self.model.commit(step)
            self.open = None
        else:
            for layer in range(self.next_layer, LAYERS if do == "layers" else self.next_layer + 1):
                self.model.append(step, layer)
                self.model.attend(step, layer)
                self.next_layer = layer + 1

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def truncate(self, data):
        seq = data.draw(st.sampled_from(self.idle()))
        length = data.draw(st.integers(0, seq.length + 1))
        if length in self.model.streams[seq].lengths():
            self.model.truncate(seq, length)
        else:
            self.fails(errors.ArgumentError, lambda: self.model.cache.truncate(seq, length))

    @precondition(lambda self: len(self.idle()) > 1)
    @rule(data=st.data())
    def free(self, data):
        seq = data.draw(st.sampled_from(self.idle()))
        self.model.free(seq)
        self.gone.append(seq)

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def reset(self, data):
        seq = data.draw(st.sampled_from(self.idle()))
        self.model.cache.reset(seq)
        self.model.streams[seq].truncate(0)

    @precondition(lambda self: self.gone or self.open is not None)
    @rule(data=st.data())
    def misuse(self, data):
        """Sequences that have been freed, or are in the open step."""
        busy = [] if self.open is None else list(self.open.sequences)
        seq, cache = data.draw(st.sampled_from(self.gone + busy)), self.model.cache
        for call in (cache.free, cache.reset, lambda seq: cache.reserve([seq], 1)):
            self.fails(errors.SequenceError, lambda call=call: call(seq))

    def fails(self, error, call):
        before = self.model.state()
        with pytest.raises(error):
            call()
        assert self.model.state() == before


@pytest.mark.parametrize("kind", ("contiguous", "streaming"))
def test_any_calls(executor, kind):
    wanted = max(25, hypothesis.settings().max_examples)
    settings = hypothesis.settings(max_examples=wanted, stateful_step_count=30)
    run_state_machine_as_test(lambda: Machine(executor, kind), settings=settings)
