"""Speed of the operations, on whichever executor is here, beside peers on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cuattn
from cuattn.benchmark import ceilings, inputs, memory, models, peers, verify
from cuattn.benchmark.results import Record, Value
from cuattn.benchmark.suite import Options, Step, failure
from cuattn.errors import ArgumentError
from cuattn.runtime.timer import CUDA_METHOD, HOST_METHOD, CudaTimer, Timing, significant, time_host
from cuattn.testing.backward_cases import BackwardCase, VarlenBackwardCase, gradients
from cuattn.testing.cases import AttentionCase, Case, SoftmaxCase, VarlenCase
from cuattn.testing.dual_chunk_cases import DualChunkCase
from cuattn.testing.linear_cases import LinearCase
from cuattn.testing.padding_cases import MergeCase, PaddingCase, PaddingPlanCase
from cuattn.testing.rotary_cases import RopeCase, SplitQKVCase

#: Problems whose figure is operations a second; of the others it is bytes a second.
COMPUTING = (AttentionCase, VarlenCase, BackwardCase, VarlenBackwardCase, DualChunkCase)
BACKWARD = (BackwardCase, VarlenBackwardCase)

#: Makes the records of a case on the host executor.
OnHost = Callable[[Any], Iterator[Record]]

HIDDEN = 2048  # heads times head dim, and
TOKENS = 16384  # sequences times tokens, of every problem on a GPU: the usual sizes of the literature
CUDA_SEQLENS = (1024, 2048, 4096, 8192, 16384)
CUDA_HEAD_DIMS = (128, 64, 256)
HOST_SEQLENS = (128, 512, 1024)
HOST_HEADS = 8
CUDA_MODEL_SEQLENS = (8192, 2048)
HOST_MODEL_SEQLENS = (128,)
CPU_METHOD = "median wall-clock time of calls of another library on this CPU, after one to warm up; not a GPU time"
WAITING_METHOD = "median wall-clock time of calls that wait for their result, as they run on a stream of their own"
#: (D, E) with more columns than one CTA computes: two CTAs share a row then, and both compute the scores.
WIDE_HEADS = ((64, 512), (512, 512))

CUDA_SOFTMAX = ((32768, 1024), (16384, 4096), (262144, 128), (2048, 32768), (16, 4194304))
HOST_SOFTMAX = ((512, 256), (64, 4096), (4, 65536))


def attention_cases(options: Options, executor: str) -> list[AttentionCase]:
    """The problems of the suite, those that say most first; wide heads last, unless sizes are asked for."""
    if executor == "cuda":
        cases = [
            AttentionCase(
                batch=max(1, TOKENS // seqlen),
                seqlen_q=seqlen,
                num_heads=max(1, HIDDEN // head_dim),
                head_dim=head_dim,
                dtype=dtype,
                causal=causal,
            )
            for dtype in options.dtypes or ("bfloat16",)
            for head_dim in options.head_dims or CUDA_HEAD_DIMS
            for causal in (False, True)
            for seqlen in options.seqlens or CUDA_SEQLENS
        ]
        wide = AttentionCase(TOKENS // 4096, 4096, 4, 512, dtype="bfloat16", causal=True)
    else:
        cases = [
            AttentionCase(1, seqlen, HOST_HEADS, head_dim, dtype=dtype, causal=causal)
            for dtype in options.dtypes or ("float16", "bfloat16", "float32")
            for head_dim in options.head_dims or (64,)
            for seqlen in options.seqlens or HOST_SEQLENS
            for causal in (False, True)
        ]
        wide = AttentionCase(1, HOST_SEQLENS[0], 2, 512)
    if options.is_own:
        return options.problem.attention(cases)
    return cases + [replace(wide, head_dim=head_dim, head_dim_v=head_dim_v) for head_dim, head_dim_v in WIDE_HEADS]


def softmax_cases(options: Options, executor: str) -> list[SoftmaxCase]:
    """The problems of the suite; `seqlens` are lengths of rows."""
    shapes: tuple[tuple[int, int], ...] = CUDA_SOFTMAX if executor == "cuda" else HOST_SOFTMAX
    if options.seqlens:
        size = shapes[0][0] * shapes[0][1]
        shapes = tuple((max(1, size // columns), columns) for columns in options.seqlens)
    dtypes = options.dtypes or ("float32", "float16")
    return [SoftmaxCase(rows, columns, dtype) for dtype in dtypes for rows, columns in shapes]


def attention_steps(options: Options) -> list[Step]:
    """Steps that measure forward attention: of models, the calls that read a prompt."""
    executor = options.resolved()
    if not options.models:
        return case_steps("attention", attention_cases(options, executor), options)
    return model_steps("attention", "prefill", options, partial(_prefill, options))


def _prefill(options: Options, model: models.Model, seqlen: int, dtype: str | None) -> list[AttentionCase]:
    """The calls of a model for a prompt with the problem put on them."""
    return options.problem.attention(models.prefill(model, 1, seqlen, dtype))


def softmax_steps(options: Options) -> list[Step]:
    """Steps that measure softmax along rows."""
    return case_steps("softmax", softmax_cases(options, options.resolved()), options)


def layout_cases(executor: str, dtypes: Sequence[str] = ()) -> list[Case]:
    """Cases that move tokens about and hardly compute: rotating, splitting, packing, merging; and packed attention."""
    batch, seqlen, heads, head_dim = (64, 1024, 16, 64) if executor == "cuda" else (4, 128, 4, 64)
    cases: list[Case] = [PaddingPlanCase(batch, seqlen), PaddingPlanCase(batch, seqlen, known=True)]
    for dtype in dtypes or ("float16",):
        cases += [
            RopeCase(batch, seqlen, heads, head_dim, dtype=dtype),
            RopeCase(batch, seqlen, heads, head_dim, dtype=dtype, interleaved=True, tables=True),
            SplitQKVCase(batch, seqlen, heads, head_dim, num_kv_heads=heads // 2, dtype=dtype),
            SplitQKVCase(batch, seqlen, heads, head_dim, dtype=dtype, fill=0.5),
            PaddingCase(batch, seqlen, heads * head_dim, dtype=dtype),
            PaddingCase(batch, seqlen, heads * head_dim, dtype=dtype, kind="restore_padding"),
            MergeCase(2, batch, seqlen, heads, head_dim, dtype),
            MergeCase(16, batch, 1, heads, head_dim, dtype),
            VarlenCase(tuple(seqlen * n // batch for n in range(1, batch + 1)), heads, head_dim, dtype=dtype),
        ]
    return cases


def layout_steps(options: Options) -> list[Step]:
    """Steps that measure rotating, splitting, packing, merging, and packed attention."""
    return case_steps("layout", layout_cases(options.resolved(), options.dtypes), options)


def smoke_steps(options: Options) -> list[Step]:
    """Steps with a little of everything, under a minute on two cores."""
    executor = options.resolved()
    if executor == "cuda":
        shape: dict[str, Any] = {"batch": 4, "seqlen_q": 4096, "num_heads": 16, "head_dim": 128}
        attention: list[Case] = [AttentionCase(**shape, dtype="bfloat16", causal=causal) for causal in (False, True)]
        softmax = [SoftmaxCase(32768, 1024), SoftmaxCase(32768, 1024, "float16")]
    else:
        attention = [
            AttentionCase(1, 1024, 8, 64),
            AttentionCase(1, 1024, 8, 64, causal=True),
            AttentionCase(1, 512, 8, 128, num_kv_heads=2, dtype="bfloat16", causal=True),
            AttentionCase(1, 512, 8, 64, window=(128, 0), softcap=30.0, alibi=True),
            AttentionCase(2, 128, 4, 32, dtype="float32"),
        ]
        softmax = [SoftmaxCase(256, 1024), SoftmaxCase(8, 32768, "float16")]
    return case_steps("smoke", [*attention, *softmax, *layout_cases(executor)], options)


def model_steps(
    suite: str,
    what: str,
    options: Options,
    calls: Callable[[models.Model, int, str | None], list[Any]],
    on_host: OnHost | None = None,
) -> list[Step]:
    """Steps for the calls of each model that is asked for, at each length, with the problem put on them."""
    lengths = options.seqlens or (CUDA_MODEL_SEQLENS if options.resolved() == "cuda" else HOST_MODEL_SEQLENS)
    steps: list[Step] = []
    for name in options.models:
        if name not in models.MODELS:
            raise ArgumentError(f"there is no model {name!r}: choose from {', '.join(models.MODELS)}")
        cases = [
            case
            for length in lengths
            for dtype in options.dtypes or (None,)
            for case in calls(models.MODELS[name], length, dtype)
        ]
        found = case_steps(suite, cases, options, prefix=f"{models.slug(name)}_{what}_", on_host=on_host)
        steps += [step for step in found if not steps or step.suite != "ceilings"]
    return steps


def case_steps(
    suite: str, cases: Sequence[Case], options: Options, *, prefix: str = "", on_host: OnHost | None = None
) -> list[Step]:
    """One step for each case; missing peers and, on a GPU, the ceilings come first. `prefix` is that of case names,
    `on_host` makes the records on the host executor in place of `host_records`.
    """
    executor = options.resolved()
    if executor == "host":
        run = on_host or partial(host_records, suite, options)
        steps = [Step(suite, prefix + case.name, _host_estimate(case), partial(run, case)) for case in cases]
    else:
        bench = CudaBench(suite, options)
        steps = [Step(suite, prefix + case.name, 4.0, partial(bench.records, case)) for case in cases]
        steps = [Step("ceilings", "copy and matrix product", 4.0, bench.ceilings), *steps]
    if prefix:
        steps = [replace(step, run=partial(_named, prefix, step)) if step.suite == suite else step for step in steps]
    kinds = dict.fromkeys(kind for case in cases if (kind := peer_kind(case)))
    if any(peers.missing(kind, options.peers, executor) for kind in kinds):
        steps.insert(0, Step(suite, "peers", 0.01, partial(missing_peers, suite, list(kinds), options)))
    return steps


def _named(prefix: str, step: Step) -> Iterator[Record]:
    for record in step.run():
        yield replace(record, case=prefix + record.case)


def peer_kind(case: Case) -> str:
    """The kind of operation by which peers of a case are found; empty where it has none."""
    if isinstance(case, SoftmaxCase):
        return "softmax"
    if isinstance(case, AttentionCase):
        return "attention" if verify.is_plain(case) else ""
    if isinstance(case, BackwardCase):
        return "backward" if case.deterministic and verify.is_plain(case.forward) else ""
    return "linear" if isinstance(case, LinearCase) else ""


def missing_peers(suite: str, kinds: Sequence[str], options: Options) -> Iterator[Record]:
    """A record for each peer that is wanted and not to be had."""
    executor = options.resolved()
    found = {name: why for kind in kinds for name, why in peers.missing(kind, options.peers, executor).items()}
    for name, why in found.items():
        yield Record(suite, "peers", provider=name, executor=executor, error=why)


def _host_estimate(case: Case) -> float:
    """Estimate the seconds of a case: the kernel's compilation, and a few calls of an interpreter."""
    if not isinstance(case, COMPUTING):
        return 1.0 + 1e-7 * case.num_bytes
    slowdown = 1 if case.dtype in ("float16", "bfloat16") else 10
    kernels = 4 if isinstance(case, BACKWARD) else 1
    return 1.2 * kernels + 5 * slowdown * case.flops / 1e10


