"""Sparse attention by density and block size, or stride: instructions on the host executor; time and bytes on a GPU.

Beside each stands dense attention of the same arrays, and, of blocks on a GPU, torch's flex_attention with the same
mask, where torch can be imported. Blocks are drawn, so many in each row.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import cuattn
from cuattn import BlockMask, host, reference
from cuattn.benchmark import peers, verify
from cuattn.benchmark.option_costs import HOST_METHOD
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step, failure
from cuattn.runtime.timer import CUDA_METHOD, CudaTimer, significant
from cuattn.testing.attention_cases import normal
from cuattn.testing.rounding import to_numpy

__all__ = ["SparseCase", "cases", "sparse_steps"]

_CHECKED_ROWS = 128
_PEER = "torch flex_attention"


@dataclass(frozen=True, slots=True)
class SparseCase:
    """A call with N = M: of ``kept`` of the blocks in each row of blocks, of every ``stride``-th key, or dense."""

    seqlen: int
    num_heads: int
    head_dim: int
    block: int = 64
    kept: int | None = None
    stride: int | None = None
    dtype: str = "float16"

    @property
    def name(self) -> str:
        if self.stride is not None:
            return f"sparse_stride_{self.stride}"
        if self.kept is None:
            return f"sparse_dense_n{self.seqlen}_h{self.num_heads}_d{self.head_dim}"
        return f"sparse_blocks_of_{self.block}_{self.kept}_of_{-(-self.seqlen // self.block)}"

    @property
    def density(self) -> float:
        if self.stride is not None:
            return 1 / self.stride
        return 1.0 if self.kept is None else self.kept / -(-self.seqlen // self.block)

    @property
    def flops(self) -> int:
        """The operations of the two products over what is kept."""
        return int(self.density * 4 * self.num_heads * self.seqlen**2 * self.head_dim)

    @property
    def num_bytes(self) -> int:
        """Each input and the output once."""
        return 4 * self.seqlen * self.num_heads * self.head_dim * np.dtype(self.dtype).itemsize

    def make_mask(self) -> BlockMask | None:
        """Draw the mask; the same every time."""
        if self.kept is None:
            return None
        rng, num_blocks = np.random.default_rng(0), -(-self.seqlen // self.block)
        indices = [np.sort(rng.permutation(num_blocks)[: self.kept]) for _ in range(num_blocks)]
        indptr = np.arange(num_blocks + 1) * self.kept
        return BlockMask.from_csr(indptr, np.concatenate(indices), self.seqlen, self.seqlen, self.block)

    def make_arrays(self, seed: int) -> list[Any]:
        """Draw q, k and v, [1, N, H, D], as NumPy arrays."""
        rng, shape = np.random.default_rng(seed), (1, self.seqlen, self.num_heads, self.head_dim)
        return [normal(rng, shape, self.dtype) for _ in range(3)]

    def run(self, arrays: list[Any], mask: BlockMask | None) -> Any:
        q, k, v = arrays
        if self.stride is not None:
            return cuattn.strided_attention(q, k, v, self.stride, causal=False)
        return cuattn.attention(q, k, v) if mask is None else cuattn.block_sparse_attention(q, k, v, mask)


def cases(executor: str) -> list[SparseCase]:
    """The cases; the first, dense, is what the others are compared with."""
    if executor == "host":
        shape, kept = (512, 1, 64), {128: (1, 2), 64: (1, 4), 32: (4,), 16: (2, 8)}
    else:
        shape, kept = (16384, 16, 128), {128: (6, 32), 64: (13, 64), 32: (26,), 16: (51,)}
    sparse = [SparseCase(*shape, block, number) for block, numbers in kept.items() for number in numbers]
    return [SparseCase(*shape), *sparse, SparseCase(*shape, stride=8)]


def sparse_steps(options: Options) -> list[Step]:
    """One step for each case; on a GPU one more for the peer."""
    executor = options.resolved()
    dense: dict[str, float] = {}
    run = partial(host_records if executor == "host" else cuda_records, dense, options)
    return [Step("sparse", case.name, 3.0, partial(run, case)) for case in cases(executor)]


def host_records(dense: dict[str, float], options: Options, case: SparseCase) -> Iterator[Record]:
    """Count the instructions of one call, after a check of its result."""
    arrays, mask = case.make_arrays(options.seed), case.make_mask()
    with host.profile() as profile:
        out = case.run(arrays, mask)
    require(case, arrays, mask, out)
    count = profile.warp_instructions
    moved = profile.bytes["global"]
    metrics: dict[str, Value] = {
        **_sizes(case),
        **_kernel(case, arrays, mask),
        "warp_instructions": count,
        "mma": profile.instructions["mma"],
    }
    metrics |= {"global_read_bytes": moved["read"], "global_write_bytes": moved["write"]}
    metrics["ratio"] = significant(count / dense.setdefault("count", count), 4)
    yield Record("sparse", case.name, metrics, executor="host", method=HOST_METHOD)


def cuda_records(dense: dict[str, float], options: Options, case: SparseCase) -> Iterator[Record]:
    """Measure the time of one call, and of the peer's, after a check of each result."""
    import cupy

    mask, on_host = case.make_mask(), case.make_arrays(options.seed)
    arrays = [cupy.asarray(x) for x in on_host]
    ours = _timed(dense, options, case, "cuattn", lambda: case.run(arrays, mask), on_host, mask)
    yield replace(ours, metrics={**ours.metrics, **_kernel(case, arrays, mask)})
    if mask is None or not options.peers or importlib.util.find_spec("torch") is None:
        return
    try:
        record = _timed(dense, options, case, _PEER, _flex_attention(arrays, mask), on_host, mask)
    except Exception as error:  # torch refuses what it likes
        record = Record("sparse", case.name, provider=_PEER, error=failure(error), executor="cuda")
    yield record


