"""What a GPU user would otherwise call for linear attention: flash-linear-attention.

torch's flex_attention has a softmax around whatever program it is given, so that it computes none of these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cuattn.benchmark.peer import Inputs, PeerError, PeerGrads, to_torch
from cuattn.testing.linear_cases import LinearCase

__all__ = ["fla"]

#: The functions of flash-linear-attention, by kind of decay.
FUNCTIONS = {
    None: ("fla.ops.linear_attn", "chunk_linear_attn"),
    "token": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "channel": ("fla.ops.gla", "chunk_gla"),
}


def fla(case: LinearCase, inputs: Inputs) -> Callable[[], Any]:
    """Take the function for the kind of decay; its layout is that of cuattn, its gradients are torch's autograd."""
    import torch

    if case.normalize or case.feature_map is not None:
        raise PeerError("its normalisation is another")
    if len({case.shapes[name][2] for name in "qkv"}) > 1:
        raise PeerError("it has one number of heads")
    scale = case.head_dim**-0.5
    leaves = [to_torch(inputs[name]).requires_grad_(case.backward) for name in "qkv"]
    decay = None if case.decay is None else to_torch(inputs["decay"]).requires_grad_(case.backward)
    module, name = FUNCTIONS[case.decay]
    function = getattr(importlib.import_module(module), name)
    keywords: dict[str, Any] = {"normalize": False} if decay is None else {"g": decay}

    def forward() -> Any:
        out = function(*leaves, scale=scale, **keywords)
        return out[0] if isinstance(out, tuple) else out

    if not case.backward:

        def call() -> Any:
            with torch.no_grad():
                return forward().transpose(1, 2)  # as SDPA returns it

        return call
    out, dout = forward(), to_torch(inputs["dout"])
    wanted = [*leaves, *([] if decay is None else [decay])]
    return lambda: PeerGrads(*torch.autograd.grad(out, wanted, dout, retain_graph=True)[:3])
