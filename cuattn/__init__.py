"""Attention for array programs: CUDA kernels compiled at run time, on CuPy arrays on a GPU or NumPy arrays on a CPU.

The kernels are CUDA C, compiled by NVRTC when first needed. CuPy arrays run them on the GPU; NumPy arrays run the same
kernels' PTX on the host executor. Importing this package loads none of that: every name below is imported on first use.

Examples
--------
>>> import numpy as np
>>> import cuattn
>>> q = np.ones((1, 4, 2, 32), np.float32)
>>> cuattn.attention(q, q, q).shape
(1, 4, 2, 32)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cuattn.version import __version__ as __version__

if TYPE_CHECKING:
    from cuattn import compat, compile, distributed, errors, estimate, host, reference, testing
    from cuattn.host.tensor_map import TensorMap
    from cuattn.kv.append import append_kv
    from cuattn.kv.caches.contiguous import KVCache
    from cuattn.kv.caches.paged import PagedKVCache
    from cuattn.kv.caches.streaming import StreamingKVCache
    from cuattn.kv.copy import copy_pages
    from cuattn.kv.slots import slot_mapping
    from cuattn.ops.attention.backward.dense import (
        AttentionGrads,
        attention_backward,
        attention_backward_workspace_size,
    )
    from cuattn.ops.attention.backward.varlen import attention_varlen_backward
    from cuattn.ops.attention.dense import attention
    from cuattn.ops.attention.dropout import DropoutOrigin, dropout_mask
    from cuattn.ops.attention.forward.tune import TunedRow, tune
    from cuattn.ops.attention.unfused import standard_attention
    from cuattn.ops.attention.varlen import attention_varlen
    from cuattn.ops.decode.cascade import SharedPrefix, cascade_attention
    from cuattn.ops.decode.csr import block_tables_from_csr, csr_from_block_tables
    from cuattn.ops.decode.dense import decode_attention
    from cuattn.ops.decode.paged import paged_attention, paged_attention_varlen
    from cuattn.ops.decode.plan import DecodePlan, plan_decode
    from cuattn.ops.differential.cached import differential_decode
    from cuattn.ops.differential.dense import DifferentialState, differential_attention
    from cuattn.ops.differential.gradients import DifferentialGrads, differential_attention_backward
    from cuattn.ops.differential.weights import differential_lambda, lambda_init
    from cuattn.ops.dual_chunk.backward import DualChunkGrads, dual_chunk_attention_backward
    from cuattn.ops.dual_chunk.decode import dual_chunk_decode
    from cuattn.ops.dual_chunk.dense import dual_chunk_attention
    from cuattn.ops.dual_chunk.positions import dual_chunk_logit_factor, dual_chunk_positions
    from cuattn.ops.linear.backward import LinearGrads, linear_attention_backward
    from cuattn.ops.linear.dense import linear_attention, linear_attention_summary
    from cuattn.ops.linear.state import LinearState
    from cuattn.ops.linear.varlen import linear_attention_varlen
    from cuattn.ops.merge.states import merge_states
    from cuattn.ops.padding.plan import PaddingPlan, padding_plan, remove_padding, restore_padding
    from cuattn.ops.paths import ForwardPath, forward_path
    from cuattn.ops.rotary.frequencies import rope_frequencies
    from cuattn.ops.rotary.rope import Rotary, rope
    from cuattn.ops.rotary.split_qkv import split_qkv
    from cuattn.ops.softmax.online import OnlineSoftmax
    from cuattn.ops.softmax.softmax import log_softmax, logsumexp, softmax
    from cuattn.ops.sparse.backward import block_sparse_attention_backward
    from cuattn.ops.sparse.block_mask import BlockMask
    from cuattn.ops.sparse.dense import block_sparse_attention
    from cuattn.ops.sparse.front import sparse_attention
    from cuattn.ops.sparse.patterns import (
        bigbird_mask,
        global_mask,
        local_mask,
        streaming_mask,
        strided_mask,
        vertical_slash_mask,
    )
    from cuattn.ops.sparse.strided import strided_attention, strided_attention_backward
    from cuattn.ops.sparse.varlen import block_sparse_attention_varlen, block_sparse_attention_varlen_backward
    from cuattn.runtime.tensor_map import tensor_map

__all__ = [
    "AttentionGrads",
    "BlockMask",
    "DecodePlan",
    "DifferentialGrads",
    "DifferentialState",
    "DropoutOrigin",
    "DualChunkGrads",
    "ForwardPath",
    "KVCache",
    "LinearGrads",
    "LinearState",
    "OnlineSoftmax",
    "PaddingPlan",
    "PagedKVCache",
    "Rotary",
    "SharedPrefix",
    "StreamingKVCache",
    "TensorMap",
    "TunedRow",
    "append_kv",
    "attention",
    "attention_backward",
    "attention_backward_workspace_size",
    "attention_varlen",
    "attention_varlen_backward",
    "bigbird_mask",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_varlen",
    "block_sparse_attention_varlen_backward",
    "block_tables_from_csr",
    "cascade_attention",
    "compat",
    "compile",
    "copy_pages",
    "csr_from_block_tables",
    "decode_attention",
    "differential_attention",
    "differential_attention_backward",
    "differential_decode",
    "differential_lambda",
    "distributed",
    "dropout_mask",
    "dual_chunk_attention",
    "dual_chunk_attention_backward",
    "dual_chunk_decode",
    "dual_chunk_logit_factor",
    "dual_chunk_positions",
    "errors",
    "estimate",
    "forward_path",
    "global_mask",
    "host",
    "lambda_init",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_summary",
    "linear_attention_varlen",
    "local_mask",
    "log_softmax",
    "logsumexp",
    "merge_states",
    "padding_plan",
    "paged_attention",
    "paged_attention_varlen",
    "plan_decode",
    "reference",
    "remove_padding",
    "restore_padding",
    "rope",
    "rope_frequencies",
    "slot_mapping",
    "softmax",
    "sparse_attention",
    "split_qkv",
    "standard_attention",
    "streaming_mask",
    "strided_attention",
    "strided_attention_backward",
    "strided_mask",
    "tensor_map",
    "testing",
    "tune",
    "vertical_slash_mask",
]

# The public names and the module that each of them lives in.
_HOMES = {
    "AttentionGrads": "cuattn.ops.attention.backward.dense",
    "BlockMask": "cuattn.ops.sparse.block_mask",
    "DecodePlan": "cuattn.ops.decode.plan",
    "DifferentialGrads": "cuattn.ops.differential.gradients",
    "DifferentialState": "cuattn.ops.differential.dense",
    "DropoutOrigin": "cuattn.ops.attention.dropout",
    "DualChunkGrads": "cuattn.ops.dual_chunk.backward",
    "ForwardPath": "cuattn.ops.paths",
    "KVCache": "cuattn.kv.caches.contiguous",
    "LinearGrads": "cuattn.ops.linear.backward",
    "LinearState": "cuattn.ops.linear.state",
    "OnlineSoftmax": "cuattn.ops.softmax.online",
    "PaddingPlan": "cuattn.ops.padding.plan",
    "PagedKVCache": "cuattn.kv.caches.paged",
    "Rotary": "cuattn.ops.rotary.rope",
    "SharedPrefix": "cuattn.ops.decode.cascade",
    "StreamingKVCache": "cuattn.kv.caches.streaming",
    "TensorMap": "cuattn.host.tensor_map",
    "TunedRow": "cuattn.ops.attention.forward.tune",
    "append_kv": "cuattn.kv.append",
    "attention": "cuattn.ops.attention.dense",
    "attention_backward": "cuattn.ops.attention.backward.dense",
    "attention_backward_workspace_size": "cuattn.ops.attention.backward.dense",
    "attention_varlen": "cuattn.ops.attention.varlen",
    "attention_varlen_backward": "cuattn.ops.attention.backward.varlen",
    "bigbird_mask": "cuattn.ops.sparse.patterns",
    "block_sparse_attention": "cuattn.ops.sparse.dense",
    "block_sparse_attention_backward": "cuattn.ops.sparse.backward",
    "block_sparse_attention_varlen": "cuattn.ops.sparse.varlen",
    "block_sparse_attention_varlen_backward": "cuattn.ops.sparse.varlen",
    "block_tables_from_csr": "cuattn.ops.decode.csr",
    "cascade_attention": "cuattn.ops.decode.cascade",
    "copy_pages": "cuattn.kv.copy",
    "csr_from_block_tables": "cuattn.ops.decode.csr",
    "decode_attention": "cuattn.ops.decode.dense",
    "differential_attention_backward": "cuattn.ops.differential.gradients",
    "differential_attention": "cuattn.ops.differential.dense",
    "differential_decode": "cuattn.ops.differential.cached",
    "differential_lambda": "cuattn.ops.differential.weights",
    "dropout_mask": "cuattn.ops.attention.dropout",
    "dual_chunk_attention": "cuattn.ops.dual_chunk.dense",
    "dual_chunk_attention_backward": "cuattn.ops.dual_chunk.backward",
    "dual_chunk_decode": "cuattn.ops.dual_chunk.decode",
    "dual_chunk_logit_factor": "cuattn.ops.dual_chunk.positions",
    "dual_chunk_positions": "cuattn.ops.dual_chunk.positions",
    "forward_path": "cuattn.ops.paths",
    "global_mask": "cuattn.ops.sparse.patterns",
    "lambda_init": "cuattn.ops.differential.weights",
    "linear_attention": "cuattn.ops.linear.dense",
    "linear_attention_backward": "cuattn.ops.linear.backward",
    "linear_attention_summary": "cuattn.ops.linear.dense",
    "linear_attention_varlen": "cuattn.ops.linear.varlen",
    "local_mask": "cuattn.ops.sparse.patterns",
    "log_softmax": "cuattn.ops.softmax.softmax",
    "logsumexp": "cuattn.ops.softmax.softmax",
    "merge_states": "cuattn.ops.merge.states",
    "padding_plan": "cuattn.ops.padding.plan",
    "paged_attention": "cuattn.ops.decode.paged",
    "paged_attention_varlen": "cuattn.ops.decode.paged",
    "plan_decode": "cuattn.ops.decode.plan",
    "remove_padding": "cuattn.ops.padding.plan",
    "restore_padding": "cuattn.ops.padding.plan",
    "rope": "cuattn.ops.rotary.rope",
    "rope_frequencies": "cuattn.ops.rotary.frequencies",
    "slot_mapping": "cuattn.kv.slots",
    "softmax": "cuattn.ops.softmax.softmax",
    "sparse_attention": "cuattn.ops.sparse.front",
    "split_qkv": "cuattn.ops.rotary.split_qkv",
    "standard_attention": "cuattn.ops.attention.unfused",
    "streaming_mask": "cuattn.ops.sparse.patterns",
    "strided_attention": "cuattn.ops.sparse.strided",
    "strided_attention_backward": "cuattn.ops.sparse.strided",
    "strided_mask": "cuattn.ops.sparse.patterns",
    "tensor_map": "cuattn.runtime.tensor_map",
    "tune": "cuattn.ops.attention.forward.tune",
    "vertical_slash_mask": "cuattn.ops.sparse.patterns",
}
_SUBMODULES = frozenset(
    {
        "benchmark",
        "compat",
        "compile",
        "distributed",
        "environment",
        "errors",
        "estimate",
        "host",
        "reference",
        "testing",
    }
)

if not TYPE_CHECKING:  # a checker of types takes a name that is not listed above for what it is: a mistake

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        elif name in _SUBMODULES:
            value = importlib.import_module(f"cuattn.{name}")
        else:
            raise AttributeError(f"module 'cuattn' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
