"""The functions of flash-attn 3, whose module has this name, for arrays: same names, argument order and defaults.

What each argument means is said once, at `flash_attn_func`. Different from the package:

* Arrays are NumPy, CuPy or DLPack arrays, of any dtype and head dim that `cuattn.attention` takes.
* ``num_splits`` (outside of `flash_attn_with_kvcache`), ``pack_gqa``, ``sm_margin`` and ``scheduler_metadata`` change
  nothing: how the work is divided is chosen here.
* ``qv`` raises `NotSupportedError`.
* ``learnable_sink`` is an argument of flash-attn 4; ``fp8_format`` is one of ours. Both are given by name.
* Gradients are functions of their own, ``..._backward``.

References
----------
Jay Shah, Ganesh Bikshandi, Ying Zhang, Vijay Thakkar, Pradeep Ramani and Tri Dao, "FlashAttention-3: fast and accurate
attention with asynchrony and low-precision", 2024 (arXiv:2407.08608).
"""

from __future__ import annotations

from cuattn.compat.flash_attn_interface.backward import flash_attn_func_backward, flash_attn_varlen_func_backward
from cuattn.compat.flash_attn_interface.combine import flash_attn_combine
from cuattn.compat.flash_attn_interface.dense import flash_attn_func, flash_attn_qkvpacked_func
from cuattn.compat.flash_attn_interface.kvcache import flash_attn_with_kvcache
from cuattn.compat.flash_attn_interface.packed import flash_attn_varlen_func

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_func_backward",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_func_backward",
    "flash_attn_with_kvcache",
]
