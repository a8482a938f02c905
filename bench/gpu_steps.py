"""The steps of `bench.gpu_check`, each run as ``python -m bench.gpu_steps NAME`` in a process of its own.

A step writes what it knows to ``NAME.json`` as it goes, so that little is lost if it is ended early.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from cuattn import BlockMask, compile
from cuattn.benchmark import Options, cuda_calls, gradients, machine, operations, option_costs, start
from cuattn.benchmark import decode as decoding
from cuattn.benchmark import seed as published
from cuattn.benchmark.results import scrub
from cuattn.benchmark.suite import Step as SuiteStep
from cuattn.ops.attention.forward.hopper_config import ARCH, HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.forward.hopper_listed import HOPPER_LISTED_CONFIGS
from cuattn.ops.differential.hopper_config import HOPPER_DIFFERENTIAL_CONFIGS, HopperDifferentialConfig
from cuattn.ops.differential.launch import DifferentialState
from cuattn.testing import assert_attention_close, kernels
from cuattn.testing.backward_cases import BackwardCase
from cuattn.testing.cases import AttentionCase, SoftmaxCase
from cuattn.testing.decode_cases import DecodeCase
from cuattn.testing.differential_tolerance import assert_differential_close
from cuattn.testing.executors import ExecutorUnderTest
from cuattn.testing.strategies import fill

from .gpu_run import Run, end_with_parent


def environment(run: Run) -> None:
    """Hardware, driver, versions, and what kernels will be compiled for."""
    from cuattn.compile import nvrtc

    run.detail["environment"] = machine.describe()
    library = nvrtc.library()
    run.detail["nvrtc_library"] = {"version": library.version, "archs": list(library.supported_archs())}
    if run.executor == "cuda":
        capability = run.detail["environment"].get("compute_capability")
        if capability is None:
            raise RuntimeError("no GPU answers: is there a driver, and a CuPy for its CUDA version?")
        target = compile.for_device(divmod(int(capability), 10))
        run.detail["target"] = {"arch": target.arch, "kind": target.kind}
    found = run.detail["environment"]
    run.summary = f"{found['gpu'] or found['cpu']}, NVRTC {library.version}, {found['cupy']}, torch {found['torch']}"


def smoke(run: Run) -> None:
    """Small problems of every dtype under the strict rule of the tests, on the portable kernels."""
    executor = ExecutorUnderTest(run.executor)
    seqlen = 70 if run.is_tiny else 333
    cases: list[AttentionCase | SoftmaxCase | BackwardCase | DecodeCase] = [
        AttentionCase(2, seqlen, 4, 64, num_kv_heads=2, dtype=dtype, causal=causal)
        for dtype in ("float16", "bfloat16", "float32", "float64")
        for causal in (False, True)
    ]
    cases += [AttentionCase(1, seqlen, 2, 128, head_dim_v=80), AttentionCase(1, 1, 2, 256, seqlen_k=seqlen)]
    cases += [SoftmaxCase(37, 1000, dtype) for dtype in ("float16", "bfloat16", "float32")]
    cases += [
        BackwardCase(AttentionCase(2, seqlen, 4, 64, num_kv_heads=2, dtype=dtype, causal=True), dlse=True)
        for dtype in ("float16", "bfloat16", "float32", "float64")
    ]
    cases += [BackwardCase(AttentionCase(1, seqlen, 2, 256)), SoftmaxCase(3, 70000)]
    cases += [
        DecodeCase(2, seqlen, 4, 2, 64, dtype, page_size=page_size, num_splits=3)
        for dtype in ("float16", "bfloat16", "float32", "float64")
        for page_size in (16, 0)
    ]
    cases += [DecodeCase(2, seqlen, 8, 2, 128, kv_format=name, seqlen_q=4) for name in ("e4m3fn", "int8", "nvfp4")]

    def check(case: AttentionCase | SoftmaxCase | BackwardCase | DecodeCase) -> None:
        inputs = case.make_inputs(0, executor.xp)
        case.check(inputs, case.run(inputs))

    chosen = cases[:: 4 if run.is_tiny else 1]
    _try_all(run, executor, {case.name: partial(check, case) for case in chosen})


def hopper(run: Run) -> None:
    """Every row of the Hopper kernel under the same rule; unless all are right, later steps do without the kernel."""
    executor = ExecutorUnderTest(run.executor)
    if run.executor == "cuda" and executor.xp.cuda.Device().compute_capability != "90":
        run.summary = "the GPU has another compute capability than 9.0"
        return
    rows = HOPPER_FWD_CONFIGS[:1] if run.is_tiny else HOPPER_FWD_CONFIGS

    def check(row: HopperFwdConfig, causal: bool) -> None:
        dtype = ml_dtypes.float8_e4m3fn if row.itemsize == 1 else ml_dtypes.bfloat16
        precision = "fp8" if row.itemsize == 1 else None
        seqlens = row.block_m + 9, 3 * row.block_n + 5, 3 * row.block_n + 5
        head_dims = row.max_head_dim, row.max_head_dim, row.max_head_dim_v
        rng = np.random.default_rng(0)
        arrays = [fill((2, n, 2, d), dtype, "normal", rng) for n, d in zip(seqlens, head_dims, strict=True)]
        moved = [executor.array(x) for x in arrays]
        out, lse = kernels.attention(*moved, config=row, causal=causal, precision=precision, return_lse=True)
        lse = executor.numpy(lse)
        assert_attention_close(executor.numpy(out), *arrays, lse=lse, causal=causal, precision=precision)

    checks = {
        f"{row.block_m}x{row.block_n} d{row.max_head_dim} {8 * row.itemsize} bits" + " causal" * causal: partial(
            check, row, causal
        )
        for row in rows
        for causal in (False, True)
    }
    listed = () if run.is_tiny else HOPPER_LISTED_CONFIGS
    names = (f"{row.block_m}x{row.block_n} d{row.max_head_dim} over a list of tiles" for row in listed)
    checks |= {name: partial(_check_listed, executor, row) for name, row in zip(names, listed, strict=True)}

    def check_pairs(row: HopperDifferentialConfig, head_dim: int, shared: bool) -> None:
        seqlens = row.block_m + 9, 3 * row.block_n + 5, 3 * row.block_n + 5
        sizes = (4, head_dim), (2 if shared else 4, head_dim), (2, row.max_head_dim_v)
        rng = np.random.default_rng(0)
        arrays = [
            fill((2, n, *size), ml_dtypes.bfloat16, "normal", rng) for n, size in zip(seqlens, sizes, strict=True)
        ]
        moved = [executor.array(x) for x in arrays]
        found = kernels.differential_attention(*moved, 0.6, config=row, causal=True, return_state=True)
        out, state = executor.numpy(found[0]), DifferentialState(*map(executor.numpy, found[1]))
        assert_differential_close(out, *arrays, 0.6, state=state, causal=True)

    checks |= {
        f"differential {row.block_m}x{row.block_n} d{head_dim}" + " shared" * shared: partial(
            check_pairs, row, head_dim, shared
        )
        for row in HOPPER_DIFFERENTIAL_CONFIGS
        for shared in (False, True)
        for head_dim in (64, 128)
        if not run.is_tiny
        and row.is_legal(head_dim, row.max_head_dim_v, compile.smem_limit_bytes(ARCH), shared_keys=shared)
    }
    _try_all(run, executor, checks)


def _check_listed(executor: ExecutorUnderTest, row: HopperFwdConfig) -> None:
    """A row with half of the blocks of a mask, drawn, and a causal mask if it takes bounds."""
    rng, n, d = np.random.default_rng(0), 500, row.max_head_dim
    blocks = rng.random((4, 16)) < 0.5
    mask = BlockMask.from_blocks(blocks, n, n, (128, 32))
    arrays = [fill((2, n, 2, d), ml_dtypes.bfloat16, "normal", rng) for _ in range(3)]
    moved = [executor.array(x) for x in arrays]
    out, lse = kernels.block_sparse_attention(*moved, mask, config=row, causal=row.chunks, return_lse=True)
    lse = executor.numpy(lse)
    assert_attention_close(executor.numpy(out), *arrays, lse=lse, causal=row.chunks, mask=mask.todense())


def _try_all(run: Run, executor: ExecutorUnderTest, checks: dict[str, Callable[[], None]]) -> None:
    def on_executor(check: Callable[[], None]) -> None:
        with executor.active():
            check()

    run.try_all({name: partial(on_executor, check) for name, check in checks.items()})


def instructions(run: Run) -> None:
    """The instruction table, and where this machine differs from it."""
    from . import instruction_fixtures

    families, run.complete = instruction_fixtures.run_table(run.executor, run.out, tiny=run.is_tiny, until=run.until)
    run.detail["families"] = families
    totals = (sum(row[name] for row in families.values()) for name in ("cases", "different", "refused"))
    cases, different, errors = totals
    run.failed = bool(errors)  # a difference is a finding about the table, not a failure of the run
    run.summary = f"{cases} instructions, {different} differ from the table, {errors} could not run"


def tests(run: Run) -> None:
    """The test suite on this executor."""
    from . import device_tests

    result = device_tests.run(run.executor, run.tests, run.out, until=run.until)
    run.detail.update(result)
    run.failed = result["failed"] > 0 or result["passed"] == 0 or result["exit_code"] in (3, 4)
    run.complete = not result["stopped"]
    run.summary = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    run.summary += "; stopped when the time was up" if result["stopped"] else ""


TELLING_SEQLENS = (8192, 2048)


def forward(run: Run) -> None:
    """Speed of the forward at two lengths and every head dim, beside torch's back ends and installed wheels."""
    chosen = replace(_options(run), seqlens=TELLING_SEQLENS)
    cases = operations.attention_cases(chosen, run.executor)
    if run.is_tiny:
        cases = [replace(case, seqlen_q=32) for case in cases[:2]]
    run.measure(operations.case_steps("attention", cases, chosen))


