// The producing warpgroup of attention_forward_hopper.cu: one thread issues the copies of q, keys and values; values of
// 8 bits are transposed by the other warps.
#pragma once
#include "hopper/forward_tile.cuh"
#include "hopper/transpose_e4m3.cuh"

// A tile of keys or values, `ring` of k or of v.
template <int SPANS>
__device__ __forceinline__ void load_keys(Element (&s_tile)[SPANS][BLOCK_N][SPAN], const TensorMap& map,
                                          const unsigned long long& barrier, const QueryBlock& block, int first_key) {
    const unsigned s_barrier = smem_address(&barrier);
    mbarrier_arrive_expect(s_barrier, SPANS * BLOCK_N * SPAN_BYTES);
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        tma_load(smem_address(s_tile[span]), map, s_barrier, L2_EVICT_LAST, span * SPAN, block.k_start + first_key,
                 block.kv_head_idx, PACKED ? 0 : block.batch_idx);
    }
}

// Behind the last key of a packed sequence lie the values of the next one, and a probability of 0 does not stop a NaN.
__device__ __forceinline__ void clear_rows(Element (&s_tile)[V_SPANS][BLOCK_N][SPAN], int first_row, int lane_idx) {
    constexpr int RUNS = SPAN_BYTES / 16;
    for (int span = 0; span < V_SPANS; span++) {
        uint4* s_runs = reinterpret_cast<uint4*>(s_tile[span][0]);
        for (int i = first_row * RUNS + lane_idx; i < BLOCK_N * RUNS; i += WARP_SIZE) {
            s_runs[i] = make_uint4(0, 0, 0, 0);
        }
    }
}

// The queries of a work tile, by one thread.
__device__ __forceinline__ void load_queries(Smem& smem, const TensorMap& map_q, const QueryBlock& block,
                                             const HopperSchedule& schedule, const RingPositions& rings) {
    rings.q.wait_empty(smem.q_ring);
    const unsigned s_barrier = smem_address(&smem.q_ring.full[0]);
    mbarrier_arrive_expect(s_barrier, sizeof(smem.q));
#pragma unroll
    for (int span = 0; span < QK_SPANS; span++) {
        tma_load(smem_address(smem.q[span]), map_q, s_barrier, L2_EVICT_FIRST, span * SPAN, 0,
                 block.q_start + block.first_query, block.head_idx / schedule.pack, PACKED ? 0 : block.batch_idx);
    }
}

// The tile of values that completes on v_tail has num_keys keys: zeros take the place of the others.
__device__ __forceinline__ void clear_tail(Smem& smem, const RingBarriers<NUM_STAGES>& v_ring,
                                           const RingPositions& rings, int num_keys, int lane_idx,
                                           unsigned& tail_parity) {
    mbarrier_wait(smem_address(&smem.v_tail), tail_parity);
    tail_parity ^= 1;
    clear_rows(smem.values.rows[rings.v.stage], num_keys, lane_idx);
    fence_proxy_async();
    // SYNC: every lane has written its zeros, and wgmma will see them.
    __syncwarp();
    if (lane_idx == 0) mbarrier_arrive(smem_address(&v_ring.full[rings.v.stage]));
}

__device__ __forceinline__ void produce(Smem& smem, const TensorMap& map_q, const TensorMap& map_k,
                                        const TensorMap& map_v, const WorkTile& tile, const HopperSchedule& schedule,
                                        RingPositions& rings, unsigned& tail_parity) {
    const QueryBlock& block = tile.block;
    const RingBarriers<NUM_STAGES>& v_ring = TRANSPOSE_V ? smem.rows_ring : smem.v_ring;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    if (tile.key_begin == tile.key_end) return;
    if (lane_idx == 0) load_queries(smem, map_q, block, schedule, rings);
    rings.q.advance();
#pragma unroll 1
    for (int key_tile = tile.key_end - 1; key_tile >= tile.key_begin; key_tile--) {
        const int first_key = key_tile * BLOCK_N;
        const int num_keys = block.seqlen_k - first_key;
        const bool cut = PACKED && !TRANSPOSE_V && num_keys < BLOCK_N;
        if (lane_idx == 0) {
            rings.k.wait_empty(smem.k_ring);
            load_keys(smem.k[rings.k.stage], map_k, smem.k_ring.full[rings.k.stage], block, first_key);
            rings.v.wait_empty(v_ring);
            load_keys(smem.values.rows[rings.v.stage], map_v, cut ? smem.v_tail : v_ring.full[rings.v.stage], block,
                      first_key);
        }
        if (cut) clear_tail(smem, v_ring, rings, num_keys, lane_idx, tail_parity);
        rings.k.advance();
        rings.v.advance();
    }
}

// One of NUM_TRANSPOSERS warps: values by rows become values by columns, tile after tile as they land. Their two rings
// are as long, and move in step.
__device__ __forceinline__ void transpose_values(Smem& smem, const WorkTile& tile, RingPositions& rings) {
    const int warp_idx = threadIdx.x / WARP_SIZE - 1, lane_idx = threadIdx.x % WARP_SIZE;
#pragma unroll 1
    for (int key_tile = tile.key_end - 1; key_tile >= tile.key_begin; key_tile--) {
        const int num_keys = tile.block.seqlen_k - key_tile * BLOCK_N;
        const unsigned s_rows = smem_address(smem.values.rows[rings.v.stage]);
        const unsigned s_columns = smem_address(smem.values.operand()[rings.v.stage]);
        rings.v.wait_full(smem.rows_ring);
        rings.v.wait_empty(smem.v_ring);
        // Behind the last key of a packed sequence lie the values of the next one: see clear_rows.
        if (PACKED && num_keys < BLOCK_N) {
            transpose_e4m3<BLOCK_N, HEAD_DIM_V, NUM_TRANSPOSERS, true>(s_columns, s_rows, num_keys, warp_idx,
                                                                       lane_idx);
        } else {
            transpose_e4m3<BLOCK_N, HEAD_DIM_V, NUM_TRANSPOSERS, false>(s_columns, s_rows, num_keys, warp_idx,
                                                                        lane_idx);
        }
        fence_proxy_async();
        // SYNC: every lane has read its rows and written its columns, and wgmma will see them.
        __syncwarp();
        if (lane_idx == 0) {
            rings.v.release(smem.rows_ring);
            mbarrier_arrive(smem_address(&smem.v_ring.full[rings.v.stage]));
        }
        rings.v.advance();
    }
}
