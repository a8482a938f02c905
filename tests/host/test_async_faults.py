"""A seeded fault for each rule of asynchronous kernels, and the right program beside it."""

from __future__ import annotations

import numpy as np
import pytest
from async_wrappers import SCHEDULES, compile_kernel, expect, results

from cuattn import errors

OUT = np.zeros(64, np.uint32)
BAR = "__shared__ alignas(8) u64 bars[4]; u32 b = smem(&bars[0]);\n"
ONE = BAR + "if (threadIdx.x == 0) { %s }"

# --- mbarriers


@pytest.mark.parametrize(
    ("body", "error", "match"),
    [
        ("init(b, 0);", errors.AsyncCopyError, "count of 0: allowed is 1 to 1048575"),
        ("init(b, 1); init(b, 1);", errors.AsyncCopyError, "where an mbarrier lives already"),
        ("arrive(b);", errors.AsyncCopyError, "no mbarrier at byte 0"),
        ("wait(b, 0);", errors.AsyncCopyError, "no mbarrier at byte 0"),
        ("init(b, 2); arrive_n(b, 3);", errors.AsyncCopyError, r"3 arrivals .* needs only 2 more \(of 2\)"),
        ("init(b, 2); arrive_n(b, 0);", errors.AsyncCopyError, "count of 0"),
        ("init(b, 2); arrive(b);", errors.AsyncCopyError, "middle of phase 0 .* 1 of 2 arrivals and 0 bytes"),
        ("init(b, 2); arrive_n(b, 2); arrive(b);", errors.AsyncCopyError, "phase 1 .* 1 of 2 arrivals"),
        ("init(b, 1); arrive_expect(b, 64); complete(b, 32);", errors.AsyncCopyError, "0 of 1 arrivals and 32 bytes"),
        ("init(b, 1); complete(b, 16); arrive(b);", errors.AsyncCopyError, "0 of 1 arrivals and -16 bytes"),
        ("init(b, 1); expect(b, 1048575); expect(b, 16);", errors.AsyncCopyError, "leave their range: 1048591"),
        ("init(b, 2); arrive(b); inval(b);", errors.AsyncCopyError, "inval in the middle of phase 0"),
        ("init(b, 1); u64 t = arrive(b); arrive(b); test(b, t);", errors.AsyncCopyError, "phase 0 .* in phase 2"),
        ("init(b + 4, 1);", errors.MemoryFaultError, "not aligned to 8"),
        ("init(b + 32, 1);", errors.MemoryFaultError, "outside the 32 bytes"),
        ("init(b, 1); out[0] = (u32)bars[0];", errors.MemoryFaultError, "read .* where an mbarrier lives"),
        ("init(b, 1); bars[0] = 0;", errors.MemoryFaultError, "where an mbarrier lives"),
    ],
)  # fmt: skip
def test_misuse_of_an_mbarrier(body, error, match):
    expect(error, match, ONE % body)


def test_no_complete_must_not_complete():
    body = 'init(b, 1); u64 t; asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 1;" : "=l"(t) : "r"(b));'
    expect(errors.AsyncCopyError, "noComplete completes phase 0", BAR + body, block=1)


def test_a_deadlock_says_who_waits_for_what():
    body = (
        BAR
        + """
    if (threadIdx.x == 0) { init(b, 2); init(b + 8, 1); }
    __syncthreads();
    if (threadIdx.x < 32) { if (threadIdx.x == 0) { arrive_expect(b + 8, 96); wait(b + 8, 0); } }
    else if (threadIdx.x < 96) { wait(b, 0); }
    else { named_sync(3, 64); }
    """
    )
    error = expect(errors.DeadlockError, "no warp can go on", body, block=160, schedules=SCHEDULES)
    text = str(error)
    assert (
        "warp 0: at the mbarrier at byte 8 for parity 0, which is in phase 0 with 0 of 1 arrivals and 96 bytes pending"
        in text
    )
    assert "warps 1 to 2: at the mbarrier at byte 0 for parity 0, which is in phase 0 with 2 of 2 arrivals" in text
    assert "warps 3 to 4: exited" in text  # the two complete their named barrier


