"""Do two versions of the package compute the same bits? Two hundred fixed calls over all public functions.

    python -m bench.same_bits --record bits.json      # with the version before
    python -m bench.same_bits --compare bits.json     # with the version after: names what differs, and exits with 1

The calls run on the host executor with one thread and no checker. What is kept is a digest of every array that a call
returns or writes. A rearrangement of the code changes none of them; a change that is meant to, names those it changes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cuattn
from bench.distributed_bits import distributed_calls
from cuattn.compat import flash_attn, scaled_dot_product_attention

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
REALS = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))
HALF, SINGLE = REALS[0], REALS[2]
Call = tuple[str, Callable[[], Any]]


def random(*shape: int, dtype: Any = HALF, seed: int = 0, scale: float = 1.0) -> np.ndarray[Any, Any]:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def qkv(
    dtype: Any = HALF,
    *,
    batch: int = 2,
    n: int = 37,
    m: int = 70,
    heads: int = 4,
    group: int = 2,
    d: int = 40,
    e: int = 40,
) -> tuple[Any, Any, Any]:
    return (
        random(batch, n, heads, d, dtype=dtype, seed=1),
        random(batch, m, heads // group, d, dtype=dtype, seed=2),
        random(batch, m, heads // group, e, dtype=dtype, seed=3),
    )


def options(n: int, m: int, heads: int) -> dict[str, dict[str, Any]]:
    """Options of attention, each by itself and some of them together."""
    single: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True},
        "top_left": {"causal": "top_left"},
        "window": {"window": (9, 3)},
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": 0.1 * np.arange(1, heads + 1, dtype=np.float32)},
        "bias": {"bias": random(heads, n, m, dtype=np.float32, seed=4)},
        "mask": {"mask": random(n, m, dtype=np.float32, seed=5) > -0.5},
        "sinks": {"sinks": random(heads, dtype=np.float32, seed=6)},
        "dropout": {"dropout_p": 0.25, "dropout_seed": 11},
        "part": {"dropout_p": 0.25, "dropout_seed": 11, "dropout_origin": (1, 0, 5, 48)},
        "offset": {"causal": True, "diagonal_offset": -7},
    }
    everything: dict[str, Any] = {}
    for name in ("causal", "window", "softcap", "alibi", "bias", "mask", "sinks", "dropout"):
        everything |= single[name]
    return {**single, "everything": everything}


def forward_calls() -> Iterator[Call]:
    given = options(37, 70, 4)
    for dtype, (name, chosen) in itertools.product(REALS, given.items()):
        if dtype != REALS[3] or name in ("plain", "causal", "everything"):
            q, k, v = qkv(dtype)
            yield f"attention {dtype} {name}", lambda a=(q, k, v), o=chosen: cuattn.attention(*a, return_lse=True, **o)
    for d, e in ((1, 1), (64, 64), (128, 128), (96, 200), (256, 256)):
        a = qkv(d=d, e=e)
        yield f"attention head dims {d} {e}", lambda a=a: cuattn.attention(*a, causal=True)
    q, k, v = qkv(SINGLE, d=64, e=64)
    yield "attention tf32", lambda: cuattn.attention(q, k, v, precision="tf32")
    narrow = tuple(x.astype(FLOAT8) for x in qkv(SINGLE))
    yield "attention float8", lambda: cuattn.attention(*narrow, q_descale=np.full((2, 2), 0.5, np.float32))
    for name in ("plain", "everything"):
        a = qkv()
        yield (
            f"standard_attention {name}",
            lambda a=a, o=given[name]: cuattn.standard_attention(*a, return_lse=True, **o),
        )
    packed, cu_q, cu_k = packed_arrays()
    for name in ("plain", "causal", "window", "softcap", "sinks", "dropout"):
        yield (
            f"attention_varlen {name}",
            lambda o=given[name]: cuattn.attention_varlen(*packed, cu_q, cu_k, return_lse=True, **o),
        )


def hopper_calls() -> Iterator[Call]:
    for dtype, name in itertools.product((HALF, BFLOAT16), ("plain", "causal", "window", "softcap", "alibi", "sinks")):

        def on_hopper(dtype: Any = dtype, name: str = name) -> Any:
            os.environ["CUATTN_HOST_ARCH"] = "sm_90a"
            try:
                return cuattn.attention(*qkv(dtype, d=64, e=64), return_lse=True, **options(37, 70, 4)[name])
            finally:
                del os.environ["CUATTN_HOST_ARCH"]

        yield f"attention sm_90a {dtype} {name}", on_hopper


def packed_arrays() -> tuple[tuple[Any, Any, Any], Any, Any]:
    cu_q, cu_k = np.array([0, 5, 5, 40], np.int32), np.array([0, 9, 12, 80], np.int32)
    arrays = random(40, 4, 48, seed=1), random(80, 2, 48, seed=2), random(80, 2, 48, seed=3)
    return arrays, cu_q, cu_k


def backward_calls() -> Iterator[Call]:
    for dtype, (name, chosen) in itertools.product(REALS, options(37, 70, 4).items()):
        if dtype in (HALF, SINGLE) or name in ("plain", "everything"):
            a = qkv(dtype)
            yield f"attention_backward {dtype} {name}", lambda a=a, o=chosen: gradients(*a, **o)
    for d in (32, 64, 128, 256):
        a = qkv(d=d, e=d)
        yield f"attention_backward head dim {d}", lambda a=a: gradients(*a, causal=True)
    a, cu_q, cu_k = packed_arrays()
    for chosen in ({}, {"causal": True}, {"window": (8, 8), "softcap": 5.0}):

        def varlen(o: dict[str, Any] = chosen) -> Any:
            out, lse = cuattn.attention_varlen(*a, cu_q, cu_k, return_lse=True, **o)
            return cuattn.attention_varlen_backward(out, *a, out, lse, cu_q, cu_k, **o)

        yield f"attention_varlen_backward {sorted(chosen)}", varlen
    shapes = {"none": None, "head": (2,), "token": (1, 70, 2), "channel": (1, 70, 2, 32)}
    for dtype, (kind, shape) in itertools.product((HALF, SINGLE), shapes.items()):
        b = tuple(random(1, 70, heads, 32, dtype=dtype, seed=heads) for heads in (4, 2, 2))
        decay = None if shape is None else -0.1 * random(*shape, dtype=SINGLE) ** 2

        def linear(b: Any = b, decay: Any = decay) -> Any:
            return cuattn.linear_attention_backward(b[0], *b, decay=decay)

        yield f"linear_attention_backward {dtype} {kind}", linear


def gradients(q: Any, k: Any, v: Any, **chosen: Any) -> Any:
    out, lse = cuattn.attention(q, k, v, return_lse=True, **chosen)
    dout = random(*out.shape, dtype=out.dtype, seed=9)
    return cuattn.attention_backward(dout, q, k, v, out, lse, return_dbias="bias" in chosen, **chosen)


def differential_calls() -> Iterator[Call]:
    given = options(37, 70, 4)
    del given["sinks"], given["everything"]["sinks"]
    lengths = np.array([70, 33], np.int32)
    for dtype, shared, name in itertools.product(REALS, (False, True), ("causal", "softcap", "everything")):
        q, k, v = random(2, 37, 8, 40, dtype=dtype, seed=1), *qkv(dtype, group=2 if shared else 1, e=80)[1:]
        a = q, k, v[:, :, :2], random(2, 37, 4, dtype=SINGLE, seed=7)

        def forward_and_gradients(a: Any = a, o: dict[str, Any] = given[name]) -> Any:
            out, state = cuattn.differential_attention(*a, norm=True, return_state=True, **o)
            return out, state, cuattn.differential_attention_backward(out, *a, state, norm=True, **o)

        yield f"differential_attention {dtype} {'v2' if shared else 'v1'} {name}", forward_and_gradients
        if name == "causal":
            label = f"differential_decode {dtype} {'v2' if shared else 'v1'}"
            yield label, lambda a=a: cuattn.differential_decode(a[0][:, :3], *a[1:3], 0.5, lengths, num_splits=2)


def decode_calls() -> Iterator[Call]:
    lengths = np.array([100, 33], np.int32)
    tables = np.array([[3, 1, 5, 0, 7, 6, 2], [4, 8, 9, -1, -1, -1, -1]], np.int32)
    for dtype, n, splits in itertools.product(REALS, (1, 3), (1, 3)):
        q, k, v = qkv(dtype, n=n, m=112)
        pages = (random(10, 16, 2, 40, dtype=dtype, seed=2), random(10, 16, 2, 40, dtype=dtype, seed=3))
        label = f"{dtype} n={n} splits={splits}"
        yield (
            f"decode_attention {label}",
            lambda a=(q, k, v), s=splits: cuattn.decode_attention(*a, lengths, num_splits=s, return_lse=True),
        )
        yield (
            f"paged_attention {label}",
            lambda q=q, p=pages, s=splits: cuattn.paged_attention(
                q, *p, tables, lengths, num_splits=s, return_lse=True
            ),
        )
    q, k, v = qkv(n=1, m=112, d=64, e=64)
    for name in ("window", "softcap", "alibi", "sinks"):
        chosen = options(1, 112, 4)[name]
        yield f"decode_attention {name}", lambda o=chosen: cuattn.decode_attention(q, k, v, lengths, **o)
    yield "decode_attention rope", lambda: cuattn.decode_attention(q, k, v, lengths, rope=cuattn.Rotary())
    for kv_format in ("e4m3fn", "e5m2", "int8", "nvfp4", "mxfp4"):
        yield f"append and attend {kv_format}", lambda f=kv_format: append_and_attend(f)
    pages = random(10, 16, 2, 48, seed=2), random(10, 16, 2, 48, seed=3)
    cu_q = np.array([0, 3, 5], np.int32)
    yield (
        "paged_attention_varlen",
        lambda: cuattn.paged_attention_varlen(random(5, 4, 48, seed=1), *pages, tables, cu_q, lengths, return_lse=True),
    )


def append_and_attend(kv_format: str) -> Any:
    cache = cuattn.PagedKVCache(8, 16, num_layers=1, num_kv_heads=2, head_dim=64, dtype=np.float16, kv_format=kv_format)
    seq = cache.add()
    with cache.reserve([seq], [40]) as step:
        step.append(0, random(40, 2, 64, seed=2), random(40, 2, 64, seed=3))
        out = step.attend(0, random(40, 4, 64, seed=1))
        step.commit()
    return [out, *(x for x in cache.layer_arrays(0).values() if isinstance(x, np.ndarray))]


def softmax_calls() -> Iterator[Call]:
    for dtype, algorithm in itertools.product(REALS, ("naive", "safe", "online")):
        x = random(6, 300, dtype=dtype)
        for function in (cuattn.softmax, cuattn.log_softmax, cuattn.logsumexp):
            name = f"{function.__name__} {dtype} {algorithm}"
            yield name, lambda f=function, x=x, a=algorithm: f(x, algorithm=a)
    x = random(3, 5000, dtype=SINGLE)
    yield "softmax long rows", lambda: cuattn.softmax(x)
    yield "softmax first axis", lambda: cuattn.softmax(x, axis=0)

    def online() -> Any:
        state = cuattn.OnlineSoftmax((3,), np.float32)
        for part in np.split(x, 5, axis=1):
            state.update(part)
        return state.logsumexp(), state.probabilities(x)

    yield "OnlineSoftmax", online


def other_calls() -> Iterator[Call]:
    for dtype, interleaved in itertools.product(REALS, (False, True)):
        x = random(9, 3, 64, dtype=dtype)
        yield f"rope {dtype} {interleaved}", lambda x=x, i=interleaved: cuattn.rope(x, np.arange(9), interleaved=i)
    yield "rope_frequencies", lambda: cuattn.rope_frequencies(64, 128)
    packed = random(20, 8 * 32)
    yield (
        "split_qkv",
        lambda: cuattn.split_qkv(
            packed, random(8 * 32, seed=7), num_heads=4, num_kv_heads=2, rope=cuattn.Rotary(), positions=np.arange(20)
        ),
    )
    mask = random(3, 11, dtype=SINGLE) > 0

    def padding() -> Any:
        plan = cuattn.padding_plan(mask)
        tokens = cuattn.remove_padding(random(3, 11, 5), plan)
        return plan.indices, plan.cu_seqlens, tokens, cuattn.restore_padding(tokens, plan)

    yield "padding", padding
    outs, lses = random(4, 2, 9, 3, 32, dtype=SINGLE), random(4, 2, 3, 9, dtype=SINGLE, seed=8)
    yield "merge_states", lambda: cuattn.merge_states(outs, lses)
    for dtype, decay in itertools.product((HALF, SINGLE), (None, -0.1 * random(1, 70, 2, dtype=SINGLE) ** 2)):
        a = tuple(random(1, 70, heads, 32, dtype=dtype, seed=heads) for heads in (4, 2, 2))
        name = f"linear_attention {dtype}{'' if decay is None else ' decay'}"
        yield name, lambda a=a, decay=decay: cuattn.linear_attention(*a, decay=decay, return_state=True)
    yield "dropout_mask", lambda: cuattn.dropout_mask(2, 3, 17, 19, dropout_p=0.3, dropout_seed=5)
    yield "slot_mapping", lambda: cuattn.slot_mapping(np.array([[4, 2, 0, 3]]), [5], [20], 8)

    def copied() -> Any:
        pages = random(6, 4, 2, 8)
        cuattn.copy_pages(pages, [0, 1], [4, 5])
        return pages

    yield "copy_pages", copied
    q, k, v = qkv()
    yield "flash_attn_func", lambda: flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(20, -1), softcap=4.0)
    a = tuple(np.swapaxes(x, 1, 2) for x in qkv(group=1))
    yield "scaled_dot_product_attention", lambda: scaled_dot_product_attention(*a, is_causal=True)


def sparse_calls() -> Iterator[Call]:
    yield "local_mask", lambda: cuattn.local_mask(70, 50, (16, 8), 20, 5)
    yield "strided_mask", lambda: cuattn.strided_mask(9, 11, 4, 2)
    yield "global_mask", lambda: cuattn.global_mask(9, 11, [0, -1])
    yield "streaming_mask", lambda: cuattn.streaming_mask(9, 11, 1, 3)
    yield "vertical_slash_mask", lambda: cuattn.vertical_slash_mask(70, 50, 16, [3, 30], [[0], [25]])
    yield "bigbird_mask", lambda: cuattn.bigbird_mask(9, 11, seed=5)
    for size, (name, chosen) in itertools.product((16, 24, 64), options(37, 70, 4).items()):
        mask = cuattn.BlockMask.from_blocks(
            np.add.outer(np.arange(-(-37 // size)), np.arange(-(-70 // size))) % 3 != 1, 37, 70, size
        )
        a = qkv(HALF if name != "everything" else SINGLE)

        def blocks(a: Any = a, mask: Any = mask, o: Any = chosen) -> Any:
            out, lse = cuattn.block_sparse_attention(*a, mask, return_lse=True, **o)
            return out, lse, *cuattn.block_sparse_attention_backward(out, *a, out, lse, mask, **o)[:3]

        yield f"block_sparse_attention {size} {name}", blocks
    for stride, local, causal in ((3, None, True), (5, 9, True), (4, 6, False)):
        for dtype in REALS:
            q, k, v = (random(2, 40, heads, 32, dtype=dtype, seed=heads) for heads in (4, 2, 2))

            def strided(q: Any = q, k: Any = k, v: Any = v, options: Any = (stride, local, causal)) -> Any:
                every, near, masked = options
                out, lse = cuattn.strided_attention(q, k, v, every, local=near, causal=masked, return_lse=True)
                grads = cuattn.strided_attention_backward(out, q, k, v, out, lse, every, local=near, causal=masked)
                return out, lse, grads.dq, grads.dk, grads.dv

            yield f"strided_attention {dtype} {stride} {local} {causal}", strided


def dual_chunk_calls() -> Iterator[Call]:
    chunks = {"chunk_size": 45, "local_size": 8}
    for dtype, n in itertools.product(REALS, (1, 37, 90)):
        q, k, v = qkv(dtype, n=n, m=133, d=64, e=64)
        for more in ({}, {"keys_rotated": True, "softcap": 3.0, "logit_factor": [1.0, 1.5]}):

            def dense(q: Any = q, k: Any = k, v: Any = v, options: Any = {**chunks, **more}) -> Any:  # noqa: B006
                out, lse = cuattn.dual_chunk_attention(q, k, v, return_lse=True, **options)
                return out, lse, *cuattn.dual_chunk_attention_backward(out, q, k, v, out, lse, **options)

            yield f"dual_chunk_attention {dtype} {n} {sorted(more)}", dense
        if n == 1:
            yield (
                f"dual_chunk_decode {dtype}",
                lambda a=(q, k, v): cuattn.dual_chunk_decode(*a, None, [133, 30], return_lse=True, **chunks),
            )
    packed, cu_q, cu_k = packed_arrays()
    yield (
        "dual_chunk_attention packed",
        lambda: cuattn.dual_chunk_attention(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **chunks),
    )
    yield "dual_chunk_positions", lambda: cuattn.dual_chunk_positions(np.arange(99), **chunks)
    yield "dual_chunk_logit_factor", lambda: cuattn.dual_chunk_logit_factor(np.arange(99), 10, "qwen")


def calls() -> Iterator[Call]:
    families = (
        softmax_calls,
        forward_calls,
        hopper_calls,
        backward_calls,
        decode_calls,
        sparse_calls,
        differential_calls,
        dual_chunk_calls,
        distributed_calls,
        other_calls,
    )
    for family in families:
        yield from family()


def digest(result: Any) -> str:
    """Digest of every array of a result, in order: dtype, shape and bytes."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if value is None:
            sha.update(b"none")
        elif isinstance(value, np.ndarray | np.generic):
            array = np.ascontiguousarray(value)
            sha.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        elif isinstance(value, tuple | list):
            for part in value:
                add(part)
        else:  # a dataclass of arrays
            for name in value.__dataclass_fields__:
                add(getattr(value, name))

    add(result)
    return sha.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--record", type=Path, metavar="FILE")
    choice.add_argument("--compare", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ["CUATTN_HOST_THREADS"] = "1"
    digests = {name: digest(call()) for name, call in calls()}
    if arguments.record:
        arguments.record.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        print(f"{len(digests)} calls recorded")
        return 0
    before = json.loads(arguments.compare.read_text(encoding="utf-8"))
    differ = sorted(name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name))
    for name in differ:
        print(f"differs: {name}" if name in before and name in digests else f"in one version only: {name}")
    print(f"{len(digests)} calls, {len(differ)} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