def rates(case: Case, timing: Timing, executor: str) -> dict[str, Value]:
    """What a time means for a case: in the units of a GPU or of the host executor."""
    seconds = timing.median_us / 1e6
    moved: dict[str, Value] = {"bandwidth_gb_per_s": significant(case.num_bytes / seconds / 1e9)}
    work: dict[str, Value] = {"work_flops": case.flops, "work_bytes": case.num_bytes}
    computed: dict[str, Value] = {"gflop_per_s": significant(case.flops / seconds / 1e9)}
    if executor == "cuda":
        computed = {"tflop_per_s": significant(case.flops / seconds / 1e12)}
    if isinstance(case, LinearCase):
        return {**moved, **computed, "num_bytes": case.num_bytes, "flops": case.flops}
    return {**(computed if isinstance(case, COMPUTING) else moved), **work}


def check(case: Case, arrays: dict[str, Any], result: Any) -> dict[str, Value]:
    """Raise unless a result is right, whoever computed it; its relative error where there is a quick measure of it."""
    if isinstance(case, BackwardCase | VarlenBackwardCase):
        error = verify.gradient_error(case, arrays, result)
    elif isinstance(case, AttentionCase):
        error = verify.attention_error(case, arrays, result)
    elif isinstance(case, VarlenCase):
        error = verify.varlen_error(case, arrays, result)
    elif isinstance(case, SoftmaxCase):
        error = verify.softmax_error(case, arrays, result)
    else:
        case.check(arrays, result)
        return {}
    tf32 = isinstance(case, COMPUTING) and case.options.get("precision") == "tf32"
    verify.require(error, "bfloat16" if tf32 else case.dtype)
    return {"relative_error": significant(error, 2)}


