"""What a GPU user would otherwise call: torch's attention back ends and softmax, and plain CuPy.

A peer takes the very arrays that cuattn gets, through DLPack and without a copy, runs on the same stream, and has its
output checked before it is timed. One that is not installed, or refuses a problem, becomes a record that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuattn.testing.backward_cases import BackwardCase
from cuattn.testing.cases import AttentionCase, SoftmaxCase

Inputs = Mapping[str, Any]
#: Takes case and inputs, returns the call to time; the call returns its output as a CuPy array.
Prepare = Callable[[Any, Inputs], Callable[[], Any]]

#: Attention libraries for torch with a function ``flash_attn_func``, by the module that has it.
WHEELS = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface"}
NAIVE_MAX_LOGITS = 2**28  # the N × M matrices of plain CuPy, several of them, in float32


class PeerError(Exception):
    """A peer cannot do this problem."""


class PeerGrads(NamedTuple):
    """What a peer computes of the gradients: tensors in the layout of q, k and v."""

    dq: Any
    dk: Any
    dv: Any


@dataclass(frozen=True, slots=True)
class Peer:
    """A function of another library to compare with."""

    name: str
    prepare: Prepare


def attention_peers() -> list[Peer]:
    """The peers of attention that can be had here."""
    backends = {
        "torch cuDNN": "CUDNN_ATTENTION",
        "torch FLASH": "FLASH_ATTENTION",
        "torch EFFICIENT": "EFFICIENT_ATTENTION",
    }
    peers = [Peer("CuPy, unfused", naive_attention)]
    if importlib.util.find_spec("torch"):
        wheels = [Peer(name, _wheel(module)) for name, module in WHEELS.items() if importlib.util.find_spec(module)]
        peers = [Peer(name, _sdpa(backend)) for name, backend in backends.items()] + wheels + peers
    return peers


def backward_peers() -> list[Peer]:
    """The peers of the backward that can be had here, with gradients by torch's autograd."""
    backends = {"torch cuDNN": "CUDNN_ATTENTION", "torch FLASH": "FLASH_ATTENTION"}
    if not importlib.util.find_spec("torch"):
        return []
    return [Peer(name, _sdpa_gradients(backend)) for name, backend in backends.items()]


def call_peers() -> list[Peer]:
    """The peers whose Python is worth timing: torch chooses its back end itself, as its users let it."""
    return [Peer("torch SDPA", _sdpa(None))] if importlib.util.find_spec("torch") else []


def softmax_peers() -> list[Peer]:
    """The peers of softmax that can be had here."""
    peers = [Peer("CuPy, unfused", naive_softmax)]
    return [Peer("torch", torch_softmax), *peers] if importlib.util.find_spec("torch") else peers


