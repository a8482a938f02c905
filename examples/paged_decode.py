"""Decode a token of two sequences whose keys and values lie in pages. `cuattn.PagedKVCache` keeps the books for you."""

import numpy as np

import cuattn

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 64
rng = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)


# Ten pages for everybody. Each sequence has a row of page numbers, in any order; what follows its last one is not read.
k_pages = np.zeros((10, PAGE_SIZE, KV_HEADS, HEAD_DIM), np.float16)
v_pages = np.zeros_like(k_pages)
block_tables = np.array([[7, 2, 5], [0, -1, -1]], np.int32)
rope = cuattn.Rotary(base=10000.0)

# Prompts of 40 and 9 tokens, one behind the other: each token has a slot, page * PAGE_SIZE + its place in the page.
prompts = [40, 9]
slots = cuattn.slot_mapping(block_tables, lengths=[0, 0], counts=prompts, page_size=PAGE_SIZE)
positions = np.concatenate([np.arange(n) for n in prompts])
k, v = drawn(49, KV_HEADS, HEAD_DIM), drawn(49, KV_HEADS, HEAD_DIM)
cuattn.append_kv(k, v, k_pages, v_pages, slots, positions=positions, rope=rope)  # keys are turned on their way

# How the work is cut up depends on the lengths alone: plan it once for a token, and use the plan in every layer.
lengths = [n + 1 for n in prompts]
plan = cuattn.plan_decode(lengths, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=np.float16)

# The next token of each sequence: first its own key and value, then its queries over all that is cached.
slots = cuattn.slot_mapping(block_tables, lengths=prompts, counts=1, page_size=PAGE_SIZE)
new_k, new_v = drawn(2, KV_HEADS, HEAD_DIM), drawn(2, KV_HEADS, HEAD_DIM)
cuattn.append_kv(new_k, new_v, k_pages, v_pages, slots, positions=prompts, rope=rope)
q = drawn(2, 1, HEADS, HEAD_DIM)  # [batch, new tokens, heads, head_dim], not turned yet
out = cuattn.paged_attention(q, k_pages, v_pages, block_tables, lengths, rope=rope, plan=plan)

# The same for the first sequence, without pages and without a plan.
keys = cuattn.rope(np.concatenate([k[:40], new_k[:1]]), np.arange(41))
expected = cuattn.attention(cuattn.rope(q[:1], [40]), keys[None], np.concatenate([v[:40], new_v[:1]])[None])
print(out.shape, out.dtype, f"{plan.num_ctas} CTAs", "largest difference", np.abs(out[:1] - expected).max())
