"""The backward of attention: speed beside peers, what it costs beside its forward, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import cuattn
from cuattn import host
from cuattn.benchmark import host_figures, inputs, models, operations, option_costs
from cuattn.benchmark.results import Record, Value, spelt
from cuattn.benchmark.suite import Options, Step
from cuattn.head_dims import MAX_GRADIENT_HEAD_DIM
from cuattn.runtime.timer import HOST_METHOD, significant
from cuattn.testing.backward_cases import BackwardCase, VarlenBackwardCase
from cuattn.testing.cases import AttentionCase, VarlenCase

AnyBackward = BackwardCase | VarlenBackwardCase

CUDA_SEQLENS = (4096, 1024, 16384)  # the one that the options are measured at first
HOST_SEQLEN = 256
SPEED_CASES = (
    BackwardCase(AttentionCase(1, 1024, 8, 64)),
    BackwardCase(AttentionCase(1, 1024, 8, 64, causal=True)),
    BackwardCase(AttentionCase(1, 1024, 8, 128)),
    BackwardCase(AttentionCase(1, 256, 8, 64, dtype="float32")),
    BackwardCase(AttentionCase(1, 1024, 8, 64), with_forward=True),
)
WORKSPACE_SEQLENS = (1024, 4096, 16384)
COUNT_METHOD = (
    "warp instructions executed, counted by the host executor, of the backward alone; over forward: divided by those "
    "of the forward call whose results it takes; workspace: allocated at the peak, beside the gradients"
)
WORKSPACE_METHOD = "cuattn.attention_backward_workspace_size; logits: one float32 for each head, query and key"


def backward_cases(options: Options, executor: str) -> list[AnyBackward]:
    """The problems of the suite, those that say most first; each with its bits fixed, and in whatever order."""
    cases = _cuda_cases(options) if executor == "cuda" else _host_cases(options)
    if options.problem.given:
        forwards = options.problem.attention(case.forward for case in cases if isinstance(case, BackwardCase))
        cases = [BackwardCase(case) for case in forwards]
    return [replace(case, deterministic=fixed) for case in cases for fixed in (True, False)]


def _head_dims(options: Options, usual: tuple[int, ...]) -> list[int]:
    """The head dims asked for that have gradients."""
    return [head_dim for head_dim in options.head_dims or usual if head_dim <= MAX_GRADIENT_HEAD_DIM]


def _cuda_cases(options: Options) -> list[AnyBackward]:
    shapes = [
        AttentionCase(
            batch=max(1, operations.TOKENS // seqlen),
            seqlen_q=seqlen,
            num_heads=max(1, operations.HIDDEN // head_dim),
            head_dim=head_dim,
            dtype=dtype,
            causal=causal,
        )
        for dtype in options.dtypes or ("bfloat16",)
        for seqlen in options.seqlens or CUDA_SEQLENS
        for head_dim in _head_dims(options, operations.CUDA_HEAD_DIMS)
        for causal in (False, True)
    ]
    if options.is_own:
        return [BackwardCase(case) for case in shapes]
    first, second = shapes[:2]
    packed = VarlenCase((4096, 2048, *(1024,) * 8, *(256,) * 8), first.num_heads, first.head_dim, dtype=first.dtype)
    both = [BackwardCase(case, with_forward=True) for case in (first, second)]
    start = [BackwardCase(first), BackwardCase(second), *both, *_with_options(first), VarlenBackwardCase(packed)]
    exact = replace(first, batch=1, dtype="float32")
    types = [BackwardCase(replace(first, dtype="float16")), BackwardCase(exact)]
    return [*start, *(BackwardCase(case) for case in shapes[2:]), *types]


def _host_cases(options: Options) -> list[AnyBackward]:
    shapes = [
        AttentionCase(1, seqlen, operations.HOST_HEADS, head_dim, dtype=dtype, causal=causal)
        for dtype in options.dtypes or ("float16", "bfloat16", "float32")
        for head_dim in _head_dims(options, (64, 128, 256))
        for seqlen in options.seqlens or (HOST_SEQLEN,)
        for causal in (False, True)
    ]
    if options.is_own:
        return [BackwardCase(case) for case in shapes]
    first = shapes[0]
    packed = VarlenCase((HOST_SEQLEN, 100, 28, 0, 1), first.num_heads, first.head_dim, causal=True)
    more = [*_with_options(first), VarlenBackwardCase(packed)]
    return [*(BackwardCase(case) for case in shapes), BackwardCase(first, with_forward=True), *more]


def _with_options(plain: AttentionCase) -> list[AnyBackward]:
    """Cases of grouped heads, and of one option at a time."""
    window = plain.seqlen_q // 4
    return [
        BackwardCase(replace(plain, num_kv_heads=plain.num_heads // 4)),
        BackwardCase(replace(plain, dropout_p=0.1)),
        BackwardCase(replace(plain, window=(window, 0))),
        BackwardCase(replace(plain, softcap=30.0)),
        BackwardCase(replace(plain, bias="nm"), dbias=True),
    ]


def backward_steps(options: Options) -> list[Step]:
    """Steps that measure the backward, alone and with its forward; of models, what learning calls."""
    executor = options.resolved()
    if options.models:
        return operations.model_steps("backward", "training", options, partial(_training, options))
    return operations.case_steps("backward", backward_cases(options, executor), options)


def _training(options: Options, model: models.Model, seqlen: int, dtype: str | None) -> list[AnyBackward]:
    """The calls of a model's training with the problem put on them."""
    cases = models.training(model, 1, seqlen, dtype)
    return [replace(case, forward=options.problem.attention([case.forward])[0]) for case in cases]