def test_a_deadlock_at_a_named_barrier_and_at_a_cluster_barrier():
    body = "if (threadIdx.x < 32) named_sync(3, 64); else cluster_sync();"
    error = expect(errors.DeadlockError, "no warp can go on", body, block=64)
    assert "warp 0: at barrier 3, which has 32 of 64 threads" in str(error)
    assert "warp 1: at the cluster barrier" in str(error)


# --- order through mbarriers

HANDOVER = """
__shared__ alignas(8) u64 bar;
__shared__ u32 data[64];
u32 b = smem(&bar);
data[threadIdx.x] = 0;
if (threadIdx.x == 0) init(b, COUNT);
__syncthreads();
if (threadIdx.x < 32) {
  data[threadIdx.x] = threadIdx.x;
  WRITER
} else {
  READER
  out[threadIdx.x - 32] = data[63 - threadIdx.x];
}
"""


def handover(count: str, writer: str, reader: str) -> str:
    return HANDOVER.replace("COUNT", count).replace("WRITER", writer).replace("READER", reader)


ALL_ARRIVE, ALL_WAIT = "arrive(b);", "wait(b, 0);"
ONE_ARRIVES = "__syncwarp(); if (threadIdx.x == 0) arrive(b);"
ONE_WAITS = "if (threadIdx.x == 32) wait(b, 0); __syncwarp();"
RELAXED = 'asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" :: "r"(b) : "memory");'


@pytest.mark.parametrize(
    ("count", "writer", "reader"),
    [
        ("32", ALL_ARRIVE, ALL_WAIT),
        ("1", ONE_ARRIVES, ALL_WAIT),
        ("1", ONE_ARRIVES, ONE_WAITS),
        ("2", "__syncwarp(); if (threadIdx.x < 2) arrive(b);", ALL_WAIT),
    ],
)
def test_an_arrival_orders_what_its_thread_knows(count, writer, reader):
    out = results(compile_kernel(handover(count, writer, reader)), OUT, block=64)
    np.testing.assert_array_equal(out[:32], np.arange(31, -1, -1))


@pytest.mark.parametrize(
    ("count", "writer", "reader"),
    [
        ("32", ALL_ARRIVE, ""),  # no wait
        ("1", "if (threadIdx.x == 0) arrive(b); __syncwarp();", ALL_WAIT),  # the other 31 may not have written
        ("1", ONE_ARRIVES, "if (threadIdx.x == 32) wait(b, 0);"),  # the other 31 have not waited
        ("32", RELAXED, ALL_WAIT),
        ("1", "__syncwarp(); if (threadIdx.x == 0) arrive(b); data[threadIdx.x] = 1;", ALL_WAIT),  # a write too late
    ],
)
def test_what_an_arrival_does_not_order_is_a_race(count, writer, reader):
    expect(errors.RaceError, "races with", handover(count, writer, reader), block=64, schedules=SCHEDULES[:3])


def test_the_wrong_parity_passes_at_once_or_never():
    body = handover("32", ALL_ARRIVE, "wait(b, 1);")
    expect((errors.RaceError, errors.DeadlockError), "races|no warp can go on", body, block=64, schedules=SCHEDULES)


REUSE = """
__shared__ alignas(8) u64 full, empty;
__shared__ u32 slot;
if (threadIdx.x == 0) { init(smem(&full), 1); init(smem(&empty), 1); }
__syncthreads();
if (threadIdx.x == 0)
  for (int i = 0; i < 3; i++) { PRODUCER_WAIT slot = i; arrive(smem(&full)); }
if (threadIdx.x == 32)
  for (int i = 0; i < 3; i++) {
    wait(smem(&full), i % 2);
    EARLY
    out[i] = slot;
    LATE
  }
"""


def test_a_stage_must_be_read_before_it_is_given_back():
    right = REUSE.replace("PRODUCER_WAIT", "wait(smem(&empty), (i + 1) % 2);")
    out = results(compile_kernel(right.replace("EARLY", "").replace("LATE", "arrive(smem(&empty));")), OUT, block=64)
    assert out[:3].tolist() == [0, 1, 2]
    wrong = right.replace("EARLY", "arrive(smem(&empty));").replace("LATE", "")
    expect(errors.RaceError, "races with", wrong, block=64, schedules=SCHEDULES[:2])


