"""mbarriers: phases, parities, tokens, counts and bytes, worked out by hand from the PTX ISA; waiting; setmaxnreg."""

from __future__ import annotations

import numpy as np
from async_wrappers import compile_kernel, results, run

OUT = np.zeros(64, np.uint32)
FRESH = "__shared__ alignas(8) u64 bars[4]; u32 b = smem(&bars[0]);\n"


def values(body: str, count: int, **options) -> list[int]:
    """What one thread notes with NOTE(x), under every schedule."""
    code = FRESH + "int at = 0;\n#define NOTE(x) out[at++] = (x)\nif (threadIdx.x == 0) {\n" + body + "\n}"
    return results(compile_kernel(code, **options), OUT)[:count].tolist()


def test_a_fresh_mbarrier_passes_parity_one_and_not_zero():
    assert values("init(b, 2); NOTE(test_parity(b, 1)); NOTE(test_parity(b, 0));", 2) == [1, 0]


def test_each_completed_phase_flips_the_parity():
    body = """
    init(b, 1);
    for (int phase = 0; phase < 4; phase++) {
      arrive(b);
      NOTE(test_parity(b, 0));
      NOTE(test_parity(b, 1));
    }"""
    assert values(body, 8) == [1, 0, 0, 1, 1, 0, 0, 1]


def test_a_token_is_done_when_its_phase_is_and_counts_what_was_pending():
    body = """
    init(b, 5);
    u64 first = arrive_n(b, 3);
    NOTE(pending(first)); NOTE(test(b, first));
    u64 second = arrive(b), third = arrive(b), fourth = arrive(b);
    NOTE(pending(second)); NOTE(pending(third)); NOTE(test(b, first)); NOTE(test(b, third));
    NOTE(pending(fourth)); NOTE(test(b, fourth));
    arrive_n(b, 4);
    """
    assert values(body, 8) == [5, 0, 2, 1, 1, 1, 5, 0]


def test_a_dropped_arrival_lowers_the_count_of_later_phases():
    body = """
    init(b, 3);
    arrive_drop(b); arrive_n(b, 2);
    NOTE(test_parity(b, 0));
    NOTE(pending(arrive(b)));
    arrive(b);
    NOTE(test_parity(b, 1));
    """
    assert values(body, 3) == [1, 2, 1]


def test_a_phase_needs_its_arrivals_and_its_bytes():
    body = """
    init(b, 1);
    arrive_expect(b, 48); NOTE(test_parity(b, 0));
    complete(b, 16); NOTE(test_parity(b, 0));
    complete(b, 32); NOTE(test_parity(b, 0));
    complete(b, 8); expect(b, 8); NOTE(test_parity(b, 1));
    arrive(b); NOTE(test_parity(b, 1));
    """
    assert values(body, 5) == [0, 0, 1, 0, 1]


def test_inval_makes_room_for_data_and_for_another_mbarrier():
    body = """
    init(b, 1); arrive(b); inval(b);
    bars[0] = 7; NOTE((u32)bars[0]);
    init(b, 2); NOTE(test_parity(b, 1)); arrive(b); NOTE(pending(arrive(b)));
    """
    assert values(body, 3) == [7, 1, 1]


def test_no_complete_and_generic_addresses():
    body = """
    asm volatile("mbarrier.init.b64 [%0], 2;" :: "l"(&bars[1]) : "memory");
    u64 t;
    asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 1;" : "=l"(t) : "r"(b + 8) : "memory");
    NOTE(pending(t));
    asm volatile("mbarrier.arrive.b64 _, [%0];" :: "l"(&bars[1]) : "memory");
    NOTE(test_parity(b + 8, 0));
    """
    assert values(body, 2) == [2, 1]


def test_the_two_old_forms_assemble_for_sm_80():
    code = FRESH + "init(b, 1); u64 t = arrive(b); out[0] = test(b, t) + 2 * test_parity(b, 0);"
    assert results(compile_kernel(code, arch="sm_80"), OUT, block=1)[0] == 3


PIPELINE = """
__shared__ alignas(8) u64 full[2], empty[2];
__shared__ u32 ring[2][128];
if (threadIdx.x == 0)
  for (int s = 0; s < 2; s++) { init(smem(&full[s]), 1); init(smem(&empty[s]), 2); }
__syncthreads();
if (threadIdx.x < 128) {                       // producer: one thread fills both stages in turn
  if (threadIdx.x == 0)
    for (int i = 0; i < 7; i++) {
      wait(smem(&empty[i % 2]), (i / 2 + 1) % 2);
      for (int j = 0; j < 128; j++) ring[i % 2][j] = 1000 * i + j;
      arrive(smem(&full[i % 2]));
    }
} else {                                       // consumers: one thread arrives for its warpgroup
  u32 group = threadIdx.x / 128, lane = threadIdx.x % 128, sum = 0;
  for (int i = 0; i < 7; i++) {
    wait(smem(&full[i % 2]), i / 2 % 2);
    sum += ring[i % 2][lane] * group;
    named_sync(group, 128);
    if (lane == 0) arrive(smem(&empty[i % 2]));
  }
  out[threadIdx.x - 128] = sum;
}
"""