def speed_steps(options: Options) -> list[Step]:
    """Steps that measure the speed of the host executor, checkers off."""
    return [Step("host", case.name, 8.0, partial(speed_records, case, options)) for case in SPEED_CASES]


def speed_records(case: BackwardCase, options: Options) -> Iterator[Record]:
    """Measure one problem without checkers."""
    with host.check(), host.schedule("eager"):
        arrays = inputs.make(case, "host", options.seed)
        checked = operations.check(case, arrays, case.run(arrays))
        timing = host_figures.undisturbed(lambda: case.run(arrays), budget_s=max(2.0, options.budget_s))
    metrics = {**timing.metrics(), "gflop_per_s": significant(case.flops / timing.median_us / 1e3), **checked}
    of_time: dict[str, Any] = {"method": HOST_METHOD, "samples": timing.samples()}
    yield Record("host", f"{case.name}_unchecked", metrics, executor="host", **of_time)


def counted_cases() -> dict[str, AnyBackward]:
    """The counted cases, with a name for each: the forward's options, the gradient of a bias, other head dims."""
    found: dict[str, AnyBackward] = {}
    for name, case in option_costs.cases("host").items():
        if isinstance(case, VarlenCase):
            found[name] = VarlenBackwardCase(case)
        elif np.dtype(case.dtype).itemsize > 1:
            found[name] = BackwardCase(case)
    plain = option_costs.plain_case("host")
    for axes in ("bhnm", "hnm", "nm", "m"):
        label = ", ".join(axes.upper())
        found[f"bias [{label}], dbias"] = BackwardCase(replace(plain, bias=axes), dbias=True)
    for head_dim in (128, 256):
        found[f"D = {head_dim}"] = BackwardCase(replace(plain, head_dim=head_dim))
    found["two query heads a key head"] = BackwardCase(replace(plain, num_kv_heads=1))
    return found


def gradient_steps(options: Options) -> list[Step]:
    """Steps that count what the backward executes and allocates on the host executor; nothing of it is a time."""
    steps = [
        Step("gradients", spelt(f"gradient_{name}"), 4.0, partial(count_records, name, case, options))
        for name, case in counted_cases().items()
    ]
    return [*steps, Step("gradients", "workspace", 0.5, workspace_records)]


def count_records(name: str, case: AnyBackward, options: Options) -> Iterator[Record]:
    """Count instructions and workspace of one problem, in a fixed order and in whatever order, beside its forward."""
    arrays = inputs.make(case, "host", options.seed)
    with host.profile() as forward:
        case.forward.run({name: x for name, x in arrays.items() if name not in ("dout", "out", "lse")})
    with host.profile() as backward:
        grads = case.run(arrays)
    operations.check(case, arrays, grads)
    with host.profile() as order_free:
        free = replace(case, deterministic=False)
        operations.check(case, arrays, free.run(arrays))
    count = backward.warp_instructions
    metrics: dict[str, Value] = {
        "warp_instructions": count,
        "over_forward": significant(count / forward.warp_instructions, 4),
        "order_free_instructions": order_free.warp_instructions,
        "order_free_over_forward": significant(order_free.warp_instructions / forward.warp_instructions, 4),
        "mma": backward.instructions["mma"],
        "mma_over_forward": significant(backward.instructions["mma"] / max(1, forward.instructions["mma"]), 4),
        "order_free_mma_over_forward": significant(
            order_free.instructions["mma"] / max(1, forward.instructions["mma"]), 4
        ),
        "launches": backward.launches,
        "global_read_bytes": backward.bytes["global"]["read"],
        "global_write_bytes": backward.bytes["global"]["write"],
        "workspace_bytes": operations.workspace_bytes(case, arrays),
        "order_free_workspace_bytes": operations.workspace_bytes(free, arrays),
        "logits_bytes": case.logits_bytes,
    }
    yield Record("gradients", spelt(f"gradient_{name}"), metrics, executor="host", method=COUNT_METHOD)


def workspace_records() -> Iterator[Record]:
    """Count the workspace of long sequences beside matrices that are never stored. Nothing runs."""
    for seqlen in WORKSPACE_SEQLENS:
        case = AttentionCase(1, seqlen, 16, 64)
        q = np.broadcast_to(np.float16(0), case.shapes["q"])
        fixed, free = (
            cuattn.attention_backward_workspace_size(q, q, q, deterministic=deterministic)
            for deterministic in (True, False)
        )
        logits_bytes = BackwardCase(case).logits_bytes
        metrics: dict[str, Value] = {
            "workspace_bytes": fixed,
            "order_free_workspace_bytes": free,
            "logits_bytes": logits_bytes,
            "workspace_over_logits": significant(fixed / logits_bytes, 3),
        }
        goals = {"workspace_over_logits": "<= 0.01"}
        yield Record("gradients", f"workspace_{case.name}", metrics, method=WORKSPACE_METHOD, goals=goals)