def test_lanes_that_arrive_on_paths_of_their_own():
    body = (
        BAR
        + """
    __shared__ u32 value;
    if (threadIdx.x == 0) { init(b, ARRIVALS); value = 3; }
    __syncthreads();
    if (threadIdx.x < 32) {
      out[threadIdx.x] = value;                // all lanes read one place
      if (threadIdx.x < 16) arrive(b); else LATER
    } else if (threadIdx.x == 32) {
      wait(b, 0);
      value = 4;
    }"""
    )
    right = compile_kernel(body.replace("ARRIVALS", "32").replace("LATER", "{ arrive(b); }"))
    assert (results(right, OUT, block=64)[:32] == 3).all()
    expect(errors.RaceError, "races with", body.replace("ARRIVALS", "16").replace("LATER", "{ }"), block=64)


def test_initialisation_must_be_seen_before_use():
    body = BAR + "if (threadIdx.x == 0) init(b, 1); if (threadIdx.x == 32) arrive(b);"
    expect(errors.RaceError, "races with", body, block=64)


# --- the asynchronous proxy

FENCED = """
__shared__ alignas(16) u32 data[128];
BEFORE
data[threadIdx.x] = threadIdx.x;
AFTER_WRITE
__syncthreads();
if (threadIdx.x == 0) {
  BEFORE_COPY
  bulk_store(out, smem(data), 512);
  bulk_wait();
}
"""


def fenced(**places: str) -> str:
    body = FENCED
    for name in ("BEFORE_COPY", "BEFORE", "AFTER_WRITE"):
        body = body.replace(name, places.get(name.lower(), ""))
    return body


@pytest.mark.parametrize("place", ["after_write", "before_copy"])
def test_a_proxy_fence_by_the_writers_or_by_the_issuer(place):
    out = results(compile_kernel(fenced(**{place: "proxy_fence();"})), np.zeros(128, np.uint32), block=128)
    np.testing.assert_array_equal(out, np.arange(128))


@pytest.mark.parametrize("place", ["nowhere", "before"])
def test_a_missing_proxy_fence(place):
    body = fenced(**{place: "proxy_fence();"})
    expect(
        errors.AsyncCopyError,
        "no fence.proxy.async",
        body,
        out=np.zeros(128, np.uint32),
        block=128,
        schedules=SCHEDULES,
    )


def test_a_fence_of_some_writers_only():
    body = fenced(after_write="if (threadIdx.x != 77) proxy_fence();")
    error = expect(errors.AsyncCopyError, "no fence.proxy.async", body, out=np.zeros(128, np.uint32), block=128)
    assert "thread (77, 0, 0)" in str(error)


def test_an_asynchronous_write_over_what_was_stored_needs_a_fence_too():
    body = """
    __shared__ alignas(16) u32 data[64];
    __shared__ alignas(8) u64 bar;
    data[threadIdx.x] = 1;
    FENCE
    if (threadIdx.x == 0) { init(smem(&bar), 1); fence_init(); }
    __syncthreads();
    if (threadIdx.x == 0) { arrive_expect(smem(&bar), 256); bulk_load(smem(data), in, 256, smem(&bar)); }
    wait(smem(&bar), 0);
    out[threadIdx.x] = data[63 - threadIdx.x];
    """
    params = "u32* out, const u32* in"
    values = np.arange(64, dtype=np.uint32)
    right = compile_kernel(body.replace("FENCE", "proxy_fence();"), params=params)
    np.testing.assert_array_equal(results(right, OUT, values, block=64), values[::-1])
    expect(errors.AsyncCopyError, "no fence.proxy.async", body.replace("FENCE", ""), values, block=64, params=params)


# --- clusters

PAIR = "__cluster_dims__(2, 1, 1)"
PEEK = """
__shared__ u32 data[32];
data[threadIdx.x] = threadIdx.x;
FIRST
out[32 * blockIdx.x + threadIdx.x] = load_cluster(map_to(smem(&data[threadIdx.x]), 1 - cluster_rank()));
LAST
"""


