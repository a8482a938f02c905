// Which queries a persistent CTA computes next: its tiles are blockIdx.x, blockIdx.x + gridDim.x, ... of a list.
//
// A tile is BLOCK_M rows: queries of one head or, with `pack` > 1, BLOCK_M / pack queries of each of the `pack` heads
// that share a key/value head; row r is query r / pack of head r % pack.
//
// Order of a batch of equal lengths: heads (of all batch entries) in groups of heads_at_once, so that the keys and
// values of a group stay in L2; within a group the blocks one after the other, each for all heads of the group; under a
// causal mask the last block first, because it has the most keys to visit. Of packed sequences: the order of g_work
// (query_block.cuh), heads fastest.
#pragma once
#include "attention/query_block.cuh"

struct HopperSchedule {
    int num_tiles;
    int num_blocks;     // query blocks of a sequence, or entries of g_work
    int heads_at_once;  // counted in packs of heads
    int pack;
};

// QueryBlock with first_query and head_idx of row 0.
template <int BLOCK_M, bool LAST_FIRST>
__device__ __forceinline__ QueryBlock query_tile(const AttentionParams<float>& params, const HopperSchedule& schedule,
                                                 int tile_idx, const int* g_work, const int* g_cu_seqlens_q,
                                                 const int* g_cu_seqlens_k, const int* g_diagonal_offsets) {
    QueryBlock tile;
    const int packs = params.num_heads / schedule.pack;
    int pack_idx, block_idx;
    if (g_work == nullptr) {
        const int num_packs = schedule.num_tiles / schedule.num_blocks;
        const int group_tiles = schedule.num_blocks * schedule.heads_at_once;
        const int group = tile_idx / group_tiles, rest = tile_idx - group * group_tiles;
        const int first_pack = group * schedule.heads_at_once;
        const int group_packs = min(schedule.heads_at_once, num_packs - first_pack);
        block_idx = rest / group_packs;
        const int pack_of_all = first_pack + rest - block_idx * group_packs;
        if (LAST_FIRST) block_idx = schedule.num_blocks - 1 - block_idx;
        tile.batch_idx = pack_of_all / packs;
        pack_idx = pack_of_all - tile.batch_idx * packs;
    } else {
        const int work_idx = tile_idx / packs;
        pack_idx = tile_idx - work_idx * packs;
        tile.batch_idx = g_work[2 * work_idx];
        block_idx = g_work[2 * work_idx + 1];
    }
    tile.head_idx = pack_idx * schedule.pack;
    tile.kv_head_idx = tile.head_idx / params.heads_per_kv_head;
    tile.first_query = block_idx * (BLOCK_M / schedule.pack);
    if (tile.batch_idx >= 0) {
        tile.find(params, tile.batch_idx, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    }
    return tile;
}
