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
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuattn import compat, compile, errors, host, reference, testing
    from cuattn.attention import attention
    from cuattn.backward.dense import AttentionGrads, attention_backward, attention_backward_workspace_size
    from cuattn.backward.varlen import attention_varlen_backward
    from cuattn.caches.contiguous import KVCache
    from cuattn.caches.paged import PagedKVCache
    from cuattn.caches.streaming import StreamingKVCache
    from cuattn.decode.cascade import SharedPrefix, cascade_attention
    from cuattn.decode.csr import block_tables_from_csr, csr_from_block_tables
    from cuattn.decode.dense import decode_attention
    from cuattn.decode.paged import paged_attention, paged_attention_varlen
    from cuattn.decode.plan import DecodePlan, plan_decode
    from cuattn.dropout import dropout_mask
    from cuattn.forward_path import ForwardPath, forward_path
    from cuattn.merge import merge_states
    from cuattn.online_softmax import OnlineSoftmax
    from cuattn.padding import PaddingPlan, padding_plan, remove_padding, restore_padding
    from cuattn.paging.append import append_kv
    from cuattn.paging.copy import copy_pages
    from cuattn.paging.slots import slot_mapping
    from cuattn.rope import Rotary, rope
    from cuattn.rotary_frequencies import rope_frequencies
    from cuattn.softmax import log_softmax, logsumexp, softmax
    from cuattn.split_qkv import split_qkv
    from cuattn.standard import standard_attention
    from cuattn.tune import TunedRow, tune
    from cuattn.varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "AttentionGrads",
    "DecodePlan",
    "ForwardPath",
    "KVCache",
    "OnlineSoftmax",
    "PaddingPlan",
    "PagedKVCache",
    "Rotary",
    "SharedPrefix",
    "StreamingKVCache",
    "TunedRow",
    "append_kv",
    "attention",
    "attention_backward",
    "attention_backward_workspace_size",
    "attention_varlen",
    "attention_varlen_backward",
    "block_tables_from_csr",
    "cascade_attention",
    "compat",
    "compile",
    "copy_pages",
    "csr_from_block_tables",
    "decode_attention",
    "dropout_mask",
    "errors",
    "forward_path",
    "host",
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
    "split_qkv",
    "standard_attention",
    "testing",
    "tune",
]

# The public functions and the module each lives in.
_FUNCTIONS = {
    "AttentionGrads": "cuattn.backward.dense",
    "DecodePlan": "cuattn.decode.plan",
    "ForwardPath": "cuattn.forward_path",
    "KVCache": "cuattn.caches.contiguous",
    "OnlineSoftmax": "cuattn.online_softmax",
    "PaddingPlan": "cuattn.padding",
    "PagedKVCache": "cuattn.caches.paged",
    "Rotary": "cuattn.rope",
    "SharedPrefix": "cuattn.decode.cascade",
    "StreamingKVCache": "cuattn.caches.streaming",
    "TunedRow": "cuattn.tune",
    "append_kv": "cuattn.paging.append",
    "attention": "cuattn.attention",
    "attention_backward": "cuattn.backward.dense",
    "attention_backward_workspace_size": "cuattn.backward.dense",
    "attention_varlen": "cuattn.varlen",
    "attention_varlen_backward": "cuattn.backward.varlen",
    "block_tables_from_csr": "cuattn.decode.csr",
    "cascade_attention": "cuattn.decode.cascade",
    "copy_pages": "cuattn.paging.copy",
    "csr_from_block_tables": "cuattn.decode.csr",
    "decode_attention": "cuattn.decode.dense",
    "dropout_mask": "cuattn.dropout",
    "forward_path": "cuattn.forward_path",
    "log_softmax": "cuattn.softmax",
    "logsumexp": "cuattn.softmax",
    "merge_states": "cuattn.merge",
    "padding_plan": "cuattn.padding",
    "paged_attention": "cuattn.decode.paged",
    "paged_attention_varlen": "cuattn.decode.paged",
    "plan_decode": "cuattn.decode.plan",
    "remove_padding": "cuattn.padding",
    "restore_padding": "cuattn.padding",
    "rope": "cuattn.rope",
    "rope_frequencies": "cuattn.rotary_frequencies",
    "slot_mapping": "cuattn.paging.slots",
    "softmax": "cuattn.softmax",
    "split_qkv": "cuattn.split_qkv",
    "standard_attention": "cuattn.standard",
    "tune": "cuattn.tune",
}
_SUBMODULES = frozenset({"benchmark", "compat", "compile", "environment", "errors", "host", "reference", "testing"})


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"cuattn.{name}")
    else:
        raise AttributeError(f"module 'cuattn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``cuattn.attention`` the function.

    The import system binds every submodule to its package under its own name, so ``import cuattn.attention`` anywhere
    would put the module where the function of the same name belongs.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
