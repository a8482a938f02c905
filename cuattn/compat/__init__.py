"""The names and argument orders of other libraries, for arrays: thin layers over `cuattn.attention`.

* `cuattn.compat.scaled_dot_product_attention`: PyTorch's function of that name;
* `cuattn.compat.flash_attn`: the functions of the flash-attn package, version 2, with bert_padding and layers.rotary;
* `cuattn.compat.flash_attn_interface`: those of version 3, whose module has that name.

Neither library is imported or needed. Gradients are functions of their own, ``flash_attn.flash_attn_func_backward`` and
the like. Dropout takes an explicit seed: array programs have no global random state that a call could draw one from.

Examples
--------
>>> import numpy as np
>>> from cuattn.compat import scaled_dot_product_attention
>>> query = np.zeros((1, 2, 4, 32), np.float32)
>>> scaled_dot_product_attention(query, query, query, is_causal=True).shape
(1, 2, 4, 32)
"""

from __future__ import annotations

from cuattn.compat import flash_attn, flash_attn_interface
from cuattn.compat.sdpa import scaled_dot_product_attention

__all__ = ["flash_attn", "flash_attn_interface", "scaled_dot_product_attention"]
