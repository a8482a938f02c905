// What producer and consumers of attention_forward_hopper.cu agree on: shared memory, work tiles, rings.
//
// Constants: those of attention_forward_hopper.cu.
#pragma once
#include "hopper/pipeline.cuh"
#include "hopper/query_tile.cuh"
#include "hopper/tile_products.cuh"
#include "attention/mask.cuh"

constexpr int NUM_THREADS = (1 + NUM_CONSUMERS) * WARPGROUP_SIZE;

// Calls without chunks take kernels without them.
using TileBand = KeyBandWithChunks<CHUNK>;

constexpr int NUM_TRANSPOSERS = WARPGROUP_SIZE / WARP_SIZE - 1;  // warps

// Values as they land, key by key; and as wgmma reads them, the same or column by column.
template <bool TRANSPOSED>
struct ValueTiles {
    Element rows[NUM_STAGES][V_SPANS][BLOCK_N][SPAN];
    __device__ __forceinline__ auto& operand() { return rows; }
};
template <>
struct ValueTiles<true> {
    Element rows[NUM_STAGES][V_SPANS][BLOCK_N][SPAN];
    Element columns[NUM_STAGES][(BLOCK_N + SPAN - 1) / SPAN][HEAD_DIM_V][SPAN];
    __device__ __forceinline__ auto& operand() { return columns; }
};

// What each row of a tile sees. The ends of chunks do not follow from each other as those of a window do, and the loop
// of a consumer has no registers for them: they are found once for a tile of queries, and lie here until a key tile
// hides something.
template <bool CHUNKS>
struct RowEnds {};
template <>
struct RowEnds<true> {
    TileBand::RowBounds keys[BLOCK_M];
};

// Shared memory of a CTA. Tiles are columns of SPAN elements: see wgmma.cuh.
struct alignas(1024) Smem {
    Element q[QK_SPANS][BLOCK_M][SPAN];
    Element k[NUM_STAGES][QK_SPANS][BLOCK_N][SPAN];
    ValueTiles<TRANSPOSE_V> values;
    RingBarriers<1> q_ring;
    RingBarriers<NUM_STAGES> k_ring, v_ring;
    RingBarriers<NUM_STAGES> rows_ring;  // of values that are yet to be transposed
    unsigned long long v_tail;  // packed sequences: the last tile of values has landed and may be cut
    RowEnds<CHUNK> row_ends;
};

static_assert(BLOCK_M == WGMMA_M * NUM_CONSUMERS, "a consumer owns the rows of one wgmma");
static_assert(BLOCK_N % MMA_K == 0 && BLOCK_N <= 256, "keys come in steps of the second product");
static_assert(BLOCK_N * SPAN_BYTES % 1024 == 0, "every tile starts where the swizzle begins anew");
static_assert(sizeof(Smem) <= SMEM_BYTES, "config.py and this file agree on the shared-memory plan");
static_assert(PRODUCER_REGISTERS % 8 == 0 && CONSUMER_REGISTERS % 8 == 0, "setmaxnreg counts in eights");
static_assert(PRODUCER_REGISTERS + NUM_CONSUMERS * CONSUMER_REGISTERS <=
                  65536 / NUM_THREADS / 8 * 8 * (1 + NUM_CONSUMERS),
              "all that warpgroups divide is what they start with");
static_assert(!CHUNK || (BOUND_LEFT && BOUND_RIGHT), "a chunk bounds both sides");
static_assert(!BIAS && !MASK && !DROPOUT, "these take the portable kernel");

using Params = AttentionParams<float>;

// A work item as both roles see it.
struct WorkTile {
    QueryBlock block;
    TileBand band;
    int num_queries;  // of the sequence, in this tile
    int key_begin, key_end;  // tiles of keys to visit
};

__device__ __forceinline__ WorkTile work_tile(const Params& params, const HopperSchedule& schedule, int tile_idx,
                                              const int* g_work, const int* g_cu_seqlens_q, const int* g_cu_seqlens_k,
                                              const int* g_diagonal_offsets) {
    WorkTile tile;
    tile.block = query_tile<BLOCK_M, BOUND_RIGHT>(params, schedule, tile_idx, g_work, g_cu_seqlens_q, g_cu_seqlens_k,
                                                  g_diagonal_offsets);
    tile.num_queries = 0;
    tile.key_begin = tile.key_end = 0;
    if (tile.block.has_work()) {
        tile.num_queries = min(BLOCK_M / schedule.pack, tile.block.seqlen_q - tile.block.first_query);
        tile.band = TileBand(params, tile.block);
        const KeyTiles keys(tile.band, BLOCK_N, tile.block.first_query, tile.block.first_query + tile.num_queries - 1);
        tile.key_begin = keys.begin;
        tile.key_end = max(keys.begin, keys.end);
    }
    return tile;
}

// Where a warpgroup stands in the rings.
struct RingPositions {
    RingPosition<1> q;
    RingPosition<NUM_STAGES> k, v;
};
