"""Split decoding in NumPy, in a kernel's precision, right or with one planted fault.

The subject of the tests of the tolerance rule: each split by :func:`emulation.tiled_attention`, its result left in
float32, then the merge by lse.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from emulation import tiled_attention

from cuattn import reference
from cuattn.testing.arrays import place
from cuattn.testing.decode_tolerance import on_chip_sequences

#: Faults of splits and of their merge.
FAULTS = (
    "dropped_key",
    "key_twice",
    "forgotten_split",
    "weights_of_equal_splits",
    "weights_in_base_2",
    "last_maximum",
    "sink_in_every_split",
    "sink_forgotten",
)

#: Faults that are the right answer to another problem.
INPUT_FAULTS = (
    "key_beyond_the_length",
    "last_key_forgotten",
    "wrong_page",
    "wrong_slot",
    "k_scale_of_next_head",
    "v_scale_of_next_head",
    "k_scale_of_next_slot",
    "v_scale_of_next_slot",
    "query_rotated_by_one_more",
    "keys_rotated_by_one_more",
    "lengths_of_next_sequence",
)


def split_decode(problem, *, num_splits, block_n, sequential=False, fault=None, rng=None):
    """(out, lse) of a problem; `fault` is one of FAULTS."""
    q = problem.q.array
    real = np.float64 if q.dtype == np.float64 else np.float32
    options = dict(problem.options)
    sinks = options.pop("sinks", None)
    options.pop("num_splits", None)
    options.setdefault("causal", True)
    packed = problem.kind == "varlen"
    heads = q.shape[-2]
    out = np.zeros((*q.shape[:-1], problem.head_dim_v), q.dtype)
    lse = np.zeros((*q.shape[:-3], heads, q.shape[-3]), real)
    for part in on_chip_sequences(problem.reference_arrays, options, q.dtype):
        part_out, part_lse = _sequence(part, sinks, num_splits, block_n, sequential, fault, rng, real)
        if packed:
            out[part.where], lse[:, part.where] = part_out[0], part_lse[0]
        else:
            out[part.where], lse[part.where] = part_out, part_lse
    return out, lse


def _sequence(part, sinks, num_splits, block_n, sequential, fault, rng, real):
    num_keys, options = part.k.shape[1], dict(part.options)
    offset = reference.diagonal(part.q.shape[1], num_keys, options["causal"])[0, 0, :1, 0]
    first = 0 if offset.size == 0 else int(offset[0])
    bounds = [num_keys * s // num_splits for s in range(num_splits + 1)]
    spoilt = int(rng.integers(num_splits)) if rng is not None else None
    outs, lses = [], []
    for s in range(num_splits):
        begin, end = bounds[s], bounds[s + 1]
        keys = np.arange(begin, end)
        if fault == "dropped_key" and s == spoilt:
            keys = keys[1:]
        if fault == "key_twice" and s == spoilt and s:
            begin, keys = begin - 1, np.arange(begin - 1, end)
        if fault == "forgotten_split" and s == spoilt:
            keys = keys[:0]
        begin = int(keys[0]) if keys.size else begin
        split_out, split_lse = tiled_attention(
            part.q, part.k[:, keys], part.v[:, keys], block_n=block_n, sequential=sequential, out_dtype=real,
            **options | {"diagonal_offset": first - begin},
            sinks=sinks if fault == "sink_in_every_split" else None,
        )  # fmt: skip
        outs.append(split_out)
        lses.append(split_lse)
    return _merge(np.stack(outs), np.stack(lses), sinks, fault, real, part.q.dtype)


def _merge(outs, lses, sinks, fault, real, dtype):
    """The reduce step: weights e^(lse_s - max), their sum and the sink's, one division."""
    largest = lses[-1] if fault == "last_maximum" else lses.max(axis=0)
    shift = np.where(np.isneginf(largest), real(0), largest)
    weights = (np.exp2 if fault == "weights_in_base_2" else np.exp)(lses - shift)
    if fault == "weights_of_equal_splits":
        weights = np.where(np.isneginf(lses), real(0), real(1))
    if fault == "last_maximum":
        weights = np.minimum(weights, 1)
    total = weights.sum(axis=0)
    if sinks is not None and fault not in ("sink_in_every_split", "sink_forgotten"):
        sink = sinks.astype(real).reshape(1, -1, 1)
        base = np.maximum(shift, np.where(np.isneginf(sink), shift, sink))
        weights, total = weights * np.exp(shift - base), total * np.exp(shift - base) + np.exp(sink - base)
        shift = base
    out = np.zeros_like(outs[0])
    for weight, part in zip(weights, outs, strict=True):
        out += weight.swapaxes(1, 2)[..., None] * part
    divisor = np.where(total == 0, real(1), total)
    return (out / divisor.swapaxes(1, 2)[..., None]).astype(dtype), np.log(total) + shift


def spoilt(problem, fault, rng):
    """Another problem, of which the right answer is what a kernel with this fault would give."""
    lengths, tables, options = problem.seqlens_k.copy(), problem.block_tables, dict(problem.options)
    b = int(np.argmax(lengths))
    if fault == "key_beyond_the_length":
        lengths[b] += 1
    elif fault == "last_key_forgotten":
        lengths[b] -= 1
    elif fault == "lengths_of_next_sequence":
        lengths = np.roll(lengths, 1)
    elif fault == "wrong_page":
        tables = tables.copy()
        tables[b, 0] = tables[1 - b, 0]
    elif fault == "wrong_slot":
        order = np.arange(problem.k.array.shape[1])
        order[:2] = 1, 0
        return replace(problem, k=place(problem.k.array[:, order]))
    elif fault.endswith("of_next_head"):
        name = fault[:7]
        options[name] = np.roll(options[name], 1)
    elif fault.endswith("of_next_slot"):
        name = fault[:7]
        options[name] = np.roll(options[name], 1, axis=1)
    elif fault == "query_rotated_by_one_more":
        q = problem.q.array
        turned = reference.rope(q, np.ones(q.shape[:2], int), base=options["rope"].base)
        return replace(problem, q=place(turned.astype(q.dtype)))
    elif fault == "keys_rotated_by_one_more":
        k = problem.k.array
        turned = reference.rope(k, np.ones(k.shape[:2], int), base=options["rope"].base)
        return replace(problem, k=place(turned.astype(k.dtype)))
    return replace(problem, seqlens_k=lengths, block_tables=tables, options=options)
