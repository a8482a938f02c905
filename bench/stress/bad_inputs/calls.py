"""A small valid call of every public function and method: what `bad_inputs` replaces arguments of.

A target is made anew for each case, with the same numbers: calls may write to their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call
from cuattn import host

__all__ = ["OWN_TARGETS", "heads", "normal", "packed"]

B, N, M, H, G, D, E = 2, 5, 7, 4, 2, 32, 16
CU_Q, CU_K = np.array([0, 2, 10], np.int32), np.array([0, 9, 14], np.int32)
TABLES, SEQLENS_K = np.array([[5, 1], [5, -1], [-1, 99]], np.int32), np.array([7, 4, 0], np.int32)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def heads(dtype: Any = np.float32) -> dict[str, Any]:
    return {
        "q": normal(B, N, H, D, dtype=dtype),
        "k": normal(B, M, G, D, dtype=dtype),
        "v": normal(B, M, G, E, dtype=dtype),
    }


def packed() -> dict[str, Any]:
    given = {"q": normal(10, H, D), "k": normal(14, G, D), "v": normal(14, G, E)}
    return given | {"cu_seqlens_q": CU_Q.copy(), "cu_seqlens_k": CU_K.copy()}


SCORES = {"scale": 0.3, "causal": True, "window": (3, 0), "chunk": 4, "softcap": 2.0, "return_lse": True}
SLOPES = {"alibi_slopes": np.array([0.5, 1.0, 2.0, 4.0], np.float32), "sinks": np.zeros(H, np.float32)}
DROPOUT = {"dropout_p": 0.25, "dropout_seed": 5, "dropout_offset": 1, "dropout_origin": (1, 0, 5, 16)}
MASKS = {"bias": normal(N, M), "mask": np.tri(N, M, 2, dtype=bool), "diagonal_offset": 1}
DENSE = SCORES | SLOPES | DROPOUT | MASKS | {"out": np.zeros((B, N, H, E), np.float32), "precision": "ieee"}
OF_PATHS = {name: x for name, x in DENSE.items() if name != "return_lse"}
LONGEST = {"max_seqlen_q": 9, "max_seqlen_k": 9}
PACKED = SCORES | SLOPES | DROPOUT | {"out": np.zeros((10, H, E), np.float32)} | LONGEST


def attention() -> Call:
    return Call(cuattn.attention, heads(), DENSE)


def attention_fp8() -> Call:
    given = {name: x.astype(ml_dtypes.float8_e4m3fn) for name, x in heads().items()}
    scales = {f"{name}_descale": np.full((B, G), 0.5, np.float32) for name in "qkv"}
    return Call(cuattn.attention, {**given, **scales}, {"precision": "fp8", "fp8_format": "e4m3fn"})


def standard_attention() -> Call:
    return Call(cuattn.standard_attention, heads(), DENSE | {"return_probabilities": True})


def attention_varlen() -> Call:
    return Call(cuattn.attention_varlen, packed(), PACKED)


def forward_path() -> Call:
    return Call(cuattn.forward_path, heads(), {"arch": "sm_90a"} | OF_PATHS)


def tune() -> Call:
    return Call(cuattn.tune, heads(), OF_PATHS)


def gradients(given: dict[str, Any], out_shape: tuple[int, ...], lse_shape: tuple[int, ...]) -> dict[str, Any]:
    saved = {"dout": normal(*out_shape, seed=1), "out": normal(*out_shape), "lse": np.full(lse_shape, 3.0, np.float32)}
    return given | saved


BACKWARD = {name: x for name, x in (SCORES | SLOPES | DROPOUT).items() if name != "return_lse"}
BACKWARD |= {"deterministic": False, "workspace": np.zeros(2**16, np.uint8)[: -(2**15)]}


def attention_backward() -> Call:
    given = gradients(heads(), (B, N, H, E), (B, H, N))
    results = {"dq": np.zeros((B, N, H, D), np.float32), "dlse": np.zeros((B, H, N), np.float32)}
    return Call(cuattn.attention_backward, given, BACKWARD | MASKS | results)


def attention_varlen_backward() -> Call:
    given = gradients(packed(), (10, H, E), (H, 10))
    return Call(cuattn.attention_varlen_backward, given, BACKWARD | LONGEST | {"dk": np.zeros((14, G, D), np.float32)})


def attention_backward_workspace_size() -> Call:
    options = {name: x for name, x in BACKWARD.items() if name != "workspace"}
    return Call(cuattn.attention_backward_workspace_size, heads(), options | MASKS)


CACHED = SCORES | SLOPES | {"num_splits": 2, "workspace": np.zeros(2**16, np.uint8), "rope": cuattn.Rotary()}


def decode_attention() -> Call:
    caches = {"k_cache": normal(3, 8, G, D), "v_cache": normal(3, 8, G, E), "seqlens_k": SEQLENS_K.copy()}
    options = CACHED | {"rotate_keys": True, "out": np.zeros((3, 2, H, E), np.float32)}
    return Call(cuattn.decode_attention, {"q": normal(3, 2, H, D), **caches}, options)


def decode_attention_int8() -> Call:
    codes = np.arange(3 * 8 * G * D, dtype=np.int32).reshape(3, 8, G, D).astype(np.int8)
    given = {"q": normal(3, 2, H, D), "k_cache": codes, "v_cache": codes.copy(), "seqlens_k": SEQLENS_K.copy()}
    scales = {"k_scale": 0.5, "v_scale": np.array([0.5, 0.25], np.float32)}
    return Call(cuattn.decode_attention, {**given, **scales}, {"kv_format": "int8"})


def pages() -> dict[str, Any]:
    given = {"k_pages": normal(6, 4, G, D), "v_pages": normal(6, 4, G, E)}
    return given | {"block_tables": TABLES.copy(), "seqlens_k": SEQLENS_K.copy()}


def paged_attention() -> Call:
    return Call(cuattn.paged_attention, {"q": normal(3, 2, H, D), **pages()}, CACHED)


def paged_attention_varlen() -> Call:
    given = {"q": normal(6, H, D), **pages(), "cu_seqlens_q": np.array([0, 2, 4, 6], np.int32)}
    return Call(cuattn.paged_attention_varlen, given, CACHED | {"max_seqlen_q": 2})


def cascade_attention() -> Call:
    given = {"q": normal(3, 2, H, D), **pages(), "prefixes": cuattn.SharedPrefix([2], 4)}
    given["seqlens_k"] = np.array([7, 4, 2], np.int32)
    given["block_tables"] = np.array([[5, 1], [5, -1], [3, 99]], np.int32)
    return Call(cuattn.cascade_attention, given, {"scale": 0.3, "causal": False, "softcap": 2.0, "return_lse": True})


def shared_prefix() -> Call:
    own = cascade_attention().given

    def call(block_table: Any, seqlen: Any, group_starts: Any = None) -> Any:
        own["prefixes"] = cuattn.SharedPrefix(block_table, seqlen, group_starts)
        return cuattn.cascade_attention(**own)

    given = {"block_table": np.array([[2], [0]], np.int32), "seqlen": np.array([4, 3], np.int32)}
    return Call(call, given | {"group_starts": np.array([0, 1, 3])})


def plan_decode() -> Call:
    given = {"seqlens_k": [100, 600], "num_heads": H, "num_kv_heads": G, "head_dim": D, "dtype": np.float32}
    options = {"head_dim_v": E, "kv_format": "int8", "batch": 2, "seqlen_q": 2, "max_seqlen_k": 700}
    options |= {"cu_seqlens_q": [0, 1, 3], "num_splits": 2, "fixed_grid": True, "num_sms": 10, "array_module": np}
    return Call(cuattn.plan_decode, given, options | {"causal": False, "window": (3, 3)})


def planned_attention() -> Call:
    call = decode_attention()
    plan = cuattn.plan_decode(
        [7, 4, 0], seqlen_q=2, num_heads=H, num_kv_heads=G, head_dim=D, head_dim_v=E, dtype=np.float32
    )
    return Call(cuattn.decode_attention, {**call.given, "plan": plan}, {"workspace": np.zeros(2**16, np.uint8)})


def block_tables_from_csr() -> Call:
    given = {"indptr": [0, 2, 3], "indices": [7, 4, 5], "last_page_len": [3, 16], "page_size": 16}
    return Call(cuattn.block_tables_from_csr, {**given, "indices": np.array([7, 4, 5], np.int32)})


def csr_from_block_tables() -> Call:
    given = {"block_tables": np.array([[7, 4], [5, -1]]), "seqlens_k": np.array([19, 16]), "page_size": 16}
    return Call(cuattn.csr_from_block_tables, given)


def append_kv() -> Call:
    given = {"k": normal(3, G, D), "v": normal(3, G, E), "k_pages": np.zeros((6, 4, G, D), np.float32)}
    given |= {"v_pages": np.zeros((6, 4, G, E), np.float32), "slot_mapping": np.array([3, 9, -1], np.int64)}
    return Call(cuattn.append_kv, given | {"rope": cuattn.Rotary(), "positions": np.array([3, 1, 0])})


def append_kv_int8() -> Call:
    given = append_kv().given
    del given["rope"], given["positions"]
    given |= {"k_pages": np.zeros((6, 4, G, D), np.int8), "v_pages": np.zeros((6, 4, G, E), np.int8)}
    scales = {"k_scale": 0.5, "v_scale": np.zeros((6, 4, G), np.float32), "kv_format": "int8"}
    return Call(cuattn.append_kv, given | scales)


def append_kv_fp4() -> Call:
    given = append_kv().given
    del given["rope"], given["positions"]
    given |= {"k_pages": np.zeros((6, 4, G, D // 2), np.uint8), "v_pages": np.zeros((6, 4, G, E // 2), np.uint8)}
    blocks = {f"{side}_block_scales": np.zeros((6, 4, G, n), np.uint8) for side, n in (("k", 2), ("v", 1))}
    return Call(cuattn.append_kv, given | blocks | {"kv_format": "nvfp4"}, {"k_scale": 0.5})


def copy_pages() -> Call:
    given = {"pages": np.arange(24, dtype=np.int32).reshape(4, 6), "src": [3, 3], "dst": np.array([0, 1])}
    return Call(cuattn.copy_pages, given, {"axis": 0})


def slot_mapping() -> Call:
    given = {"block_tables": np.array([[7, 2], [5, -1]], np.int32), "lengths": np.array([7, 4]), "counts": [2, 1]}
    return Call(cuattn.slot_mapping, given | {"page_size": 8})


def softmax() -> Call:
    return Call(
        cuattn.softmax, {"x": normal(3, 6)}, {"axis": 1, "algorithm": "safe", "out": np.zeros((3, 6), np.float32)}
    )


def log_softmax() -> Call:
    return softmax()._replace(function=cuattn.log_softmax)


def logsumexp() -> Call:
    options = {"axis": 1, "algorithm": "naive", "keepdims": True, "out": np.zeros(3, np.float32)}
    return Call(cuattn.logsumexp, {"x": normal(3, 6)}, options)


def online_softmax() -> Call:
    return Call(cuattn.OnlineSoftmax, {"shape": (2, 3), "dtype": np.float32}, {"array_module": np})


def _state() -> Any:
    state = cuattn.OnlineSoftmax((2, 3), np.float32)
    state.update(normal(2, 3, 4))
    return state


def online_softmax_update() -> Call:
    return Call(_state().update, {"x": normal(2, 3, 5)})


def online_softmax_merge() -> Call:
    return Call(_state().merge, {"other": _state()})


def online_softmax_probabilities() -> Call:
    return Call(_state().probabilities, {"x": normal(2, 3, 5)})


def merge_states() -> Call:
    def call(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, sinks: Any = None, out: Any = None) -> Any:
        return cuattn.merge_states(out_a, lse_a, out_b, lse_b, sinks=sinks, out=out)

    outs, lses = (normal(B, N, H, E, seed=i) for i in (0, 1)), (normal(B, H, N, seed=i) for i in (0, 1))
    given = dict(zip(("out_a", "out_b", "lse_a", "lse_b"), (*outs, *lses), strict=True))
    results = (np.zeros((B, N, H, E), np.float32), np.zeros((B, H, N), np.float32))
    return Call(call, given, {"sinks": np.zeros(H, np.float32), "out": results})


def merge_stacked_states() -> Call:
    def call(outs: Any, lses: Any, sinks: Any = None) -> Any:
        return cuattn.merge_states(outs, lses, sinks=sinks)

    return Call(call, {"outs": normal(3, N, H, E), "lses": normal(3, H, N)}, {"sinks": np.zeros(H, np.float32)})


MASK = np.array([[1, 1, 0, 1], [0, 0, 1, 1]], bool)


def padding_plan() -> Call:
    return Call(cuattn.padding_plan, {"mask": MASK.copy()}, {"num_tokens": 5, "max_seqlen": 3, "array_module": np})


def remove_padding() -> Call:
    given = {"x": normal(2, 4, 3), "plan": cuattn.padding_plan(MASK)}
    return Call(cuattn.remove_padding, given, {"out": np.zeros((5, 3), np.float32)})


def restore_padding() -> Call:
    given = {"x": normal(5, 3), "plan": cuattn.padding_plan(MASK)}
    return Call(cuattn.restore_padding, given, {"out": np.zeros((2, 4, 3), np.float32)})


def made_plan() -> Call:
    plan, x = cuattn.padding_plan(MASK), normal(2, 4, 3)

    def call(**fields: Any) -> Any:
        return cuattn.remove_padding(x, cuattn.PaddingPlan(**fields))

    names = ("indices", "padding", "cu_seqlens", "max_seqlen", "num_tokens", "batch", "seqlen")
    return Call(call, {name: getattr(plan, name) for name in names})


def rope() -> Call:
    options = {"base": 500.0, "interleaved": True, "rotary_dim": 16, "inverse": True}
    return Call(cuattn.rope, {"x": normal(B, N, H, D), "positions": np.arange(N)}, options)


def rope_tables() -> Call:
    cos, sin = cuattn.rope_frequencies(D, 8)
    given = {"x": normal(B, N, H, D), "positions": [4, 3, 2, 1, 0], "cos": cos, "sin": sin}
    return Call(cuattn.rope, given, {"out": np.zeros((B, N, H, D), np.float32)})


def rotary() -> Call:
    call = decode_attention().given

    def decode(
        base: Any = 10000.0, interleaved: Any = False, rotary_dim: Any = None, cos: Any = None, sin: Any = None
    ) -> Any:
        return cuattn.decode_attention(**call, rope=cuattn.Rotary(base, interleaved, rotary_dim, cos, sin))

    cos, sin = cuattn.rope_frequencies(D, 8)
    return Call(decode, {}, {"base": 500.0, "interleaved": True, "rotary_dim": 16, "cos": cos, "sin": sin})


def rope_frequencies() -> Call:
    options = {"base": 500.0, "scaling": "yarn", "factor": 2.0, "original_max_position": 4, "truncate": False}
    return Call(cuattn.rope_frequencies, {"rotary_dim": 16, "max_seqlen": 8}, options | {"array_module": np})


def rope_frequencies_yarn() -> Call:
    given = {"rotary_dim": 16, "max_seqlen": 8, "scaling": "yarn", "factor": 4.0, "original_max_position": 4}
    return Call(cuattn.rope_frequencies, given, {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "truncate": True})


def split_qkv() -> Call:
    given = {"qkv": normal(5, (H + 2 * G) * D), "bias": normal((H + 2 * G) * D), "num_heads": H, "num_kv_heads": G}
    options = {
        "plan": cuattn.padding_plan(MASK),
        "cu_seqlens": np.array([0, 3, 5], np.int32),
        "positions": np.arange(5),
    }
    outs = tuple(np.zeros((5, n, D), np.float32) for n in (H, G, G))
    return Call(cuattn.split_qkv, given, options | {"rope": cuattn.Rotary(), "out": outs})


def split_qkv_rotated() -> Call:
    call = split_qkv()
    return Call(cuattn.split_qkv, {**call.given, "rope": cuattn.Rotary(), "cu_seqlens": call.options["cu_seqlens"]})


def dropout_mask() -> Call:
    given = {"batch": 2, "num_heads": 2, "seqlen_q": 3, "seqlen_k": 20, "dropout_p": 0.25}
    origin = cuattn.DropoutOrigin(0, 1, 5, 16, 3)
    return Call(cuattn.dropout_mask, given, {"dropout_seed": 5, "dropout_offset": 1, "dropout_origin": origin})


def tensor_map() -> Call:
    options = {"swizzle": "32B", "l2_promotion": "64B", "fill": "nan", "element_strides": [1, 2]}
    shape = {"dims": (8, 4), "strides": (4, 32)}
    return Call(cuattn.tensor_map, {"array": aligned(4, 8), "box": (8, 2)}, options | shape)


def aligned(*shape: int) -> Any:
    """float32, at an address that a copy of whole tiles may read from."""
    array = host.empty(shape, np.float32)
    array[...] = 1
    host.finish(array)
    return array


def host_empty() -> Call:
    return Call(lambda shape, dtype: host.empty(shape, dtype).shape, {"shape": (2, 3), "dtype": np.float32})


def host_module() -> Call:
    code = 'extern "C" __global__ void f(float* o) { o[threadIdx.x] = 1; }'
    return Call(host.RawModule, {"code": code}, {"options": ("-DN=1",), "arch": "sm_80", "path": "nowhere.ptx"})


_OWN = (
    *(attention, attention_fp8, standard_attention, attention_varlen, forward_path, tune),
    *(attention_backward, attention_varlen_backward, attention_backward_workspace_size),
    *(decode_attention, decode_attention_int8, paged_attention, paged_attention_varlen, planned_attention),
    *(cascade_attention, shared_prefix, plan_decode, block_tables_from_csr, csr_from_block_tables),
    *(append_kv, append_kv_int8, append_kv_fp4, copy_pages, slot_mapping),
    *(softmax, log_softmax, logsumexp, online_softmax, online_softmax_update, online_softmax_merge),
    *(online_softmax_probabilities, merge_states, merge_stacked_states),
    *(padding_plan, remove_padding, restore_padding, made_plan, rope, rope_tables, rotary, rope_frequencies),
    *(rope_frequencies_yarn, split_qkv, split_qkv_rotated, dropout_mask, tensor_map, host_empty, host_module),
)
OWN_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _OWN}