def output(case: Case, result: Any) -> Any:
    """The part of a result that `check` looks at: of attention the output without the lse."""
    return result[0] if isinstance(case, AttentionCase | VarlenCase) and isinstance(result, tuple) else result


def kernel_of(case: Case, arrays: dict[str, Any]) -> dict[str, Value]:
    """Name the kernel that a call of the forward takes, and its tile. On a GPU that depends on the architecture."""
    if not isinstance(case, AttentionCase | VarlenCase):
        return {}
    lengths = case.max_seqlens if isinstance(case, VarlenCase) else {}
    path = cuattn.forward_path(**arrays, **lengths, **case.options)
    return {"kernel": f"{path.kernel} {path.row.block_m}x{path.row.block_n}"}


def workspace_bytes(case: BackwardCase | VarlenBackwardCase, arrays: dict[str, Any]) -> int:
    """What a call allocates at its peak, beside its results."""
    with memory.allocations() as allocated:
        grads = case.run(arrays)
    results = [*gradients(grads).values(), *((arrays["out"], arrays["lse"]) if case.with_forward else ())]
    return allocated.peak_bytes - sum(int(x.nbytes) for x in results)


def host_records(suite: str, options: Options, case: Case) -> Iterator[Record]:
    """Run, check and time a case on the host executor, and the peers that are named on the CPU."""
    arrays = inputs.make(case, "host", options.seed)
    checked = check(case, arrays, output(case, case.run(arrays)))
    timing = time_host(lambda: case.run(arrays), budget_s=options.budget_s)
    metrics = {**timing.metrics(), **rates(case, timing, "host"), **checked}
    if isinstance(case, BackwardCase | VarlenBackwardCase):
        metrics["workspace_bytes"] = workspace_bytes(case, arrays)
    yield Record(suite, case.name, metrics, executor="host", method=HOST_METHOD, samples=timing.samples())
    kind = peer_kind(case)
    for peer in peers.of(kind, options.peers, "host") if kind else ():
        try:
            call = peer.prepare(case, arrays)
            checked = check(case, arrays, peers.as_array(call()))
            timing = time_host(call, budget_s=options.budget_s)
        except Exception as error:  # a peer may refuse in its own ways
            yield Record(suite, case.name, {}, peer.name, "host", CPU_METHOD, error=failure(error))
            continue
        metrics = {**timing.metrics(), **rates(case, timing, "host"), **checked}
        yield Record(suite, case.name, metrics, peer.name, "host", CPU_METHOD, samples=timing.samples())


