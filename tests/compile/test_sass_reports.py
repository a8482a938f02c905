"""Reports on compiled kernels: their loops, bounds, and the remarks of ptxas."""

from __future__ import annotations

import json

from cuattn import compile as cc
from cuattn.compile import sass
from cuattn.compile.ptxas_notes import notes

LOOP = """
extern "C" __global__ void loop(const float* x, float* y, int n) {
    float a = x[threadIdx.x], b = a, c = a, d = a;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
        a = fmaf(a, b, 1.0f), b = fmaf(b, c, 1.0f), c = fmaf(c, d, 1.0f), d = fmaf(d, a, 1.0f);
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a));
    }
    y[threadIdx.x] = a + b + c + d;
}
extern "C" __global__ void array(const int* x, float* y) {
    float room[64];
    for (int i = 0; i < 64; ++i) room[i] = y[i];
    for (int i = 0; i < 64; ++i) room[x[i] & 63] += 1.0f;
    for (int i = 0; i < 64; ++i) y[i] = room[(x[i] + i) & 63];
}
"""


def test_a_loop_of_a_real_kernel():
    binary = cc.build_source(LOOP, name="loop.cu", arch="sm_90a", kind="cubin")
    reports = sass.inspect(binary)
    assert set(reports) == {"loop", "array"}
    report = reports["loop"]
    assert (report.work, report.looped, report.local_accesses, report.notes, report.bulk) == (
        *("multiply-adds", True, 0),
        *((), {}),
    )
    assert (report.main.counts["ffma"], report.main.counts["exp2"]) == (4, 1)
    assert "load_global" not in report.main.counts
    assert report.main.bound.cycles["special"] == 8
    assert reports["array"].local_accesses > 0
    assert json.loads(json.dumps(report.to_dict()))["loops"][0]["bound"]["limit"] == report.main.bound.limit


def test_other_architectures_are_counted_without_bounds():
    binary = cc.build_source(LOOP, name="loop.cu", arch="sm_80", kind="cubin")
    report = sass.inspect(binary)["loop"]
    assert report.main.counts["ffma"] == 4
    assert report.main.bound is None


WGMMA = """
__device__ __forceinline__ void product(float (&d)[4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}
extern "C" __global__ void BOUNDS matrix(float* y, unsigned long long a, int n) {
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        float d[4] = {y[threadIdx.x], y[threadIdx.x + 1], y[threadIdx.x + 2], y[threadIdx.x + 3]};
#pragma unroll 1
        for (int i = 0; i < n; ++i) {
            FENCE
            for (int k = 0; k < 4; ++k) product(d, a + 2 * k, a + 64 + 2 * k + i);
            asm volatile("wgmma.commit_group.sync.aligned;\\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
            for (int k = 0; k < 4; ++k) d[k] *= 0.5f;
        }
        for (int k = 0; k < 4; ++k) y[threadIdx.x + k] = d[k];
    }
}
"""


def matrix_report(bounds: str = "__launch_bounds__(256, 1)", fence: bool = True) -> sass.KernelReport:
    fences = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");' if fence else ""
    text = WGMMA.replace("BOUNDS", bounds).replace("FENCE", fences)
    return sass.inspect(cc.build_source(text, name="matrix.cu", arch="sm_90a", kind="cubin"))["matrix"]


def test_wgmma_and_setmaxnreg():
    report = matrix_report()
    assert report.notes == ()
    assert report.setmaxnreg == {"increase": (232,), "decrease": (40,)}
    assert report.work == "matrix products"
    main = report.main
    assert (main.counts["wgmma"], main.counts["fmul"]) == (4, 4)
    assert main.matrix == {"HGMMA.64x8x16.F32.BF16": 4}
    assert (main.matrix_groups, main.matrix_waits) == (1, 1)


def test_remarks_of_ptxas_reach_the_report():
    """setmaxnreg without bounds for the registers at entry; a fence that is missing."""
    (ignored,) = matrix_report(bounds="").notes
    assert (ignored.code, ignored.function) == ("C7508", "")
    assert "'setmaxnreg' ignored" in ignored.text
    injected = matrix_report(fence=False).notes
    assert {(note.code, note.function) for note in injected} == {("C7519", "matrix")}


def test_remarks_in_a_log():
    log = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function 'f'
ptxas info    : 2 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : (C7519) warpgroup.arrive is injected in around line 12 by compiler to allow x in function 'g'
ptxas info    : Used 168 registers, used 1 barriers
"""
    assert [(note.code, note.function) for note in notes(log)] == [("C7510", "f"), ("C7519", "g")]
    assert notes(log)[0].text.startswith("Potential Performance Loss")
    assert notes("") == ()
