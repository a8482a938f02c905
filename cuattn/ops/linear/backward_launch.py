"""The way from a checked problem of gradients of linear attention to its launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, NamedTuple

import numpy as np

from cuattn.dtypes import PACK_BYTES
from cuattn.ops.attention.params import REALS
from cuattn.ops.linear.arguments import LinearProblem
from cuattn.ops.linear.backward_config import constants, shape_of, smem_bytes
from cuattn.ops.linear.options import FEATURE_MAPS
from cuattn.ops.linear.state import LinearState
from cuattn.ops.operand import Operand, operand
from cuattn.runtime.arrays import contiguous
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout
from cuattn.typing import ArrayT

__all__ = ["BackwardProblem", "LinearGrads", "backward"]

SOURCE = "linear_attention_backward"
MAP_LANES = 16  # of linear/backward_map.cuh


class LinearGrads(NamedTuple, Generic[ArrayT]):
    """What `cuattn.linear_attention_backward` returns: a gradient for each input, None for those that are not there.

    Attributes
    ----------
    dq : array [B, N, H, D]
    dk : array [B, M, Gk, D]
    dv : array [B, M, Gv, E]
        Of the dtype of q, k and v.
    ddecay : array of the shape of the decay, or None
        float32, float64 for float64.
    dbeta : None
        There is no beta.
    dinitial_state : LinearState or None
        s [B, G, D, E] and z [B, G, D] (None without normalisation), of the same dtype as ddecay.
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT
    ddecay: Any
    dbeta: Any
    dinitial_state: LinearState | None


@dataclass(slots=True)
class BackwardProblem:
    """A call whose arguments have passed every check."""

    forward: LinearProblem
    dout: Any
    dstate: LinearState | None

    @property
    def decay_shape(self) -> tuple[int, ...] | None:
        """The shape of the decay that the call was given."""
        decay, extents = self.forward.decay, self.forward.extents
        if decay is None:
            return None
        if decay.channels or decay.array.ndim > 1:
            rows = extents.batch, extents.seqlen_k, extents.num_states
            return (*rows, extents.head_dim) if decay.channels else rows
        return (extents.num_states,)


class _Arrays(NamedTuple):
    """The arrays of a call that several kernels take, by the names of their parameters."""

    inputs: dict[str, Any]
    kept: dict[str, Any]
    terms: dict[str, Any]

    def of(self, *names: str) -> dict[str, Any]:
        every = self.inputs | self.kept | self.terms
        return {name: every[name] for name in names}


def backward(problem: BackwardProblem) -> LinearGrads[Any]:
    """Allocate and launch."""
    forward, executor = problem.forward, problem.forward.executor
    extents, real = forward.extents, forward.accumulator
    shapes = {"dq": forward.q.shape, "dk": forward.k.shape, "dv": forward.v.shape}
    grads = {name: Operand.of_new(executor.empty(shape, forward.dtype)) for name, shape in shapes.items()}
    first = None
    if forward.initial_state is not None:
        z = executor.empty(extents.state_shape[:3], real) if forward.options.normalize else None
        first = LinearState(executor.empty(extents.state_shape, real), z)
    ddecay = None if problem.decay_shape is None else executor.empty(problem.decay_shape, real)
    _Launches(problem, grads, first, ddecay).run()
    results = [grad.array for grad in grads.values()]
    executor.finish(*results, *(x for x in (ddecay, *(first or ())) if x is not None))
    return LinearGrads(results[0], results[1], results[2], ddecay, None, first)