@pytest.mark.parametrize(
    ("first", "last", "error", "match"),
    [
        ("__syncthreads();", "cluster_sync();", errors.KernelFault, "races with|nothing has written"),
        ("cluster_sync();", "", errors.MemoryFaultError, "all its threads have exited"),
        ("cluster_sync();", "data[threadIdx.x] = 0; cluster_sync();", errors.RaceError, "races with"),
        ("RELAXED cluster_wait();", "cluster_sync();", errors.KernelFault, "races with|nothing has written"),
        ("cluster_arrive(); cluster_arrive();", "", errors.DivergenceError, "arrive twice"),
        ("cluster_wait();", "", errors.DivergenceError, "without a barrier.cluster.arrive"),
    ],
)
def test_faults_of_clusters(first, last, error, match):
    relaxed = 'asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");'
    body = PEEK.replace("FIRST", first.replace("RELAXED", relaxed)).replace("LAST", last)
    expect(error, match, body, grid=2, bounds=PAIR, schedules=SCHEDULES[:2])


def test_global_memory_that_another_cta_of_the_cluster_writes():
    body = "out[threadIdx.x] = 1; __syncthreads();"
    expect(errors.RaceError, r"of CTA \(0, 0, 0\)", body, grid=2, bounds=PAIR)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("map_to(smem(data), 2)", "mapa to CTA 2 of a cluster of 2"),
        ("load_cluster(smem(data) + (3 << 24))", "means CTA 2 of a cluster of 2"),
        ("load_cluster(map_to(smem(data), 1) + 4096)", "outside the 128 bytes of CTA 1"),
        ("load_cluster(map_to(smem(data), 1) + 2)", "misaligned"),
    ],
)
def test_addresses_outside_the_cluster(body, match):
    code = f"__shared__ u32 data[32]; data[threadIdx.x] = 0; cluster_sync(); out[threadIdx.x] = {body}; cluster_sync();"
    expect(errors.MemoryFaultError, match, code, grid=2, bounds=PAIR)


def test_a_cluster_address_is_no_address_of_the_own_cta():
    body = """
    __shared__ u32 data[32];
    data[threadIdx.x] = 0;
    cluster_sync();
    u32 v;
    asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(map_to(smem(data), 1 - cluster_rank())) : "memory");
    out[threadIdx.x] = v;
    """
    expect(errors.MemoryFaultError, "outside the CTA's", body, grid=2, bounds=PAIR)


# --- setmaxnreg

BOUNDS = "__launch_bounds__(256, 1)"  # 248 registers a thread to start with


@pytest.mark.parametrize(
    ("body", "error", "match"),
    [
        ("registers_inc<256>();", errors.DeadlockError, "at setmaxnreg, 0 registers are free"),
        ("registers_inc<240>();", errors.DivergenceError, "setmaxnreg.inc to 240 registers from 248"),
        ("registers_dec<40>(); registers_dec<48>();", errors.DivergenceError, "setmaxnreg.dec to 48 registers from 40"),
        ("if (threadIdx.x < 32) registers_dec<40>();", errors.DivergenceError, "did not execute the same setmaxnreg"),
        ("if (threadIdx.x % 2) registers_dec<40>();", errors.DivergenceError, "lanes"),
    ],
)
def test_faults_of_setmaxnreg(body, error, match):
    expect(error, match, body, block=256, bounds=BOUNDS)


@pytest.mark.parametrize(
    ("body", "options", "match"),
    [
        ("registers_dec<41>();", {"bounds": BOUNDS}, "multiple of 8 from 24 to 256"),
        ("registers_dec<16>();", {"bounds": BOUNDS}, "multiple of 8 from 24 to 256"),
        ("registers_dec<40>();", {}, "ptxas ignores it"),
        ("registers_dec<40>();", {"bounds": BOUNDS, "arch": "sm_90"}, "needs sm_90a"),
        ("init(smem(out), 1); wait(0, 0);", {"arch": "sm_80"}, "needs sm_90 or newer"),
    ],
)
def test_what_the_target_does_not_have_is_refused(body, options, match):
    with pytest.raises(errors.UnsupportedPTXError, match=match):
        compile_kernel(body, **options)
