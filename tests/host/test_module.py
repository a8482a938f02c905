"""`RawModule` and `RawKernel`: arguments, limits, caching, determinism, counters, interruption."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors
from cuattn.host import module as module_under_test
from cuattn.host import ptx, table

ADD = r"""
extern "C" __global__ void k(const float* x, float* y, int n, float a) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + a;
}
"""


def arguments(n=100):
    return np.arange(n, dtype=np.float32), np.zeros(n, np.float32), np.int32(n), np.float32(0.5)


def kernel(code=ADD, name="k", **options):
    return host.RawModule(code=code, **options).get_function(name)


def test_a_kernel_runs_and_fills_only_its_part():
    x, y, _, a = arguments()
    kernel()((1,), (128,), (x, y, np.int32(60), a))
    assert (y[:60] == x[:60] + 0.5).all() and (y[60:] == 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a[:-1], "3 arguments, the kernel takes 4"),
        (lambda a: (a[0], a[1], 100, a[3]), "argument 2 .int. has 8 bytes, the kernel's parameter 4"),
        (lambda a: (a[0], a[1], a[2], "x"), "argument 3 is a str"),
        (lambda a: (np.float32(1), *a[1:]), "argument 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(change, match):
    args = arguments()
    with pytest.raises(errors.LaunchError, match=match):
        kernel()((1,), (128,), change(args))
    assert (args[1] == 0).all()


@pytest.mark.parametrize(
    ("grid", "block", "smem", "match"),
    [
        ((0,), (32,), 0, "grid.x is 0"),
        ((1, 70000), (32,), 0, "grid.y is 70000"),
        ((65536, 1024, 64), (32,), 0, "more CTAs"),
        ((1,), (1025,), 0, "block.x is 1025"),
        ((1,), (64, 32), 0, "2048 threads"),
        ((1,), (32,), 49153, "max_dynamic_shared_size_bytes"),
        ((1,), (32,), -1, "shared_mem is -1"),
        ((1, 1, 1, 1), (32,), 0, "4 extents"),
    ],
)
def test_illegal_launches_are_refused(grid, block, smem, match):
    with pytest.raises(errors.LaunchError, match=match):
        kernel()(grid, block, arguments(), shared_mem=smem)


def test_shared_memory_is_limited_by_the_architecture():
    big = kernel()
    big.max_dynamic_shared_size_bytes = 1 << 20
    with pytest.raises(errors.LaunchError, match="166912"):
        big((1,), (32,), arguments(), shared_mem=164 * 1024)


def test_launch_bounds_are_kept():
    with pytest.raises(errors.LaunchError, match="at most 64"):
        kernel(ADD.replace("void k", "void __launch_bounds__(64) k"))((1,), (128,), arguments())


def test_a_module_needs_one_source_and_knows_its_kernels(tmp_path):
    with pytest.raises(errors.ArgumentError, match="exactly one"):
        host.RawModule()
    with pytest.raises(errors.ArgumentError, match="exactly one"):
        host.RawModule(code=ADD, path=tmp_path)
    with pytest.raises(errors.ArgumentError, match="no kernel 'other': the module has k"):
        host.RawModule(code=ADD).get_function("other")
    with pytest.raises(errors.CompileError):
        host.RawModule(code="this is no CUDA")
    with pytest.raises(errors.UnsupportedPTXError, match="no kernel"):
        host.RawModule(code=".version 8.0\n.target sm_80\n.address_size 64\n")


def test_a_ptx_file_runs(tmp_path):
    from cuattn.compile import build_source

    path = tmp_path / "add.ptx"
    path.write_bytes(build_source(ADD, name="add", arch="sm_80", kind="ptx").image)
    x, y, n, a = arguments()
    host.RawModule(path=path).get_function("k")((1,), (128,), (x, y, n, a))
    assert (y == x + 0.5).all()


def test_fields_of_a_struct_from_an_address_inside_it():
    """The compiler moves the address of a large parameter to its middle, and finds fields on both sides of it."""
    code = """
.version 7.1
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out, .param .align 4 .b8 fields[16])
{
.reg .b64 %out, %p, %middle, %end; .reg .b32 %first, %last;
ld.param.u64 %out, [out];
mov.b64 %p, fields; add.s64 %middle, %p, 8; add.s64 %end, %middle, 8;
ld.param.u32 %first, [%middle+-8]; ld.param.u32 %last, [%end+-4];
st.global.u32 [%out], %first; st.global.u32 [%out+4], %last;
ret;
}
"""
    out = np.zeros(2, np.uint32)
    host.RawModule(code=code).get_function("k")((1,), (1,), (out, np.void(np.arange(5, 9, dtype=np.uint32).tobytes())))
    assert out.tolist() == [5, 8]


def test_tables_come_from_the_cache(monkeypatch):
    kernel()
    module_under_test._translate.cache_clear()
    monkeypatch.setattr(ptx, "parse", lambda text: pytest.fail("parsed again"))
    x, y, n, a = arguments()
    kernel()((1,), (128,), (x, y, n, a))
    assert (y == x + 0.5).all()
    module_under_test._translate.cache_clear()


def test_instructions_above_the_target_are_refused():
    code = r"""