def to_torch(x: Any) -> Any:
    """A CuPy array as a torch tensor on the same memory. bfloat16 travels as int16, which every version exports."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def to_cupy(x: Any) -> Any:
    """A torch tensor as a CuPy array; bfloat16 becomes float32, which the check takes as well."""
    import cupy
    import torch

    return cupy.from_dlpack((x.float() if x.dtype == torch.bfloat16 else x).detach().contiguous())


def _sdpa(backend: str | None) -> Prepare:
    """Torch's function with one back end, or with its own choice for None."""

    def prepare(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
        import torch
        from torch.nn import attention
        from torch.nn.functional import scaled_dot_product_attention

        if case.causal and case.seqlen_q != case.num_keys:
            raise PeerError("its causal mask is aligned at the other corner")
        q, k, v = (to_torch(inputs[name]).transpose(1, 2) for name in "qkv")
        options: dict[str, Any] = {"is_causal": bool(case.causal), "scale": case.scale}
        if q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        if backend is None:
            return lambda: scaled_dot_product_attention(q, k, v, **options)
        chosen = [getattr(attention.SDPBackend, backend)]

        def call() -> Any:
            with attention.sdpa_kernel(chosen), torch.no_grad():
                return scaled_dot_product_attention(q, k, v, **options)

        return call

    return prepare


def _wheel(module: str) -> Prepare:
    """``flash_attn_func`` of an installed library; its layout is that of cuattn."""

    def prepare(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
        import torch

        function = importlib.import_module(module).flash_attn_func
        q, k, v = (to_torch(inputs[name]) for name in "qkv")

        def call() -> Any:
            with torch.no_grad():
                out = function(q, k, v, softmax_scale=case.scale, causal=bool(case.causal))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # as SDPA returns it

        return call

    return prepare


def _sdpa_gradients(backend: str) -> Prepare:
    """The gradients of torch's function with one back end: the backward alone, or forward and backward in one call."""

    def prepare(case: BackwardCase, inputs: Inputs) -> Callable[[], Any]:
        import torch
        from torch.nn import attention

        forward = case.forward
        if forward.causal and forward.seqlen_q != forward.num_keys:
            raise PeerError("its causal mask is aligned at the other corner")
        leaves = [to_torch(inputs[name]).requires_grad_() for name in "qkv"]
        dout = to_torch(inputs["dout"]).transpose(1, 2)
        options: dict[str, Any] = {"is_causal": bool(forward.causal), "scale": forward.scale}
        if leaves[0].shape[2] != leaves[1].shape[2]:
            options["enable_gqa"] = True
        chosen = [getattr(attention.SDPBackend, backend)]

        def attend() -> Any:
            with attention.sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), **options)

        saved = None if case.with_forward else attend()

        def call() -> Any:
            out = attend() if saved is None else saved
            return PeerGrads(*torch.autograd.grad(out, leaves, dout, retain_graph=saved is not None))

        return call

    return prepare


def result_of_sdpa(out: Any) -> Any:
    """The output of a back end, [B, H, N, E], as a CuPy array [B, N, H, E]."""
    return to_cupy(out.transpose(1, 2))


def naive_attention(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Attention by the formula in CuPy: two products, and the matrix of logits in memory."""
    import cupy

    if case.batch * case.num_heads * case.seqlen_q * case.num_keys > NAIVE_MAX_LOGITS:
        raise PeerError("the matrix of logits is too large to be worth it")
    q, k, v = (inputs[name] for name in "qkv")
    if q.dtype.name == "bfloat16":  # CuPy has no bfloat16 product; float16 takes as long
        q, k, v = (x.astype(np.float32).astype(np.float16) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[3]) if case.scale is None else case.scale
    group = q.shape[2] // k.shape[2]
    keys, values = (cupy.repeat(x, group, axis=2) for x in (k, v))
    hidden = ~cupy.tri(case.seqlen_q, case.num_keys, case.num_keys - case.seqlen_q, dtype=bool)

    def call() -> Any:
        logits = (q.transpose(0, 2, 1, 3) @ keys.transpose(0, 2, 3, 1)).astype(np.float32) * scale
        if case.causal:
            logits[..., hidden] = -np.inf
        p = cupy.exp(logits - logits.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return (p.astype(q.dtype) @ values.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    return call


def torch_softmax(case: SoftmaxCase, inputs: Inputs) -> Callable[[], Any]:
    """torch's function of the same name."""
    import torch

    function: Callable[..., Any] = getattr(torch, case.kind)
    x = to_torch(inputs["x"])
    return lambda: function(x, -1)


def naive_softmax(case: SoftmaxCase, inputs: Inputs) -> Callable[[], Any]:
    """Softmax by the formula in CuPy, a kernel an operation."""
    import cupy

    x = inputs["x"]
    if case.kind != "softmax" or x.dtype.name == "bfloat16":
        raise PeerError("not written")

    def call() -> Any:
        exponentials = cupy.exp(x - x.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    return call


def as_cupy(out: Any) -> Any:
    """The output of a peer's call as a CuPy array: [B, N, H, E] for attention; of gradients, three of them."""
    import cupy

    if isinstance(out, PeerGrads):
        return PeerGrads(*map(to_cupy, out))
    if isinstance(out, cupy.ndarray):
        return out
    return result_of_sdpa(out) if out.ndim == 4 else to_cupy(out)
