"""Every row of the tables of kernel shapes against float64, at the largest head dims that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.head_dims import COLUMNS
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.ops.attention.forward import hopper_config as hopper
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS
from cuattn.ops.softmax import config as softmax_config
from cuattn.runtime.executor import executor_for
from cuattn.testing import kernels
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.decode_tolerance import assert_decode_close
from cuattn.testing.executors import ExecutorUnderTest
from cuattn.testing.fuzzing.arrays import dtype_of
from cuattn.testing.fuzzing.engine import describe
from cuattn.testing.fuzzing.judge import How, checked
from cuattn.testing.fuzzing.verifying import Verdict
from cuattn.testing.gradient_tolerance import assert_gradients_close
from cuattn.testing.margins import margins
from cuattn.testing.rounding import to_numpy
from cuattn.testing.tolerance import assert_attention_close, assert_softmax_close

__all__ = ["TABLES", "RowCheck", "rows"]

_DTYPES = {2: ("float16", "bfloat16"), 4: ("float32",), 8: ("float64",)}


class _NotHere(Exception):
    """The row is for another architecture, or for one with more shared memory."""


@dataclass(frozen=True)
class RowCheck:
    """One row in one dtype: `run` makes the call on an executor, and raises if it is wrong.

    A row that cannot run on this architecture counts no case.
    """

    operation: str
    name: str
    dtype: str
    run: Callable[[ExecutorUnderTest], None]

    def verdict(self, how: How) -> Verdict:
        """Make the call and say how far from float64 it was."""
        executor, verdict = ExecutorUnderTest(how.executor), Verdict(self.operation, self.name, self.dtype, cases=1)
        with margins() as found:
            try:
                with checked(how, "late", 0):
                    self.run(executor)
            except _NotHere:
                verdict.cases = 0
            except Exception as error:
                verdict.error = describe(error)
        verdict.margin = found.worst
        return verdict


def _normal(dtype: str, *shapes: tuple[int, ...], seed: int = 0) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes]


def _shape(row: Any, first: int, second: int) -> str:
    return f"{row.products} D {row.max_head_dim} {first} × {second}, {row.num_warps} warps, {row.num_stages} stages"


def _limit(executor: ExecutorUnderTest) -> Any:
    return executor_for(x=executor.array(np.zeros(1, np.float32)))


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward() -> Iterator[RowCheck]:
    for number, row in enumerate(FLASH_FWD_CONFIGS):
        for dtype in _DTYPES[row.itemsize]:
            tf32 = {"precision": "tf32"} if row.products == "mma" and dtype == "float32" else {}
            options = {"causal": number % 2 == 1, **tf32}
            run = _forward_call(row, dtype, row.max_head_dim, options, COLUMNS[row.max_head_dim][0])
            yield RowCheck("attention", _shape(row, row.block_m, row.block_n), dtype, run)
    for large in hopper.HOPPER_FWD_CONFIGS:
        if large.itemsize == 2:
            name = f"Hopper D {large.max_head_dim} {large.block_m} × {large.block_n}, {large.num_stages} stages"
            for dtype in _DTYPES[2]:
                yield RowCheck("attention", name, dtype, _hopper_call(large, dtype))


def _forward_call(row: Any, dtype: str, head_dim: int, options: dict[str, Any], columns: int) -> Any:
    def run(executor: ExecutorUnderTest) -> None:
        if not row.is_legal(head_dim, columns, _limit(executor).smem_limit_bytes):
            raise _NotHere
        shapes = (1, 130, 2, head_dim), (1, 135, 1, head_dim), (1, 135, 1, max(1, head_dim - 5))
        arrays = _normal(dtype, *shapes)
        there = map(executor.array, arrays)
        out, lse = kernels.attention(*there, return_lse=True, config=row, **options)
        assert_attention_close(executor.numpy(out), *arrays, lse=executor.numpy(lse), **options)

    return run


def _hopper_call(row: Any, dtype: str) -> Any:
    def run(executor: ExecutorUnderTest) -> None:
        if _limit(executor).arch != hopper.ARCH:
            raise _NotHere
        arrays = _normal(dtype, *((1, n, h, row.max_head_dim) for n, h in ((130, 2), (200, 1), (200, 1))))
        there = map(executor.array, arrays)
        out, lse = kernels.attention(*there, return_lse=True, config=row)
        assert_attention_close(executor.numpy(out), *arrays, lse=executor.numpy(lse))

    return run


# --- backward --------------------------------------------------------------------------------------------------------


def _backward() -> Iterator[RowCheck]:
    for products, itemsize in dict.fromkeys((row.products, row.itemsize) for row in FLASH_BWD_CONFIGS):
        own = [row for row in FLASH_BWD_CONFIGS if (row.products, row.itemsize) == (products, itemsize)]
        of_queries, of_keys = ([row for row in own if row.own == side] for side in ("queries", "keys"))
        for i in range(max(len(of_queries), len(of_keys))):
            pair = of_queries[min(i, len(of_queries) - 1)], of_keys[min(i, len(of_keys) - 1)]
            name = "; ".join(f"{row.own} {_shape(row, row.block_own, row.block_other)}" for row in pair)
            for dtype in _DTYPES[itemsize]:
                tf32 = {"precision": "tf32"} if products == "mma" and dtype == "float32" else {}
                yield RowCheck("attention_backward", name, dtype, _backward_call(pair, dtype, tf32))


def _backward_call(pair: Any, dtype: str, options: dict[str, Any]) -> Any:
    def run(executor: ExecutorUnderTest) -> None:
        head_dim = min(row.max_head_dim for row in pair)
        if not all(row.is_legal(head_dim, head_dim, _limit(executor).smem_limit_bytes) for row in pair):
            return
        n = max(pair[0].block_own + 3, 2 * pair[1].block_other + 5)
        m = max(pair[1].block_own + 3, 2 * pair[0].block_other + 5)
        q, k, v = _normal(dtype, (1, n, 2, head_dim), (1, m, 1, head_dim), (1, m, 1, head_dim))
        (dout,) = _normal(dtype, q.shape, seed=1)
        out, lse = reference.attention_naive(q, k, v, **options)
        saved = dout, q, k, v, out, lse
        grads = kernels.attention_backward(*map(executor.array, saved), configs=pair, **options)
        found = type(grads)(*(None if x is None else to_numpy(x) for x in grads))
        assert_gradients_close(found, *saved, **options)

    return run


# --- decode and softmax ----------------------------------------------------------------------------------------------


def _decode() -> Iterator[RowCheck]:
    for row in FLASH_DECODE_CONFIGS:
        for dtype in _DTYPES[row.itemsize]:
            rows = f"up to {row.max_rows} rows" if row.max_rows else "any number of rows"
            name = (
                f"{row.products} D {row.max_head_dim}, {rows}, tiles of {row.block_n} keys, {row.num_threads} threads"
            )
            yield RowCheck("decode_attention", name, dtype, _decode_call(row, dtype))


def _decode_call(row: Any, dtype: str) -> Any:
    def run(executor: ExecutorUnderTest) -> None:
        head_dim = row.max_head_dim
        rng = np.random.default_rng(0)
        problem = cached_problem(
            rng, lengths=(75, 33), seqlens_q=1, heads=(2, 1), head_dims=(head_dim, head_dim), dtype=dtype_of(dtype)
        )
        arrays = [executor.array(x) for x in (problem.q, problem.k, problem.v)]
        more: dict[str, Any] = {"return_lse": True, "num_splits": 2}
        out, lse = kernels.decode_attention(*arrays, problem.seqlens_k, config=row, **more)
        assert_decode_close(executor.numpy(out), *problem.arrays, lse=executor.numpy(lse))

    return run


def _softmax() -> Iterator[RowCheck]:
    named: dict[str, Any] = {f"on chip, {row.threads_per_row} threads a row": row for row in softmax_config.ONCHIP}
    named |= {f"on chip, rows across lanes {i}": row for i, row in enumerate(softmax_config.ONCHIP_LANES)}
    named |= {name.lower(): getattr(softmax_config, name) for name in ("STREAM_SHORT", "STREAM", "STREAM_LANES")}
    named |= {name.lower(): getattr(softmax_config, name) for name in ("SPLIT", "SPLIT_LANES")}
    for name, row in named.items():
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            yield RowCheck("softmax", name, dtype, _softmax_call(row, dtype))


def _softmax_call(row: Any, dtype: str) -> Any:
    def run(executor: ExecutorUnderTest) -> None:
        most = row.max_cols(dtype_of(dtype).itemsize) if row.path == "onchip" else 3000
        columns = min(most, 3000) - 1
        shape, axis = ((columns, 37), 0) if row.lanes_span_rows else ((3, columns), -1)
        (x,) = _normal(dtype, shape)
        out = kernels.softmax(executor.array(x), axis=axis, config=row)
        assert_softmax_close(executor.numpy(out), x, axis)

    return run


#: By operation: the rows of its table.
TABLES: dict[str, Callable[[], Iterator[RowCheck]]] = {
    "attention": _forward,
    "attention_backward": _backward,
    "decode_attention": _decode,
    "softmax": _softmax,
}


def rows(operation: str) -> list[RowCheck]:
    """List the checks of an operation's rows; none where it has no table of its own."""
    return list(TABLES[operation]()) if operation in TABLES else []