extern "C" __global__ void k(unsigned* y) {
  __shared__ uint4 s[8];
  unsigned at = (unsigned)__cvta_generic_to_shared(s + threadIdx.x % 8);
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" :: "r"(at), "r"(y[0]) : "memory");
}
"""
    with pytest.raises(errors.UnsupportedPTXError, match="sm_90"):
        host.RawModule(code=code, arch="sm_80")
    host.RawModule(code=code, arch="sm_90")


def test_one_kernel_may_run_from_several_threads():
    run = kernel()
    results = []

    def work(seed):
        x, y, n, _ = arguments(1000)
        for _ in range(20):
            run((8,), (128,), (x, y, n, np.float32(seed)))
            results.append(bool((y == x + seed).all()))

    with host.check("all"):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 80 and all(results)


def test_the_same_seed_gives_the_same_order():
    code = r"""
extern "C" __global__ void k(unsigned* next, int* order) {
  if (threadIdx.x % 32 == 0) order[atomicAdd(next, 1u)] = blockIdx.x * 4 + threadIdx.x / 32;
}
"""
    run = kernel(code)

    def order(mode, seed):
        counter, out = np.zeros(1, np.uint32), np.zeros(64, np.int32)
        with host.schedule(mode, seed, threads=1):
            run((16,), (128,), (counter, out))
        assert sorted(out) == list(range(64))
        return out.tolist()

    assert order("eager", 0) == list(range(64))
    assert order("random", 1) == order("random", 1)
    assert order("random", 1) != order("random", 2)


def test_settings_are_restored_and_validated():
    before = host.current()
    with host.check("mem"):
        assert host.current().checks == {"mem"}
        with host.check(), host.schedule("random", 3, threads=1):
            assert host.current().checks == frozenset()
            assert (host.current().seed, host.current().threads) == (3, 1)
        assert host.current().checks == {"mem"}
    assert host.current() == before
    for wrong in (lambda: host.check("memory"), lambda: host.schedule("soon"), lambda: host.schedule("late", -1),
                  lambda: host.schedule("late", threads=0)):  # fmt: skip
        with pytest.raises(errors.ArgumentError):
            wrong()
    assert host.current() == before


def test_counters_count_what_runs():
    x, y, n, a = arguments(100)
    with host.profile() as p:
        kernel()((1,), (128,), (x, y, n, a))
    assert p.launches == 1
    assert p.bytes["global"] == {"read": 400, "write": 400}
    assert p.opcodes["ld.global.f32"] + p.opcodes["ld.global.nc.f32"] == 4
    assert p.opcodes["st.global.f32"] == 4
    assert p.opcodes["add.f32"] == 4
    assert 0.9 < p.active_lane_fraction < 1.0
    assert sum(p.lines.values()) == p.warp_instructions
    with host.profile() as empty:
        pass
    assert empty.warp_instructions == 0


def test_translation_is_quick():
    from cuattn.compile import build_source

    code = 'extern "C" __global__ void k(float* y, const float* x) {\n  float a = x[threadIdx.x];\n'
    code += "".join(f"  a = a * x[{i}] + {i}.5f;\n" for i in range(1000))
    code += "  y[threadIdx.x] = a;\n}\n"
    text = build_source(code, name="long", arch="sm_80", kind="ptx").image.decode()
    assert text.count("\n") > 3000
    best = 1.0
    for _ in range(5):
        start = time.process_time()
        parsed = ptx.parse(text)
        table.build_table(parsed, parsed.entries["k"])
        best = min(best, time.process_time() - start)
    assert best < 0.2


@pytest.mark.parametrize(("grid", "steps"), [(4096, "1000000"), (1, "1 << 31")])
def test_a_long_launch_can_be_interrupted(grid, steps):
    """In a process of its own: the signal must reach a main thread that waits for a launch."""
    program = r'''
import os, signal, threading, numpy as np, cuattn.host as host
kernel = host.RawModule(code="""
extern "C" __global__ void k(float* y, long long n) {
  float a = 0;
  for (long long i = 0; i < n; i++) a = a * 0.5f + i;
  y[blockIdx.x] = a;
}""").get_function("k")
y = np.zeros(4096, np.float32)
kernel((1,), (32,), (y, 1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may start with it ignored
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    kernel((GRID,), (256,), (y, STEPS))
except KeyboardInterrupt:
    print("interrupted")
'''
    program = program.replace("GRID", str(grid)).replace("STEPS", steps)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "interrupted\n", done.stderr


def test_without_a_compiler_the_reason_is_told(monkeypatch, tmp_path):
    from cuattn.host import build, library

    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(build, "library_name", lambda: "cuattn_host-absent.so")
    monkeypatch.setenv("CUATTN_CC", "no-such-compiler")
    with pytest.raises(errors.HostUnavailableError, match=r"no-such-compiler.*was not found"):
        kernel()((1,), (32,), arguments(10))
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'broken compiler' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CUATTN_CC", str(failing))
    with pytest.raises(errors.HostUnavailableError, match="broken compiler"):
        kernel()((1,), (32,), arguments(10))
