// Differential attention on Hopper (sm_90a): bulk tensor copies, wgmma, and warpgroups with roles; elements of 16 bits.
//
//     out = norm(softmax(logits 1) v - lambda softmax(logits 2) v),    logits s = options(scale * q_s k_s^T)
//
// What it computes is what differential_attention.cu does; query heads 2 h and 2 h + 1 are the streams of output head
// h. A CTA computes tiles of BLOCK_M queries of one output head, one after the other. Warpgroup 0 produces: one thread
// copies the queries of both streams, and the keys and values in tiles of BLOCK_N through two rings of NUM_STAGES
// buffers; a stage of keys holds those of both streams, or one where both read the same (SHARED_KEYS). Each of the
// other two warpgroups has a stream (differential/stream_consumer.cuh), over the same tiles of v. At the end the second
// leaves its output in shared memory, in a place of its own, so that the producer is already at the next tile; the
// first subtracts it from its own (Ye et al., "Differential transformer", 2024).
//
// Grid: as many CTAs as the device holds at once, at most schedule.num_tiles.
// Block: 3 warpgroups of 128 threads.
//
// Constants: Element; SHARED_KEYS; BLOCK_M = 64, BLOCK_N, HEAD_DIM, HEAD_DIM_V (buckets: the head dims proper are
// arguments and may be smaller; copies fill up with zeros), NUM_STAGES, PRODUCER_REGISTERS, CONSUMER_REGISTERS (of a
// thread, after the roles are taken), PING_PONG, SMEM_BYTES; the options that are compiled in: BOUND_LEFT and
// BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI (logits.cuh).
#include "differential/stream_consumer.cuh"

// The queries of both streams and then all key tiles, from the last to the first, as stages become free.
__device__ __forceinline__ void produce(Smem& smem, const TensorMap& map_q, const TensorMap& map_k,
                                        const TensorMap& map_v, const PairTile& tile, RingPositions& rings) {
    const QueryBlock& block = tile.block;
    if (tile.key_begin == tile.key_end) return;
    rings.q.wait_empty(smem.q_ring);
    const unsigned s_q_barrier = smem_address(&smem.q_ring.full[0]);
    mbarrier_arrive_expect(s_q_barrier, sizeof(smem.q));
#pragma unroll
    for (int stream = 0; stream < 2; stream++) {
#pragma unroll
        for (int span = 0; span < QK_SPANS; span++) {
            tma_load(smem_address(smem.q[stream][span]), map_q, s_q_barrier, L2_EVICT_FIRST, span * SPAN,
                     block.first_query, 2 * block.head_idx + stream, block.batch_idx);
        }
    }
    rings.q.advance();
#pragma unroll 1
    for (int key_tile = tile.key_end - 1; key_tile >= tile.key_begin; key_tile--) {
        const int first_key = key_tile * BLOCK_N;
        rings.k.wait_empty(smem.k_ring);
        const unsigned s_k_barrier = smem_address(&smem.k_ring.full[rings.k.stage]);
        mbarrier_arrive_expect(s_k_barrier, sizeof(smem.k[0]));
#pragma unroll
        for (int s = 0; s < KEY_STREAMS; s++) {
#pragma unroll
            for (int span = 0; span < QK_SPANS; span++) {
                tma_load(smem_address(smem.k[rings.k.stage][s][span]), map_k, s_k_barrier, L2_EVICT_LAST, span * SPAN,
                         first_key, KEY_STREAMS * block.kv_head_idx + s, block.batch_idx);
            }
        }
        rings.k.advance();
        rings.v.wait_empty(smem.v_ring);
        const unsigned s_v_barrier = smem_address(&smem.v_ring.full[rings.v.stage]);
        mbarrier_arrive_expect(s_v_barrier, sizeof(smem.v[0]));
#pragma unroll
        for (int span = 0; span < V_SPANS; span++) {
            tma_load(smem_address(smem.v[rings.v.stage][span]), map_v, s_v_barrier, L2_EVICT_LAST, span * SPAN,
                     first_key, block.kv_head_idx, block.batch_idx);
        }
        rings.v.advance();
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_differential_attention_hopper(
    const __grid_constant__ TensorMap map_q,  // (head_dim, seqlen_q, 2 num_heads, batch)
    const __grid_constant__ TensorMap map_k,  // (head_dim, seqlen_k, KEY_STREAMS num_kv_heads, batch)
    const __grid_constant__ TensorMap map_v,  // (head_dim_v, seqlen_k, num_kv_heads, batch)
    Element* __restrict__ g_out,              // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    // From here on, null is what a call does not use.
    const float* __restrict__ g_lambda,          // [batch, seqlen_q, num_heads] or less
    const float* __restrict__ g_norm_weight,     // [head_dim_v]
    float* __restrict__ g_lse,                   // [batch, num_heads, 2, seqlen_q], contiguous
    Element* __restrict__ g_out1,                // [batch, seqlen_q, num_heads, head_dim_v], strides params.state;
    Element* __restrict__ g_out2,                // both or none
    const float* __restrict__ g_alibi_slopes,    // [batch or 1, num_heads, 2 or 1]
    const int* __restrict__ g_diagonal_offsets,  // [batch]
    const Params params, const HopperSchedule schedule)
{
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warpgroup_idx = threadIdx.x / WARPGROUP_SIZE;

    if (threadIdx.x == 0) {
        // The swizzle of copies and products counts from multiples of 1024. Dynamic shared memory begins at one only
        // while there is no static shared memory before it.
        if (smem_address(s_bytes) % alignof(Smem) != 0) __trap();
        constexpr int STREAM_WARPS = WARPGROUP_SIZE / WARP_SIZE;
        smem.q_ring.init(2 * STREAM_WARPS);
        smem.k_ring.init(2 * STREAM_WARPS);
        smem.v_ring.init(2 * STREAM_WARPS);
        fence_mbarrier_init();
        tma_prefetch_map(map_q);
        tma_prefetch_map(map_k);
        tma_prefetch_map(map_v);
    }
    // SYNC: the barriers are initialised before anybody uses one.
    __syncthreads();

    RingPositions rings;
    if (warpgroup_idx == 0) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x != 0) return;
        for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
            produce(smem, map_q, map_k, map_v, PairTile(params, schedule, tile_idx, g_diagonal_offsets), rings);
        }
    } else {
        claim_registers<CONSUMER_REGISTERS>();
        const StreamOfPair own{warpgroup_idx - 1};
        const int thread_idx = threadIdx.x % WARPGROUP_SIZE;
        const Turns turns{own.stream};
        turns.start();
        for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
            StreamState state;
            state.reset();
            consume(state, smem, PairTile(params, schedule, tile_idx, g_diagonal_offsets), params, own, g_alibi_slopes,
                    turns, thread_idx, rings);
            // Found anew: kept over the loop it would take registers that the loop needs.
            const PairTile tile(params, schedule, forget_origin(tile_idx), g_diagonal_offsets);
            finish(state, params);
            store_state(state, params, tile.block, own, g_lse, own.stream == 0 ? g_out1 : g_out2, thread_idx);
            if (own.stream == 0) {
                subtract(state, smem, params, tile.block, g_lambda, g_norm_weight, thread_idx);
                store_rows(state, g_out, params.out, params.head_dim_v, tile.block, thread_idx);
            } else {
                hand_over(state, smem, thread_idx);
            }
        }
        turns.finish();
    }
}
