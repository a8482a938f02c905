"""Attention and softmax of torch: SDPA with one back end, its gradients by autograd, compiled flex_attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cuattn.benchmark.peer import (
    Inputs,
    PeerError,
    PeerGrads,
    Prepare,
    require_aligned_causal,
    require_few_logits,
    to_torch,
)
from cuattn.testing.backward_cases import BackwardCase
from cuattn.testing.cases import AttentionCase, SoftmaxCase

__all__ = ["flex", "sdpa", "sdpa_gradients", "softmax"]


def sdpa(backend: str | None) -> Prepare:
    """Make the peer of torch's function with one back end, or with its own choice for None."""

    def prepare(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
        import torch
        from torch.nn import attention
        from torch.nn.functional import scaled_dot_product_attention

        require_aligned_causal(case)
        if backend == "MATH":
            require_few_logits(case)
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


def sdpa_gradients(backend: str) -> Prepare:
    """Make the peer of the gradients with one back end: the backward alone, or forward and backward in one call."""

    def prepare(case: BackwardCase, inputs: Inputs) -> Callable[[], Any]:
        import torch
        from torch.nn import attention

        forward = case.forward
        require_aligned_causal(forward)
        if backend == "MATH":
            require_few_logits(forward)
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


def flex(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare torch's compiled flex_attention, with a block mask for a causal one."""
    import torch

    module = importlib.import_module("torch.nn.attention.flex_attention")
    q, k, v = (to_torch(inputs[name]).transpose(1, 2) for name in "qkv")
    if q.device.type != "cuda":
        raise PeerError("it is compiled for a GPU")
    offset = 0 if case.causal == "top_left" else case.num_keys - case.seqlen_q
    mask = None
    if case.causal:
        mask = module.create_block_mask(lambda b, h, i, j: j <= i + offset, None, None, case.seqlen_q, case.num_keys)
    compiled = torch.compile(module.flex_attention, dynamic=False)
    grouped = q.shape[1] != k.shape[1]

    def call() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=grouped)

    return call


def softmax(case: SoftmaxCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare torch's function of the same name."""
    import torch

    function: Callable[..., Any] = getattr(torch, case.kind)
    x = to_torch(inputs["x"])
    return lambda: function(x, -1)