class CudaBench:
    """Cases on a GPU: cuattn and its peers in turn, beside the ceilings of the same run."""

    def __init__(self, suite: str, options: Options) -> None:
        self.suite = suite
        self.options = options
        self.copy_gb_per_s: float | None = None
        self.matmul_tflop_per_s: float | None = None
        self._timer: CudaTimer | None = None

    @property
    def timer(self) -> CudaTimer:
        if self._timer is None:
            self._timer = CudaTimer()
        return self._timer

    def ceilings(self) -> Iterator[Record]:
        """Measure the ceilings, for the fractions in later records."""
        copy = ceilings.copy(self.timer)
        self.copy_gb_per_s = _number(copy.metrics["bandwidth_gb_per_s"])
        yield copy
        matmul = ceilings.matmul(self.timer)
        self.matmul_tflop_per_s = _number(matmul.metrics["tflop_per_s"])
        yield matmul

    def records(self, case: Case) -> Iterator[Record]:
        """One record for cuattn and each peer. Two rounds, so that a drift of the clock meets all of them."""
        arrays = inputs.make(case, "cuda", self.options.seed)
        calls: dict[str, Callable[[], Any]] = {}
        errors: dict[str, dict[str, Value]] = {}
        failures: dict[str, str] = {}
        kind = peer_kind(case)
        others = peers.of(kind, self.options.peers, "cuda") if kind else []
        waits = {peer.name for peer in others if peer.waits}
        for name, prepare in [("cuattn", _own), *((peer.name, peer.prepare) for peer in others)]:
            try:
                call = prepare(case, arrays)
                out = output(case, call())
                self.timer.synchronize()
                errors[name] = check(case, arrays, out if name == "cuattn" else peers.as_array(out))
                calls[name] = call
            except Exception as error:  # a peer may refuse in its own ways
                failures[name] = failure(error)
        timings: dict[str, Timing] = {}
        for _ in range(2):
            for name, call in calls.items():
                take = time_host if name in waits else self.timer.time
                timing = take(call, budget_s=self.options.budget_s / 2)
                timings[name] = timings[name] + timing if name in timings else timing
        best_peer = min((timing.median_us for name, timing in timings.items() if name != "cuattn"), default=None)
        for name, timing in timings.items():
            metrics = {**timing.metrics(), **self._rates(case, timing), **errors[name]}
            if name == "cuattn" and isinstance(case, BackwardCase | VarlenBackwardCase):
                metrics["workspace_bytes"] = workspace_bytes(case, arrays)
            if name == "cuattn":
                metrics |= kernel_of(case, arrays)
            if name == "cuattn" and best_peer is not None:
                metrics["speed_over_best_peer"] = significant(best_peer / timing.median_us, 3)
            method = WAITING_METHOD if name in waits else CUDA_METHOD
            yield Record(self.suite, case.name, metrics, name, "cuda", method, samples=timing.samples())
        for name, text in failures.items():
            yield Record(self.suite, case.name, {}, name, "cuda", CUDA_METHOD, error=text)
        self.timer.release_memory()

    def _rates(self, case: Case, timing: Timing) -> dict[str, Value]:
        result = rates(case, timing, "cuda")
        if isinstance(case, COMPUTING):
            if self.matmul_tflop_per_s:
                fraction = case.flops / timing.median_us / 1e6 / self.matmul_tflop_per_s
                result["fraction_of_matmul"] = significant(fraction, 3)
        elif self.copy_gb_per_s:
            fraction = case.num_bytes / timing.median_us / 1e3 / self.copy_gb_per_s
            result["fraction_of_copy"] = significant(fraction, 3)
        return result


def _own(case: Case, arrays: Any) -> Callable[[], Any]:
    return lambda: case.run(arrays)


def _number(value: Value) -> float | None:
    return float(value) if isinstance(value, int | float) else None
