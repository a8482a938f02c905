"""The first call: with NumPy arrays the kernel's PTX runs on the host executor, with CuPy arrays it runs on the GPU."""

import numpy as np

import cuattn

rng = np.random.default_rng(0)
q = rng.standard_normal((1, 256, 8, 64), dtype=np.float32).astype(np.float16)  # [batch, seqlen, heads, head_dim]
k = rng.standard_normal((1, 256, 2, 64), dtype=np.float32).astype(np.float16)  # 8 query heads share 2 key heads
v = rng.standard_normal((1, 256, 2, 64), dtype=np.float32).astype(np.float16)

out, lse = cuattn.attention(q, k, v, causal=True, return_lse=True)
print(out.shape, out.dtype, lse.shape, lse.dtype)
