"""Compiling ahead of time by making the very calls, whose kernels are built and never launched.

What a call needs depends on dtypes, head dims, lengths, heads, alignment and options, in ways that only the operations
know: so they are asked. For a GPU that is not here, the host executor takes its place, with its architecture.

>>> [label for label, _ in calls(("decode",), "float16", 64)][:2]
['decode float16 d64 g1 page16', 'decode float16 d64 g1 page16 splits2']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

import cuattn
from cuattn import compile, environment
from cuattn.benchmark.replaced import replaced
from cuattn.head_dims import MAX_GRADIENT_HEAD_DIM
from cuattn.runtime import executor as executors
from cuattn.runtime.executor import CudaExecutor, HostExecutor, Kernel
from cuattn.runtime.signature import Signature
from cuattn.testing.cases import AttentionCase, BackwardCase, VarlenBackwardCase, VarlenCase
from cuattn.testing.decode_cases import DecodeCase
from cuattn.testing.rounding import accumulation_dtype

__all__ = ["OPTIONS", "PARTS", "built", "calls"]

#: What can be asked for, each with its calls below.
PARTS = ("forward", "backward", "decode", "varlen", "options")
SEQLENS = (1, 1024)  # few queries may run in a kernel of their own
HEADS = 8
#: Query heads a key head of decoding: they are rows of one product.
GROUPS = (8, 2, 1)
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"causal": True, "window": (63, 0)},
    "chunk": {"causal": True, "chunk": 64},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True, "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "bias": {"bias": "hnm"},
    "mask": {"mask": "nm"},
    "dropout": {"dropout_p": 0.1},
    "causal softcap": {"causal": True, "softcap": 30.0},
}
_MASKS: dict[str, dict[str, Any]] = {"plain": {}, "causal": {"causal": True}}
Call = tuple[str, Callable[[Any], object]]


def calls(parts: Sequence[str], dtype: str, head_dim: int, seqlens: Sequence[int] = ()) -> Iterator[Call]:
    """Name each call of some `PARTS`; the function takes the module of its arrays and makes the call."""
    mark = f"{dtype} d{head_dim}"
    has_gradients = head_dim <= MAX_GRADIENT_HEAD_DIM
    for seqlen in seqlens or SEQLENS:
        shape = 1, seqlen, 2, head_dim
        for name, options in _MASKS.items():
            case = AttentionCase(*shape, dtype=dtype, **options)
            if "forward" in parts:
                yield f"forward {mark} n{seqlen} {name}", partial(_forward, case)
            if "backward" in parts and has_gradients:
                yield f"backward {mark} n{seqlen} {name}", partial(_backward, BackwardCase(case))
            if "varlen" in parts:
                packed = VarlenCase((seqlen, max(1, seqlen // 2)), 2, head_dim, dtype=dtype, **options)
                yield f"varlen {mark} n{seqlen} {name}", partial(_forward, packed)
                if has_gradients and "backward" in parts:
                    yield f"varlen backward {mark} n{seqlen} {name}", partial(_backward, VarlenBackwardCase(packed))
        for name, options in OPTIONS.items() if "options" in parts else ():
            case = AttentionCase(*shape, dtype=dtype, **options)
            if "forward" in parts:
                yield f"forward {mark} n{seqlen} {name}", partial(_forward, case)
            if "backward" in parts and has_gradients:
                gradient = BackwardCase(case, dbias=case.bias is not None)
                yield f"backward {mark} n{seqlen} {name}", partial(_backward, gradient)
    if "decode" in parts:
        yield from _decode(dtype, head_dim, seqlens, "options" in parts)


def _decode(dtype: str, head_dim: int, seqlens: Sequence[int], with_options: bool) -> Iterator[Call]:
    for context in seqlens or (SEQLENS[-1],):
        for kv_heads in (HEADS // group for group in GROUPS):
            for page_size, cache in ((16, "page16"), (0, "contiguous")):
                case = DecodeCase(2, context, HEADS, kv_heads, head_dim, dtype, page_size=page_size)
                name = f"decode {dtype} d{head_dim} g{kv_heads} {cache}"
                yield name, partial(_decoding, case, {})
                if context > 1:
                    split = DecodeCase(2, context, HEADS, kv_heads, head_dim, dtype, page_size=page_size, num_splits=2)
                    yield f"{name} splits2", partial(_decoding, split, {})
                for option in ("window", "softcap", "alibi", "sinks") if with_options else ():
                    yield f"{name} {option}", partial(_decoding, case, {option: OPTIONS[option]})


def _forward(case: AttentionCase | VarlenCase, xp: Any) -> object:
    return case.run(_zeros(case, xp))


def _zeros(case: AttentionCase | VarlenCase, xp: Any) -> dict[str, Any]:
    """Make the inputs of a case: zeros, which are enough for kernels that never start."""
    arrays = {name: xp.zeros(shape, np.dtype(case.dtype)) for name, shape in case.shapes.items()}
    options = case.option_inputs(np.random.default_rng(0))
    return arrays | {name: x if name.startswith("cu_") else xp.asarray(x) for name, x in options.items()}


def _backward(case: BackwardCase | VarlenBackwardCase, xp: Any) -> object:
    forward = case.forward
    arrays = _zeros(forward, xp)
    out, lse = forward.run(arrays)
    return case.run({**arrays, "dout": xp.zeros(out.shape, out.dtype), "out": out, "lse": lse})


def _decoding(case: DecodeCase, options: dict[str, Any], xp: Any) -> object:
    arrays = {name: xp.zeros(shape, np.dtype(case.dtype)) for name, shape in case.shapes.items()}
    arrays |= case.host_inputs(np.random.default_rng(0))
    keywords: dict[str, Any] = {}
    for name in options:
        if name in ("alibi", "sinks"):
            keyword = "alibi_slopes" if name == "alibi" else name
            keywords[keyword] = xp.ones(HEADS, accumulation_dtype(case.dtype))
        else:
            keywords[name] = options[name][name]
    if case.num_splits is not None:
        keywords["num_splits"] = case.num_splits
    function = cuattn.paged_attention if case.page_size else cuattn.decode_attention
    return function(**arrays, return_lse=True, **keywords)


class _Function:
    """A kernel that is not loaded."""

    max_dynamic_shared_size_bytes = 0


@contextmanager
def built(target: compile.Target, on_build: Callable[[str, str, Any], None] | None = None) -> Iterator[Any]:
    """Build the kernels of the calls in the block for a target, and launch none; gives the module for their arrays.

    ``on_build`` gets kernel file, entry and constants of each kernel. Kernels of an architecture that is neither that
    of the host executor nor that of the GPU here are compiled, not loaded. What this process has loaded is forgotten.
    """

    def load(executor: Any, source_name: str, constants: Any, entry: str) -> Kernel:
        if on_build is not None:
            on_build(source_name, entry, constants)
        if is_here:
            kernel: Kernel = own_load(executor, source_name, constants, entry)
            return kernel
        compile.build(source_name, constants, arch=target.arch, kind=target.kind)
        return Kernel(source_name, entry, _Function(), 0, Signature(source_name, constants, entry))

    on_host = target == compile.Target(environment.host_arch(), "ptx")
    on_gpu = not on_host and target == _of_gpu()
    is_here = on_host or on_gpu
    owner: Any = CudaExecutor if on_gpu else HostExecutor
    own_load = owner._load
    xp: Any = __import__("cupy") if on_gpu else np
    _forget()
    with ExitStack() as stack:
        if not is_here:  # the environment variable allows only what the host executor can run
            stack.enter_context(replaced(environment, "host_arch", lambda: target.arch))
        stack.enter_context(replaced(owner, "_load", load))
        stack.enter_context(replaced(owner, "_start", lambda *arguments: None))
        stack.enter_context(replaced(owner, "finish", lambda *arguments: None))
        stack.callback(_forget)
        yield xp


def _of_gpu() -> compile.Target | None:
    from cuattn.benchmark import machine

    capability = machine.gpu().get("compute_capability")
    return None if capability is None else compile.for_device(divmod(int(str(capability)), 10))


def _forget() -> None:
    """Make executors anew: those of before hold kernels of another kind."""
    executors.host_executor.cache_clear()
    executors.cuda_executor.cache_clear()
