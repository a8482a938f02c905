"""Attention libraries for torch: flash-attn 2, 3 and 4, xformers, FlashInfer, and the front end of cuDNN."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cuattn.benchmark.peer import Inputs, PeerError, Prepare, require_aligned_causal, to_torch
from cuattn.testing.cases import AttentionCase

__all__ = ["cudnn", "flash_attn", "flashinfer", "xformers"]


def flash_attn(module: str) -> Prepare:
    """Make the peer of ``flash_attn_func`` of an installed module; its layout is that of cuattn."""

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


def xformers(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare memory_efficient_attention; grouped heads are a fifth axis of it."""
    import torch

    ops = importlib.import_module("xformers.ops")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    q, k, v = (to_torch(inputs[name]) for name in "qkv")
    groups, each = k.shape[2], q.shape[2] // k.shape[2]
    if each > 1:
        q = q.unflatten(2, (groups, each))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, each, -1) for x in (k, v))
    mask = biases.LowerTriangularFromBottomRightMask() if case.causal else None

    def call() -> Any:
        with torch.no_grad():
            out = ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=case.scale)
        return (out.flatten(2, 3) if each > 1 else out).transpose(1, 2)

    return call


def flashinfer(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare FlashInfer's prefill of ragged sequences; its plan is not part of the call."""
    import torch

    library = importlib.import_module("flashinfer")
    q, k, v = (to_torch(inputs[name]) for name in "qkv")
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = [
        torch.arange(case.batch + 1, dtype=torch.int32, device=q.device) * length
        for length in (case.seqlen_q, case.num_keys)
    ]
    heads = q.shape[2], k.shape[2]
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    wrapper.plan(*starts, *heads, case.head_dim, v.shape[3], causal=bool(case.causal), sm_scale=case.scale, **types)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    return lambda: wrapper.run(*flat).view(case.batch, case.seqlen_q, heads[0], -1).transpose(1, 2)


def cudnn(case: AttentionCase, inputs: Inputs) -> Callable[[], Any]:
    """Prepare a graph of cuDNN's front end with one node; building it is not part of the call."""
    import torch

    library = importlib.import_module("cudnn")
    require_aligned_causal(case)
    q, k, v = (to_torch(inputs[name]).transpose(1, 2) for name in "qkv")
    types = {torch.float16: library.data_type.HALF, torch.bfloat16: library.data_type.BFLOAT16}
    if q.dtype not in types:
        raise PeerError("it has 16-bit floats only")
    handle = library.create_handle()
    library.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    wide = library.data_type.FLOAT
    graph = library.pygraph(
        io_data_type=types[q.dtype], intermediate_data_type=wide, compute_data_type=wide, handle=handle
    )
    nodes = [graph.tensor_like(x) for x in (q, k, v)]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    options = {"is_inference": True, "attn_scale": scale, "use_causal_mask": bool(case.causal)}
    result, _ = graph.sdpa(name="sdpa", q=nodes[0], k=nodes[1], v=nodes[2], **options)
    batch, length, heads, head_dim = case.batch, case.seqlen_q, case.num_heads, v.shape[3]
    out = torch.empty(batch, length, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([library.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    arrays = {**dict(zip(nodes, (q, k, v), strict=True)), result: out}

    def call() -> Any:
        graph.execute(arrays, workspace, handle=handle)
        return out

    return call