def attention(run: Run) -> None:
    """Speed of the forward at the other lengths."""
    chosen = _options(run)
    cases = [case for case in operations.attention_cases(chosen, run.executor) if case.seqlen_q not in TELLING_SEQLENS]
    run.measure(operations.case_steps("attention", cases[:2] if run.is_tiny else cases, chosen))


def backward(run: Run) -> None:
    """The gradients beside torch's autograd, alone and with the forward; each option; in a fixed order and in any."""
    chosen = _options(run)
    cases = gradients.backward_cases(chosen, run.executor)
    run.measure(operations.case_steps("backward", cases[:2] if run.is_tiny else cases, chosen))


def decode(run: Run) -> None:
    """Decoding over caches of many lengths and formats; plans; generations, contiguous and paged."""
    steps = decoding.decode_steps(_options(run))
    run.measure(steps[:2] if run.is_tiny else steps)


def softmax(run: Run) -> None:
    """Speed of softmax beside torch, and as a fraction of a copy."""
    chosen = _options(run)
    cases = operations.softmax_cases(chosen, run.executor)
    run.measure(operations.case_steps("softmax", cases[:1] if run.is_tiny else cases, chosen))


def options(run: Run) -> None:
    """What each option of attention costs beside the plain kernel."""
    steps = option_costs.option_steps(_options(run))
    run.measure(steps[:2] if run.is_tiny else steps)


