"""What each option of attention costs beside the plain kernel: instructions on the host executor, time on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from cuattn import host
from cuattn.benchmark import inputs, verify
from cuattn.benchmark.results import Record, Value, spelt
from cuattn.benchmark.suite import Options, Step
from cuattn.runtime.timer import CUDA_METHOD, CudaTimer, significant
from cuattn.testing.cases import AttentionCase, VarlenCase

AnyCase = AttentionCase | VarlenCase

HOST_METHOD = "warp instructions executed, counted by the host executor; each ratio is to the plain case of its dtype"
CLASSES = ("mma", "special", "float", "int", "memory", "predicate")  # of instructions


def plain_case(executor: str) -> AttentionCase:
    """The case that every option is added to: float16, all of N x M."""
    seqlen, heads, head_dim = (4096, 16, 128) if executor == "cuda" else (512, 2, 64)
    return AttentionCase(1, seqlen, heads, head_dim)


def cases(executor: str) -> dict[str, AnyCase]:
    """The cases by name; the first of a dtype is what the others of it are compared with."""
    plain = plain_case(executor)
    seqlen, heads, head_dim = plain.seqlen_q, plain.num_heads, plain.head_dim
    window = 512 if executor == "cuda" else 128
    exact = replace(plain, dtype="float32")
    found: dict[str, AnyCase] = {
        "plain": plain,
        "causal": replace(plain, causal=True),
        f"window {window}": replace(plain, window=(window, 0)),
        f"window {window} both sides": replace(plain, window=(window, window)),
        f"chunk {window}, causal": replace(plain, chunk=window, causal=True),
        "softcap": replace(plain, softcap=30.0),
        "alibi": replace(plain, alibi=True),
        "sinks": replace(plain, sinks=True),
        "bias [B, H, N, M]": replace(plain, bias="bhnm"),
        "bias [M]": replace(plain, bias="m"),
        "mask [N, M], nothing hidden": replace(plain, mask="nm", mask_kind="open"),
        "mask [N, M], half of the tiles": replace(plain, mask="nm", mask_kind="half"),
        "mask [N, M], random": replace(plain, mask="nm"),
        "mask [B, M], padding": replace(plain, mask="bm", mask_kind="padding"),
        "dropout": replace(plain, dropout_p=0.1),
        "causal, softcap": replace(plain, causal=True, softcap=30.0),
        "everything": replace(
            plain, window=(window, 0), softcap=30.0, alibi=True, sinks=True, bias="nm", mask="nm", dropout_p=0.1
        ),
        "packed, equal lengths": VarlenCase((seqlen // 2,) * 2, heads, head_dim),
        "packed, one long and seven short": VarlenCase((seqlen - 7 * 16, *(16,) * 7), heads, head_dim),
        "float32": exact,
        "float32, causal": replace(exact, causal=True),
        "float32, softcap": replace(exact, softcap=30.0),
        "float32, tf32": replace(exact, precision="tf32"),
    }
    if executor == "host":  # CuPy has no arrays of 8-bit floats
        found["float8"] = replace(plain, dtype="float8_e4m3fn")
    return found


def option_steps(options: Options) -> list[Step]:
    """One step for each option."""
    executor = options.resolved()
    plain: dict[str, int | float] = {}
    run = partial(host_records if executor == "host" else cuda_records, plain, options)
    return [
        Step("options", spelt(f"option_{name}"), 2.0, partial(run, name, case))
        for name, case in cases(executor).items()
    ]


def host_records(plain: dict[str, int | float], options: Options, name: str, case: AnyCase) -> Iterator[Record]:
    """Count the instructions of one call, after a check of its result."""
    arrays = inputs.make(case, "host", options.seed)
    with host.profile() as profile:
        out, _ = case.run(arrays)
    require(case, arrays, out)
    count = profile.warp_instructions
    metrics: dict[str, Value] = {"warp_instructions": count, "ratio": significant(count / _base(plain, case, count), 4)}
    metrics |= {kind: profile.instructions[kind] for kind in CLASSES} | {"launches": profile.launches}
    moved = profile.bytes["global"]
    metrics |= {"global_read_bytes": moved["read"], "global_write_bytes": moved["write"]}
    yield Record("options", spelt(f"option_{name}"), metrics, executor="host", method=HOST_METHOD)


def cuda_records(plain: dict[str, int | float], options: Options, name: str, case: AnyCase) -> Iterator[Record]:
    """Measure the time of one call, after a check of its result."""
    arrays = inputs.make(case, "cuda", options.seed)
    out, _ = case.run(arrays)
    require(case, arrays, out)
    timing = CudaTimer().time(lambda: case.run(arrays), budget_s=options.budget_s)
    metrics: dict[str, Value] = {**timing.metrics()}
    metrics["ratio"] = significant(timing.median_us / _base(plain, case, timing.median_us), 4)
    of_time: dict[str, Any] = {"method": CUDA_METHOD, "samples": timing.samples()}
    yield Record("options", spelt(f"option_{name}"), metrics, executor="cuda", **of_time)


def require(case: AnyCase, arrays: dict[str, object], out: object) -> None:
    """Raise unless the result is right: by the precision of the products or of the result, whichever is less."""
    find = verify.varlen_error if isinstance(case, VarlenCase) else verify.attention_error
    narrow = case.precision == "tf32" or np.dtype(case.dtype).itemsize == 1
    verify.require(find(case, arrays, out), "bfloat16" if narrow else case.dtype)  # type: ignore[arg-type]


def _base(plain: dict[str, int | float], case: AnyCase, value: int | float) -> int | float:
    return plain.setdefault("float32" if case.dtype == "float32" else "float16", value)
