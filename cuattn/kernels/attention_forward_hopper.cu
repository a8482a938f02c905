// Attention forward on Hopper (sm_90a): bulk tensor copies, wgmma, and warpgroups with roles; elements of 16 bits, and
// e4m3.
//
//     out = softmax(logits) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// A CTA computes tiles of BLOCK_M query rows, one after the other (query_tile.cuh). Warpgroup 0 produces
// (forward_producer.cuh): one thread copies q, and the keys and values in tiles of BLOCK_N through two rings of
// NUM_STAGES buffers. Each other warpgroup consumes (forward_consumer.cuh): it owns 64 rows, and keeps scores,
// probabilities and output in registers. While the tensor cores multiply the probabilities of one key tile with v, and
// q with the keys of the next, a warpgroup computes exponentials; with PING_PONG the warpgroups take turns in issuing
// products, so that one multiplies while another exponentiates (Shah et al., "FlashAttention-3", 2024; the online
// softmax is that of Milakov and Gimelshein, 2018).
//
// e4m3 is multiplied as it is, and probabilities are rounded to it: to 2^-4 of each, or, below 2^-14 of the largest of
// the row so far, to 2^-18 of that. They are taken 2^8 times as large, 256 of the 448 that e4m3 reaches, because it
// ends at 2^-9; the factor leaves with the sum, to the bit. The sum is that of probabilities before they are rounded:
// it costs nothing, lse has no part in their rounding, and in out the roundings of many keys average out. (In 8 bits
// the tensor cores of this generation are said to sum with 14 bits only; tolerance.py makes room for it.) wgmma wants
// such values by columns: warps 1 to 3 of the producing warpgroup transpose them (transpose_e4m3.cuh).
//
// Grid: as many CTAs as the device holds at once, at most schedule.num_tiles.
// Block: (1 + NUM_CONSUMERS) warpgroups of 128 threads.
//
// Constants: Element (of q, k, v), Output (the same, bfloat16 for e4m3, or float); BLOCK_M = 64 NUM_CONSUMERS, BLOCK_N,
// HEAD_DIM, HEAD_DIM_V (buckets: the head dims proper are arguments and may be smaller; copies fill up with zeros),
// NUM_CONSUMERS, NUM_STAGES, PRODUCER_REGISTERS, CONSUMER_REGISTERS (of a thread, after the roles are taken),
// PING_PONG, SMEM_BYTES, CTAS_PER_SM; PACKED (sequences packed into one array); TILE_LIST (the tiles of keys are those
// of a list: listed_tiles.cuh); the options that are compiled in: BOUND_LEFT and BOUND_RIGHT (mask.cuh), CHUNK (of both
// bounds), SOFTCAP, ALIBI (logits.cuh). Sinks, offsets of the diagonal and packs of heads are always there.
#include "hopper/listed_tiles.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, CTAS_PER_SM) cuattn_attention_forward_hopper(
    const __grid_constant__ TensorMap map_q,  // (head_dim, pack, seqlen_q or tokens, heads / pack, batch or 1)
    const __grid_constant__ TensorMap map_k,  // (head_dim, seqlen_k or tokens, kv heads, batch or 1)
    const __grid_constant__ TensorMap map_v,  // (head_dim_v, seqlen_k or tokens, kv heads, batch or 1)
    Output* __restrict__ g_out,               // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    // From here on, null is what a call does not use.
    float* __restrict__ g_lse,                   // [batch, num_heads, seqlen_q]
    const float* __restrict__ g_alibi_slopes,    // [batch or 1, num_heads]
    const float* __restrict__ g_sinks,           // [num_heads]
    const float* __restrict__ g_q_descale,       // [batch, num_kv_heads]: of 8-bit elements
    const float* __restrict__ g_k_descale,       // likewise
    const float* __restrict__ g_v_descale,       // likewise
    const int* __restrict__ g_diagonal_offsets,  // [batch]
    const int* __restrict__ g_cu_seqlens_q,      // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
    const int* __restrict__ g_cu_seqlens_k,      // [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const int* __restrict__ g_work,              // [num_work, 2]: query_block.cuh; given with the two before
    const Params params, const HopperSchedule schedule,
    const int* __restrict__ g_tile_list)  // attention/tile_list.cuh; with TILE_LIST
{
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warpgroup_idx = threadIdx.x / WARPGROUP_SIZE;
    const int thread_idx = threadIdx.x % WARPGROUP_SIZE;

    if (threadIdx.x == 0) {
        // The swizzle of copies and products counts from multiples of 1024. Dynamic shared memory begins at one only
        // while there is no static shared memory before it.
        if (smem_address(s_bytes) % alignof(Smem) != 0) __trap();
        constexpr int NUM_CONSUMER_WARPS = NUM_CONSUMERS * WARPGROUP_SIZE / WARP_SIZE;
        smem.q_ring.init(NUM_CONSUMER_WARPS);
        smem.k_ring.init(NUM_CONSUMER_WARPS);
        smem.v_ring.init(NUM_CONSUMER_WARPS, TRANSPOSE_V ? NUM_TRANSPOSERS : 1);
        if (TRANSPOSE_V) smem.rows_ring.init(NUM_TRANSPOSERS);
        mbarrier_init(smem_address(&smem.v_tail), 1);
        fence_mbarrier_init();
        tma_prefetch_map(map_q);
        tma_prefetch_map(map_k);
        tma_prefetch_map(map_v);
    }
    // SYNC: the barriers are initialised before anybody uses one.
    __syncthreads();

    RingPositions rings;
    auto tile_at = [&](int tile_idx) {
        WorkTile tile =
            work_tile(params, schedule, tile_idx, g_work, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
        if (TILE_LIST && tile.num_queries > 0) {
            take_listed_tiles(tile, key_list(g_tile_list, tile, schedule.pack));
        }
        return tile;
    };
    if (warpgroup_idx == 0) {
        release_registers<PRODUCER_REGISTERS>();
        if (thread_idx >= WARP_SIZE) {
            if constexpr (TRANSPOSE_V) {
                for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
                    transpose_values(smem, tile_at(tile_idx), rings);
                }
            }
            return;
        }
        unsigned tail_parity = 0;
        for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
            const WorkTile tile = tile_at(tile_idx);
            if (!TILE_LIST) {
                produce(smem, map_q, map_k, map_v, tile, schedule, rings, tail_parity);
            } else if (tile.num_queries > 0) {
                produce_listed(smem, map_q, map_k, map_v, tile, params, schedule,
                               key_list(g_tile_list, tile, schedule.pack), rings, tail_parity);
            }
        }
    } else {
        claim_registers<CONSUMER_REGISTERS>();
        const int lane_idx = thread_idx % WARP_SIZE;
        const Turns turns{warpgroup_idx - 1};
        const int first_row =
            turns.consumer_idx * WGMMA_M + thread_idx / WARP_SIZE * MMA_M + frag_acc_row(lane_idx);
        const unsigned long long out_strides = params.out.batch | params.out.seq | params.out.head | params.head_dim_v;
        const bool vectors = ((reinterpret_cast<unsigned long long>(g_out) | out_strides * sizeof(Output)) & 15) == 0;
        turns.start();
        for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
            const WorkTile tile = tile_at(tile_idx);
            if (tile.num_queries == 0) continue;
            const TileScales scales = tile_scales(tile, params, g_q_descale, g_k_descale);
            ConsumerState state;
            state.rows[0][0].reset();
            state.rows[0][1].reset();
            clear(state.acc_out);
            if (tile.key_begin < tile.key_end) {
                const RowOptions options = row_options(smem, tile, params, schedule.pack, first_row, lane_idx,
                                                       g_alibi_slopes);
                if constexpr (TILE_LIST) {
                    const ListWalk walk(key_list(g_tile_list, tile, schedule.pack), tile, schedule.pack,
                                        turns.consumer_idx, first_row, lane_idx);
                    consume(state, smem, tile, params, scales, schedule.pack, options, turns, thread_idx, rings, walk);
                } else {
                    consume(state, smem, tile, params, scales, schedule.pack, options, turns, thread_idx, rings);
                }
            }
            write_rows(state, tile, params, scales, schedule.pack, first_row, g_sinks, g_v_descale, g_out, g_lse,
                       vectors, lane_idx);
        }
        turns.finish();
    }
}