def seed(run: Run) -> None:
    """Time and peak memory, fused beside unfused."""
    steps = published.seed_steps(_options(run))
    run.measure(steps[:1] if run.is_tiny else steps)


def layout(run: Run) -> None:
    """Rotary embedding, splitting, packing, merging; packed attention."""
    steps = operations.layout_steps(_options(run))
    run.measure(steps[:2] if run.is_tiny else steps)


#: What is timed beside cuattn: not what compiles for seconds a problem, nor what nobody would use for speed.
PEERS = (
    *("torch cuDNN", "torch FLASH", "torch EFFICIENT", "torch SDPA", "torch", "CuPy, unfused"),
    *("flash-attn 2", "flash-attn 3", "flash-attn 4", "fla"),
)


def _options(run: Run) -> Options:
    peers = PEERS if run.executor == "cuda" else False
    return Options(executor=run.executor, budget_s=0.05 if run.is_tiny else 0.4, peers=peers)


def latency(run: Run) -> None:
    """Compiling, loading, Python a call."""
    if run.is_tiny:
        run.measure([SuiteStep("latency", "translation", 1.0, start.translation)])
    else:  # what needs no host executor, which may not be compiled here
        run.measure([*cuda_calls.call_steps(), SuiteStep("latency", "import", 4.0, start.importing)])


@dataclass(frozen=True)
class Step:
    """One step: what it is, at most how long it may take, and with how little time it is not worth beginning."""

    run: Callable[[Run], None]
    budget_s: float
    least_s: float = 5.0

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").strip().rstrip(".")


#: Most valuable first. The budgets are limits; what one step leaves of its time, later ones have.
STEPS = (
    Step(environment, 40),
    Step(smoke, 60),
    Step(hopper, 60),
    Step(instructions, 60),
    Step(forward, 90),
    Step(backward, 90),
    Step(decode, 70),
    Step(tests, 150, 15),
    Step(attention, 60, 15),
    Step(options, 40, 10),
    Step(seed, 25, 10),
    Step(layout, 25, 10),
    Step(softmax, 25, 10),
    Step(latency, 40, 10),
)
NAMES = tuple(step.name for step in STEPS)


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--executor", type=click.Choice(("cuda", "host")), required=True)
@click.option("--seconds", type=float, required=True)
@click.option("--spawned", type=float, default=time.time, help="time.time() when the process was asked for.")
@click.option("--tests", "test_paths", multiple=True)
def main(name: str, out: Path, executor: str, seconds: float, spawned: float, test_paths: tuple[str, ...]) -> None:
    """Run one step."""
    step = STEPS[NAMES.index(name)]
    startup_s = round(time.time() - spawned, 2)
    run = Run.resumed(name, out, executor, seconds - startup_s, test_paths)
    run.detail["startup_s"] = startup_s
    run.save()
    try:
        step.run(run)
    except BaseException:
        run.save("failed", scrub(traceback.format_exc()))
        raise
    run.save("unfinished" if not run.complete else "failed" if run.failed else "ok")
    sys.exit(run.failed)


if __name__ == "__main__":
    end_with_parent()
    main()