def test_a_ring_between_a_producer_and_two_warpgroups():
    kernel = compile_kernel(PIPELINE, bounds="__launch_bounds__(384, 1)")
    out = results(kernel, np.zeros(256, np.uint32), block=384)
    expected = 21000 + 7 * np.arange(128)
    np.testing.assert_array_equal(out, np.concatenate([expected, 2 * expected]))


def test_named_barriers_hand_the_turn_between_two_warpgroups():
    body = """
    __shared__ u32 log[16];
    __shared__ u32 at;
    u32 group = threadIdx.x / 128;
    if (threadIdx.x == 0) at = 0;
    __syncthreads();
    if (group == 1) named_arrive(1, 256);      // group 0 goes first
    for (int i = 0; i < 4; i++) {
      named_sync(1 + group, 256);
      if (threadIdx.x % 128 == 0) log[at++] = 10 * i + group;
      if (i < 3 || group == 0) named_arrive(2 - group, 256);
    }
    __syncthreads();
    if (threadIdx.x < 8) out[threadIdx.x] = log[threadIdx.x];
    """
    out = results(compile_kernel(body, bounds="__launch_bounds__(256)"), OUT, block=256)
    assert out[:8].tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


def test_lanes_of_one_warp_wait_for_each_other():
    body = (
        FRESH
        + """
    if (threadIdx.x == 0) { init(b, 1); init(b + 8, 31); }
    __syncwarp();
    __shared__ u32 value;
    if (threadIdx.x == 0) {                    // stands lower in the text, and waits first
      wait(b + 8, 0);
      value = 5;
      arrive(b);
    } else {
      arrive(b + 8);
      wait(b, 0);
      out[threadIdx.x] = value + threadIdx.x;
    }"""
    )
    out = results(compile_kernel(body), OUT)
    np.testing.assert_array_equal(out[1:32], 5 + np.arange(1, 32))


def test_a_wait_that_cannot_succeed_returns_false():
    body = (
        FRESH
        + """
    if (threadIdx.x == 0) init(b, 2);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      u32 tries = 0;
      if (threadIdx.x == 0) {
        while (!try_parity(b, 0)) { if (tries++ == 3) arrive(b); }
        out[0] = tries > 3;
      } else {
        arrive(b);
        wait(b, 0);
        out[1] = 1;
      }
    }"""
    )
    assert results(compile_kernel(body), OUT, block=64)[:2].tolist() == [1, 1]


COPIES = """
__shared__ alignas(16) u32 data[32 * 4];
__shared__ alignas(8) u64 bar;
u32 b = smem(&bar);
if (threadIdx.x == 0) init(b, COUNT);
__syncthreads();
if (threadIdx.x < 32) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(smem(data + 4 * threadIdx.x)), "l"(in + 4 * threadIdx.x) : "memory");
  asm volatile("cp.async.mbarrier.arriveFORM.shared::cta.b64 [%0];" :: "r"(b) : "memory");
  EXTRA
} else {
  wait(b, 0);
  for (int i = 0; i < 4; i++) out[4 * (threadIdx.x - 32) + i] = data[4 * (31 - (threadIdx.x - 32)) + i];
}
"""  # fmt: skip


def test_cp_async_arrives_when_its_copies_have_landed():
    values_in = np.arange(128, dtype=np.uint32)
    for form, count, extra in ((".noinc", "32", ""), ("", "1", "if (threadIdx.x == 0) arrive(b);")):
        body = COPIES.replace("COUNT", count).replace("FORM", form).replace("EXTRA", extra)
        kernel = compile_kernel(body, params="u32* out, const u32* in")
        out = results(kernel, np.zeros(128, np.uint32), values_in, block=64)
        np.testing.assert_array_equal(out.reshape(32, 4), values_in.reshape(32, 4)[::-1])


def test_setmaxnreg_takes_from_what_others_gave_back():
    body = """
    if (threadIdx.x < 128) { registers_dec<40>(); } else { registers_inc<232>(); }
    if (threadIdx.x % 128 == 0) out[threadIdx.x / 128] = 1 + threadIdx.x / 128;
    """
    kernel = compile_kernel(body, bounds="__launch_bounds__(384, 1)")  # 168 each: 3 * 168 = 40 + 2 * 232
    assert results(kernel, OUT, block=384)[:3].tolist() == [1, 2, 3]


def test_the_same_seed_gives_the_same_schedule():
    body = """
    __shared__ u32 at;
    if (threadIdx.x == 0) at = 0;
    __syncthreads();
    for (int i = 0; i < 4; i++)
      if (threadIdx.x % 32 == 0) out[atomicAdd(&at, 1)] = threadIdx.x / 32;
    """
    kernel = compile_kernel(body)
    orders = [run(kernel, OUT, block=256, mode="random", seed=seed).tolist() for seed in (5, 5, 6, 7, 8)]
    assert orders[0] == orders[1]
    assert any(order != orders[0] for order in orders[2:])