class _Launches:
    """The kernels of a call in their order, with what they keep in between."""

    def __init__(
        self,
        problem: BackwardProblem,
        grads: dict[str, Operand],
        first: LinearState | None,
        ddecay: Any,
    ) -> None:
        forward = problem.forward
        self.problem, self.grads, self.first, self.ddecay = problem, grads, first, ddecay
        self.executor, self.extents, self.options = forward.executor, forward.extents, forward.options
        self.shape = shape_of(forward.dtype.itemsize)
        self.channels = forward.decay is not None and forward.decay.channels
        self.operands = {
            name: operand(self.executor, x)
            for name, x in (("dout", problem.dout), ("q", forward.q), ("k", forward.k), ("v", forward.v))
        }
        self.raw = {name: self.operands[name] for name in ("q", "k")}
        if self.options.feature_map is not None:
            for name, x in self.raw.items():
                self.operands[name] = Operand.of_new(self.executor.empty(x.array.shape, forward.dtype))
        aligned = all(x.aligned for x in self.operands.values())
        self.constants = constants(forward.dtype.name, forward.dtype.itemsize, channels=self.channels, aligned=aligned)
        self.smem = smem_bytes(forward.dtype.itemsize, channels=self.channels)
        self.num_kept = self.chunks(self.extents.seqlen_k) if self.options.causal else 1
        self.blocks = self.shape.num_blocks(self.extents.head_dim)
        self.blocks_v = self.shape.num_blocks(self.extents.head_dim_v)
        self.params = self._params()

    def chunks(self, seqlen: int) -> int:
        """Chunks of a sequence."""
        return self.shape.num_blocks(seqlen)

    def run(self) -> None:
        """Launch them all."""
        extents, options = self.extents, self.options
        batch, states, outputs = extents.batch, extents.num_states, extents.num_outputs
        arrays = self._arrays()
        whole_decay = self.problem.forward.decay is not None and not self.channels
        decayed = self.problem.forward.decay is not None
        per_query = (batch, outputs, extents.seqlen_q)
        of_queries = None
        if decayed:
            of_queries = self._new((*per_query, extents.head_dim) if self.channels else per_query)
        through = self._new((batch, states, self.num_kept, self.blocks_v, extents.head_dim)) if decayed else None
        of_keys = self._new((self.blocks, batch, states, extents.seqlen_k)) if whole_decay else None
        of_tokens = None
        if whole_decay:
            once = self.ddecay.ndim == 1
            of_tokens = self._new((batch, extents.seqlen_k, states)) if once else self.ddecay

        if options.feature_map is not None:
            for name, x in self.raw.items():
                self._map(x, self.operands[name])
        state_blocks = batch * states * self.blocks * self.blocks_v
        forward, dstate = self.problem.forward, self.problem.dstate
        given = _state_arrays(self.executor, forward.initial_state)
        self._launch(
            "states",
            state_blocks,
            "WALK",
            **arrays.of("g_k", "g_v", "g_decay", "g_s", "g_z", "g_peaks"),
            g_first_s=given[0],
            g_first_z=given[1],
        )
        common = arrays.of(
            *("g_dout", "g_q", "g_k", "g_v", "g_decay", "g_s", "g_z", "g_peaks", "g_r", "g_delta"),
        )
        rows = batch * outputs * self.chunks(extents.seqlen_q)
        if options.normalize or whole_decay:
            self._launch("rows", rows, "ROWS", **common, g_of_queries=of_queries if whole_decay else None)
        self._launch(
            "dq",
            batch * extents.num_heads * self.chunks(extents.seqlen_q) * self.blocks,
            "DQ",
            **common,
            g_raw_q=self.raw["q"].array,
            g_dq=self.grads["dq"].array,
            g_of_queries=of_queries if self.channels else None,
        )
        last = _state_arrays(self.executor, dstate)
        self._launch(
            "state_gradients",
            state_blocks,
            "WALK",
            **arrays.of("g_dout", "g_q", "g_decay", "g_r", "g_delta", "g_s", "g_z", "g_peaks"),
            g_dlast_s=last[0],
            g_dlast_z=last[1],
            g_dfirst_s=None if self.first is None else self.first.s,
            g_dfirst_z=None if self.first is None else self.first.z,
            g_through=through,
        )
        chunks = self.chunks(extents.seqlen_k)
        self._launch(
            "dk",
            batch * extents.num_k_heads * chunks * self.blocks,
            "DK",
            **common,
            g_through=through,
            g_of_queries=of_queries if self.channels else None,
            g_raw_k=self.raw["k"].array,
            g_dk=self.grads["dk"].array,
            g_of_keys=of_keys,
            g_ddecay=self.ddecay if self.channels else None,
            batch=np.int32(batch),
        )
        self._launch(
            "dv",
            batch * extents.num_v_heads * chunks * self.blocks_v,
            "DV",
            **arrays.of("g_dout", "g_q", "g_k", "g_decay", "g_s", "g_peaks", "g_r", "g_delta"),
            g_dv=self.grads["dv"].array,
        )
        if of_tokens is None:
            return
        self._launch(
            "ddecay",
            batch * states * chunks,
            g_of_queries=of_queries,
            g_of_keys=of_keys,
            g_through=through,
            g_ddecay=of_tokens,
            batch=np.int32(batch),
        )
        if of_tokens is not self.ddecay:
            self._launch(
                "ddecay_sum",
                states,
                with_params=False,
                g_of_tokens=of_tokens,
                g_ddecay=self.ddecay,
                num_tokens=np.int64(batch * extents.seqlen_k),
                num_states=np.int32(states),
            )

    def _new(self, shape: tuple[int, ...]) -> Any:
        return self.executor.empty(shape, self.problem.forward.accumulator)

    def _arrays(self) -> _Arrays:
        """Allocate the kept states and the numbers of each query, and name all that kernels share."""
        extents, normalize = self.extents, self.options.normalize
        decay = self.problem.forward.decay
        kept = extents.batch, extents.num_states, self.num_kept
        terms = extents.batch, extents.num_outputs, extents.seqlen_q
        tensor_cores = self.problem.forward.dtype.itemsize == 2
        return _Arrays(
            {f"g_{name}": x.array for name, x in self.operands.items()}
            | {"g_decay": None if decay is None else decay.array},
            {
                "g_s": self._new((*kept, extents.head_dim, extents.head_dim_v)),
                "g_z": self._new((*kept, extents.head_dim)) if normalize else None,
                "g_peaks": self._new((*kept, self.blocks, self.blocks_v)) if tensor_cores else None,
            },
            {
                "g_r": self._new(terms) if normalize else None,
                "g_delta": self._new(terms) if normalize else None,
            },
        )

    def _params(self) -> np.void:
        """Pack the struct of kernels/linear/linear_backward_params.cuh."""
        extents, options, decay = self.extents, self.options, self.problem.forward.decay
        layout = struct_layout(SOURCE, "LinearBackwardParams", REALS[self.problem.forward.accumulator.type])
        return layout.pack(
            **{name: x.strides for name, x in (self.operands | self.grads).items()},
            **{f"raw_{name}": x.strides for name, x in self.raw.items()},
            decay=(0, 0, 0) if decay is None else decay.strides,
            num_states=extents.num_states,
            num_outputs=extents.num_outputs,
            outputs_per_q_head=_ratio(extents.num_outputs, extents.num_heads),
            states_per_k_head=_ratio(extents.num_states, extents.num_k_heads),
            states_per_v_head=_ratio(extents.num_states, extents.num_v_heads),
            seqlen_q=extents.seqlen_q,
            seqlen_k=extents.seqlen_k,
            head_dim=extents.head_dim,
            head_dim_v=extents.head_dim_v,
            num_kept=self.num_kept,
            feature_map=FEATURE_MAPS.index(options.feature_map),
            causal=options.causal,
            normalize=options.normalize,
            scale=options.scale,
            eps=options.eps,
        )

    def _map(self, x: Operand, mapped: Operand) -> None:
        """Take q or k through the feature map."""
        batch, seqlen, num_heads, head_dim = x.array.shape
        num_rows = batch * seqlen * num_heads
        self._launch(
            "map",
            -(-num_rows // (self.shape.num_threads // MAP_LANES)),
            with_params=False,
            g_x=x.array,
            g_mapped=mapped.array,
            x=struct_layout(SOURCE, "RowStrides").pack(batch=x.strides[0], seq=x.strides[1], head=x.strides[2]),
            num_rows=np.int64(num_rows),
            seqlen=np.int32(seqlen),
            num_heads=np.int32(num_heads),
            head_dim=np.int32(head_dim),
            vectors=np.int32(x.aligned and mapped.aligned and head_dim * x.array.dtype.itemsize % PACK_BYTES == 0),
            feature_map=np.int32(FEATURE_MAPS.index(self.options.feature_map)),
        )

    def _launch(
        self, name: str, num_ctas: int, plan: str | None = None, *, with_params: bool = True, **args: Any
    ) -> None:
        if not num_ctas:
            return
        kernel = _kernel(self.executor, f"cuattn_linear_{name}", tuple(self.constants.items()))
        if with_params:
            args["params"] = self.params
        smem = 0 if plan is None else self.smem[f"{plan}_SMEM_BYTES"]
        self.executor.launch(kernel, (num_ctas,), (self.shape.num_threads,), args, smem)


def _ratio(total: int, heads: int) -> int:
    """Return how many of `total` share one of `heads`; 1 where there is none."""
    return total // heads if heads and total else 1


def _state_arrays(executor: Executor, state: LinearState | None) -> tuple[Any, Any]:
    """Return s and z of a state as kernels read them."""
    if state is None:
        return None, None
    return contiguous(executor, state.s), None if state.z is None else contiguous(executor, state.z)


@cache
def _kernel(executor: Executor, entry: str, items: tuple[tuple[str, Any], ...]) -> Kernel:
    return executor.kernel(SOURCE, dict(items), entry)
