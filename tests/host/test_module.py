"""`RawModule` and `RawKernel`: arguments, limits, caching, determinism, counters, interruption."""

from __future__ import annotations

import copy
import pickle
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
    (tmp_path / "k.cubin").write_bytes(b"\x7fELF\xff")
    with pytest.raises(errors.UnsupportedPTXError, match="no text"):
        host.RawModule(path=tmp_path / "k.cubin")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"code": ADD.encode()}, errors.ArgumentError, "code is a bytes"),
        ({"code": ADD + "\0"}, errors.ArgumentError, "NUL"),
        ({"code": ADD + "\ud800"}, errors.ArgumentError, "surrogates"),
        ({"code": ADD, "options": "-w"}, errors.ArgumentError, "options is '-w'"),
        ({"code": ADD, "name_expressions": "k"}, errors.ArgumentError, "name_expressions is 'k'"),
        ({"code": ADD, "backend": "nvcc"}, errors.NotSupportedError, "backend is 'nvcc'"),
        ({"code": ADD, "jitify": True}, errors.NotSupportedError, "jitify is True"),
        ({"code": ADD, "enable_cooperative_groups": True}, errors.NotSupportedError, "cooperative"),
    ],
)
def test_options_of_cupy_that_cannot_be_kept_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        host.RawModule(**options)


def test_the_source_may_be_the_first_argument_and_kernels_have_their_cplusplus_names():
    source = r"""
namespace n { template <class T, int K> __global__ void scale(T* x) { x[threadIdx.x] *= K; } }
extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1; }
"""
    module = host.RawModule(
        source, backend="nvrtc", name_expressions=["n::scale<float, 3>", "n::scale<int, -2>", "plain"]
    )
    x, y = np.ones(4, np.float32), np.ones(4, np.int32)
    with host.check("all"):
        module.get_function("n::scale<float, 3>")((1,), (4,), (x,), stream=None)
        module.get_function("n::scale<int, -2>")((1,), (4,), (y,))
        module.get_function("plain")((1,), (4,), (x,))
    assert (x.tolist(), y.tolist()) == ([4.0] * 4, [-2] * 4)
    with pytest.raises(errors.ArgumentError, match="no kernel 'n::scale<float, 4>'"):
        module.get_function("n::scale<float, 4>")
    with pytest.raises(errors.CompileError, match="name_expressions"):
        host.RawModule(source, name_expressions=["n::missing<3>"])


@pytest.mark.parametrize(
    "start",
    ["", "\n\n", "// .version\n/* .version 8.0 .target sm_80 */\n", "#if 0\n.version 8.0\n.target sm_80\n#endif\n"],
)
def test_members_named_version_and_target_do_not_make_a_source_ptx(start):
    source = (
        start
        + r"""
struct Header { int version, target; };
extern "C" __global__ void k(int* out) { Header h; h.version = 3; h.target = 4; out[0] = h.version * 10 + h.target; }
"""
    )
    out = np.zeros(1, np.int32)
    kernel(source)((1,), (1,), (out,))
    assert out[0] == 34


COUNTER = r"""
__device__ int counter = 7;
__constant__ int step = 2;
extern "C" __global__ void k(int* out) { counter += step; out[0] = counter; }
extern "C" __global__ void last(int* out) { out[0] = counter; }
"""


def launched(run):
    out = np.zeros(1, np.int32)
    with host.check("all"):
        run((1,), (1,), (out,))
    return int(out[0])


@pytest.mark.parametrize("duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_copied_module_has_variables_of_its_own(duplicate):
    module = host.RawModule(COUNTER)
    run = module.get_function("k")
    run.max_dynamic_shared_size_bytes = 100
    assert launched(run) == 9
    other, last = duplicate((run, module.get_function("last")))
    assert [launched(other), launched(other), launched(run)] == [9, 11, 11]
    assert launched(last) == 11  # kernels that are copied together share their module
    assert other.max_dynamic_shared_size_bytes == 100
    assert launched(duplicate(module).get_function("k")) == 9


def test_a_pickled_kernel_runs_in_another_process(tmp_path):
    (tmp_path / "kernel").write_bytes(pickle.dumps(kernel(COUNTER)))
    program = f"""
import pickle, numpy as np, cuattn.host as host
run = pickle.load(open({str(tmp_path / "kernel")!r}, "rb"))
out = np.zeros(1, np.int32)
with host.check("all"):
    run((1,), (1,), (out,))
print(out[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "9\n", done.stderr


def test_a_pickle_of_another_version_is_refused(monkeypatch):
    data = pickle.dumps(kernel(COUNTER))
    monkeypatch.setattr(module_under_test, "_translator_hash", lambda: "another")
    with pytest.raises(errors.ArgumentError, match="another version of cuattn"):
        pickle.loads(data)


def test_threads_that_ask_for_a_kernel_get_the_same_one():
    for _ in range(5):
        module, found = host.RawModule(COUNTER), []
        threads = [threading.Thread(target=lambda m=module, f=found: f.append(m.get_function("k"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1


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
