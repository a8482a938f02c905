"""What the kernels must compute, written from the formulas.

Every function here is plain NumPy in float64: no tiles, no running maximum, no scaled exponent, nothing that a kernel
might also do and get wrong in the same way. It is slow and stores the whole ``[batch, heads, seqlen_q, seqlen_k]``
matrix; its only purpose is to be read and believed. ``dtype=numpy.longdouble`` gives the oracle for float64 kernels.

Letters: B batch, N query length, M key length, H query heads, G key/value heads, D head dim, E value head dim.
Arrays are ``[B, N, H, D]``; query head ``h`` reads key/value head ``h // (H // G)``.

>>> import numpy as np
>>> q = np.zeros((1, 2, 1, 4)); k = np.zeros((1, 2, 1, 4)); v = np.arange(2.0).reshape(1, 2, 1, 1)
>>> out, lse = attention(q, k, v, causal=True)
>>> out.ravel().tolist(), lse.ravel().round(4).tolist()
([0.0, 0.5], [0.0, 0.6931])
"""

from __future__ import annotations

from cuattn.reference.attention import attention, attention_naive, probabilities
from cuattn.reference.backward import (
    Gradients,
    attention_backward,
    attention_backward_naive,
    attention_varlen_backward,
)
from cuattn.reference.decode import decode_attention, gather_pages, paged_attention, paged_attention_varlen
from cuattn.reference.differential import (
    DifferentialGradients,
    DifferentialResult,
    Stream,
    differential_attention,
    differential_attention_backward,
    differential_combine,
    differential_lambda,
    differential_streams,
    lambda_init,
)
from cuattn.reference.dual_chunk import (
    dual_chunk_attention,
    dual_chunk_attention_backward,
    dual_chunk_attention_varlen,
    dual_chunk_logit_factor,
    dual_chunk_positions,
)
from cuattn.reference.kv_formats import Quantized, dequantize, encode, quantize
from cuattn.reference.linear import (
    LinearGradients,
    LinearState,
    linear_attention,
    linear_attention_backward,
    linear_attention_summary,
    linear_attention_varlen,
)
from cuattn.reference.logits import logits
from cuattn.reference.merge import merge_states
from cuattn.reference.narrow import round_to_tf32
from cuattn.reference.online_softmax import OnlineSoftmax
from cuattn.reference.padding import padding_plan, remove_padding, restore_padding
from cuattn.reference.rotary import rope, rotary_angles, split_qkv
from cuattn.reference.softmax import log_softmax, logsumexp, softmax
from cuattn.reference.sparse import (
    bigbird_mask,
    block_sparse_attention,
    block_sparse_attention_backward,
    expand_blocks,
    global_mask,
    local_mask,
    streaming_mask,
    strided_attention,
    strided_attention_backward,
    strided_mask,
    strided_visible,
    vertical_slash_mask,
)
from cuattn.reference.varlen import attention_varlen
from cuattn.reference.visibility import diagonal, visible

__all__ = [
    "DifferentialGradients",
    "DifferentialResult",
    "Gradients",
    "LinearGradients",
    "LinearState",
    "OnlineSoftmax",
    "Quantized",
    "Stream",
    "attention",
    "attention_backward",
    "attention_backward_naive",
    "attention_naive",
    "attention_varlen",
    "attention_varlen_backward",
    "bigbird_mask",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "decode_attention",
    "dequantize",
    "diagonal",
    "differential_attention",
    "differential_attention_backward",
    "differential_combine",
    "differential_lambda",
    "differential_streams",
    "dual_chunk_attention",
    "dual_chunk_attention_backward",
    "dual_chunk_attention_varlen",
    "dual_chunk_logit_factor",
    "dual_chunk_positions",
    "encode",
    "expand_blocks",
    "gather_pages",
    "global_mask",
    "lambda_init",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_summary",
    "linear_attention_varlen",
    "local_mask",
    "log_softmax",
    "logits",
    "logsumexp",
    "merge_states",
    "padding_plan",
    "paged_attention",
    "paged_attention_varlen",
    "probabilities",
    "quantize",
    "remove_padding",
    "restore_padding",
    "rope",
    "rotary_angles",
    "round_to_tf32",
    "softmax",
    "split_qkv",
    "streaming_mask",
    "strided_attention",
    "strided_attention_backward",
    "strided_mask",
    "strided_visible",
    "vertical_slash_mask",
    "visible",
]