def _timed(
    dense: dict[str, float],
    options: Options,
    case: SparseCase,
    provider: str,
    call: Callable[[], Any],
    arrays: list[Any],
    mask: BlockMask | None,
) -> Record:
    out = call()
    require(case, arrays, mask, out if provider == "cuattn" else peers.to_array(out))
    timing = CudaTimer().time(call, budget_s=options.budget_s)
    seconds = timing.median_us * 1e-6
    metrics: dict[str, Value] = {**_sizes(case), **timing.metrics()}
    metrics |= {"tflops": significant(case.flops / seconds * 1e-12, 4)}
    metrics |= {"gb_per_s": significant(case.num_bytes / seconds * 1e-9, 4)}
    metrics["ratio"] = significant(timing.median_us / dense.setdefault("us", timing.median_us), 4)
    of_call: dict[str, Any] = {"provider": provider, "executor": "cuda", "method": CUDA_METHOD}
    of_call["samples"] = timing.samples()
    return Record("sparse", case.name, metrics, **of_call)


def _sizes(case: SparseCase) -> dict[str, Value]:
    return {"density": significant(case.density, 4), "flops": case.flops, "bytes": case.num_bytes}


def _kernel(case: SparseCase, arrays: list[Any], mask: BlockMask | None) -> dict[str, Value]:
    """Name the kernel that a call takes, where it is one."""
    return {} if case.stride is not None else {"kernel": cuattn.forward_path(*arrays, block_mask=mask).kernel}


def require(case: SparseCase, arrays: list[Any], mask: BlockMask | None, out: Any) -> None:
    """Raise unless the first and the last queries of a head are right."""
    rows = np.unique(np.r_[: min(_CHECKED_ROWS, case.seqlen), max(0, case.seqlen - _CHECKED_ROWS) : case.seqlen])
    visible = None
    if case.stride is not None:
        visible = (rows[:, None] - np.arange(case.seqlen)) % case.stride == 0
    elif mask is not None:
        visible = mask.blocks[rows // case.block][:, np.arange(case.seqlen) // case.block]
    q, k, v = (x[:, :, -1:].astype(np.float64) for x in arrays)
    expected, _ = reference.attention(q[:, rows], k, v, mask=visible)
    got = to_numpy(out)[:, rows, -1:].astype(np.float64)
    verify.require(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)), case.dtype)


def _flex_attention(arrays: list[Any], mask: BlockMask) -> Callable[[], Any]:
    """Return the call of torch's compiled flex_attention with the same blocks."""
    torch = importlib.import_module("torch")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    blocks = torch.from_numpy(mask.blocks).cuda()
    bq, bk = mask.block_size
    q, k, v = (peers.to_torch(x).transpose(1, 2) for x in arrays)

    def keeps(b: Any, h: Any, i: Any, j: Any) -> Any:
        return blocks[i // bq, j // bk]

    sizes = (128 if bq % 128 else bq, 128 if bk % 128 else bk)
    block_mask = flex.create_block_mask(keeps, None, None, mask.seqlen_q, mask.seqlen_k, BLOCK_SIZE=sizes)
    compiled = torch.compile(flex.flex_attention)

    def call() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return call
