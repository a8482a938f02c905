"""The functions of the flash-attn package, version 2, for arrays: same names, argument order and defaults.

What each argument means is said once, at `flash_attn_func`. Different from the package:

* Arrays are NumPy, CuPy or DLPack arrays, of any dtype and head dim that `cuattn.attention` takes.
* Dropout needs ``dropout_seed=``; the package draws a seed from PyTorch's global generator.
* The third of the results with ``return_attn_probs`` is always None: nothing here stores the probabilities. Use
  ``cuattn.standard_attention(..., return_probabilities=True)`` to see them, and `cuattn.dropout_mask` for the pattern.
* lse holds the logits as documented, ALiBi included: also when the mask is causal.
* Gradients are functions of their own, ``..._backward``: dout, the arrays of the forward call, out and softmax_lse,
  then the rest of the forward call. The package has them inside of PyTorch's automatic differentiation.
* ``block_table`` takes pages of every size.

References
----------
Tri Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from cuattn.compat.flash_attn.backward_dense import (
    flash_attn_func_backward,
    flash_attn_kvpacked_func_backward,
    flash_attn_qkvpacked_func_backward,
)
from cuattn.compat.flash_attn.backward_packed import (
    flash_attn_varlen_func_backward,
    flash_attn_varlen_kvpacked_func_backward,
    flash_attn_varlen_qkvpacked_func_backward,
)
from cuattn.compat.flash_attn.dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from cuattn.compat.flash_attn.kvcache import flash_attn_with_kvcache
from cuattn.compat.flash_attn.packed import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_func_backward",
    "flash_attn_kvpacked_func",
    "flash_attn_kvpacked_func_backward",
    "flash_attn_qkvpacked_func",
    "flash_attn_qkvpacked_func_backward",
    "flash_attn_varlen_func",
    "flash_attn_varlen_func_backward",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_kvpacked_func_backward",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_qkvpacked_func_backward",
    "flash_attn_with_kvcache",
]
