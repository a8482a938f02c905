"""The states between the parts of a sequence that ranks hold, for linear attention and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.distributed.agreement import agree_checked
from cuattn.distributed.group import Group, check_group
from cuattn.ops.linear import arguments
from cuattn.ops.linear.arguments import LinearProblem
from cuattn.ops.linear.backward import LinearGrads
from cuattn.ops.linear.backward import linear_attention_backward as gradients_of_one_rank
from cuattn.ops.linear.dense import linear_attention_summary
from cuattn.ops.linear.state import LinearState, as_state

__all__ = ["Scan"]


@dataclass
class Scan:
    """The states between the parts of a sequence."""

    group: Group
    problem: LinearProblem
    arrays: tuple[Any, Any, Any]
    options: dict[str, Any]
    decay: Any
    initial: LinearState | None
    _totals: Any = None

    @classmethod
    def of(
        cls,
        group: Any,
        call: str,
        arrays: tuple[Any, Any, Any],
        options: dict[str, Any],
        decay: Any,
        initial_state: Any,
        extra: dict[str, Any] | None = None,
    ) -> Scan:
        """Check the arguments of this rank, and agree with the others."""
        group = check_group(group)

        def check() -> LinearProblem:
            return arguments.check(*arrays, **options, decay=decay, initial_state=initial_state)

        def described(problem: LinearProblem) -> tuple[dict[str, Any], None]:
            extents = problem.extents
            of_decay = None if problem.decay is None else problem.decay.array.ndim
            shapes: dict[str, Any] = {"state": extents.state_shape, "dtype": str(problem.dtype), "decay": of_decay}
            shapes |= {"heads": extents.out_shape[2], "initial_state": initial_state is not None}
            return {**shapes, **options, "dstate": "dstate" in (extra or {})}, None

        problem, _ = agree_checked(group, call, check, described)
        initial = None if initial_state is None else as_state("initial_state", initial_state)
        return cls(group, problem, arrays, options, decay, initial)

    def states(self) -> tuple[LinearState, LinearState]:
        """Return the state before this rank's tokens, and that after the last rank's."""
        _, k, v = self.arrays
        names = "feature_map", "normalize"
        total, made = linear_attention_summary(k, v, decay=self.decay, **{name: self.options[name] for name in names})
        gathered = self.group.all_gather(self._packed(total, made))
        self._totals, states = self._unpacked(gathered)
        xp = self.problem.executor.xp
        with self.problem.executor.on_device():
            state = LinearState(xp.zeros_like(made.s), None if made.z is None else xp.zeros_like(made.z))
            if self.initial is not None:
                state = _sum(state, self._whole(self.initial))
            before = state
            for rank in range(self.group.size):
                if rank == self.group.rank:
                    before = state
                state = self._after(rank, state, states[rank])
        return before, state

    def states_backward(self, of_initial: LinearState, dstate: Any) -> tuple[LinearState | None, LinearState]:
        """Return the gradients of the state behind this rank's tokens (None for zeros), and of that before all."""
        executor, xp = self.problem.executor, self.problem.executor.xp
        with executor.on_device():
            total = xp.zeros_like(self._totals[0])
        gathered = self.group.all_gather(self._packed(total, of_initial))
        _, gradients = self._unpacked(gathered)
        with executor.on_device():
            state = None if dstate is None else self._whole(as_state("dstate", dstate))
            behind = state
            for rank in reversed(range(self.group.size)):
                if rank == self.group.rank:
                    behind = state
                state = gradients[rank] if state is None else self._after(rank, state, gradients[rank])
        assert state is not None
        return behind, state

    def gradients_of_all(self, dout: Any, last: LinearState, dstate: Any) -> LinearGrads[Any]:
        """Return the gradients where every query reads the state after the last key."""
        q, k, v = self.arrays
        executor, xp = self.problem.executor, self.problem.executor.xp
        no_keys = self.no_keys(k, v)
        of_queries = gradients_of_one_rank(dout, q, *no_keys, initial_state=last, **self.options)
        assert of_queries.dinitial_state is not None
        with executor.on_device():
            nothing = xp.zeros_like(self._totals[0])
        packed = self.group.all_reduce(self._packed(nothing, of_queries.dinitial_state))
        _, (state,) = self._unpacked(packed[None])
        with executor.on_device():
            if dstate is not None:
                state = _sum(state, self._whole(as_state("dstate", dstate)))
            q, dout = q[:, :0], dout[:, :0]
        of_keys = gradients_of_one_rank(dout, q, k, v, dstate=state, **self.options)
        dinitial = state if self.initial is not None else None
        return of_queries._replace(dk=of_keys.dk, dv=of_keys.dv, ddecay=None, dinitial_state=dinitial)

    def no_keys(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Return keys and values of no tokens."""
        return k[:, :0], v[:, :0]

    def _whole(self, state: LinearState) -> LinearState:
        """Return a state, or a gradient of one, with a z where there is normalisation: zeros if it has none."""
        xp = self.problem.executor.xp
        if not self.options["normalize"]:
            return LinearState(state.s, None)
        return state if state.z is not None else LinearState(state.s, xp.zeros(state.s.shape[:3], state.s.dtype))

    def _after(self, rank: int, state: LinearState, made: LinearState) -> LinearState:
        """Return e^total state + made: a state behind (or a gradient before) the tokens of a rank."""
        kept = self.problem.executor.xp.exp(self._totals[rank])
        of_s = kept[..., None] if kept.ndim == 3 else kept[..., None, None]
        of_z = kept if kept.ndim == 3 else kept[..., None]
        return LinearState(of_s * state.s + made.s, None if made.z is None else of_z * state.z + made.z)

    def _packed(self, total: Any, state: LinearState) -> Any:
        parts = [total, *(x for x in state if x is not None)]
        with self.problem.executor.on_device():
            return self.problem.executor.xp.concatenate([x.reshape(-1) for x in parts])

    def _unpacked(self, gathered: Any) -> tuple[list[Any], list[LinearState]]:
        """Return the totals and the states of all ranks."""
        batch, num_states, dim, dim_v = self.problem.extents.state_shape
        channels = self.problem.decay is not None and self.problem.decay.channels
        shapes = [(batch, num_states, dim) if channels else (batch, num_states), (batch, num_states, dim, dim_v)]
        if self.options["normalize"]:
            shapes.append((batch, num_states, dim))
        totals, states = [], []
        for row in gathered:
            parts, first = [], 0
            for shape in shapes:
                count = int(np.prod(shape))
                parts.append(row[first : first + count].reshape(shape))
                first += count
            totals.append(parts[0])
            states.append(LinearState(parts[1], parts[2] if len(parts) > 2 else None))
        return totals, states


def _sum(one: LinearState, other: LinearState) -> LinearState:
    return LinearState(one.s + other.s, None if one.z is None else one.z + other.z)
