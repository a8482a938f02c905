// Which queries a CTA of dual-chunk attention computes, and the keys that it walks over.
//
// Chunks are L neighbouring positions. A tile of queries lies in one chunk, so that all of its rows see the keys of a
// chunk alike: the first chunk of a sequence of queries, which may be a part of one, is cut into tiles from its first
// query on, and so is every chunk behind it. Queries at negative positions, which see no key, count to chunk 0.
//
// Grid of a batch of equal lengths: x = (batch_idx * heads + head_idx) * num_tiles + tile, the last tiles first. Of
// packed sequences: x = work_idx * heads + head_idx, where g_work [num_work, 2] lists (batch_idx, tile), those with the
// most to visit first if the host made it. An entry with batch_idx < 0 is no work.
#pragma once
#include "attention/query_block.cuh"

// How the queries of a sequence are cut into tiles of at most BLOCK_M.
template <int BLOCK_M>
struct ChunkTiles {
    int chunk_length;
    int first_chunk;  // the chunk of query 0
    int first_rows;   // queries in it
    int first_tiles;  // and their tiles

    __device__ __forceinline__ ChunkTiles(int seqlen_q, int first_position, int chunk_length)
        : chunk_length(chunk_length), first_chunk(0) {
        long long rows = static_cast<long long>(chunk_length) - first_position;
        if (first_position >= 0) {
            first_chunk = first_position / chunk_length;
            rows += static_cast<long long>(first_chunk) * chunk_length;
        }
        first_rows = static_cast<int>(min(rows, static_cast<long long>(seqlen_q)));
        first_tiles = tiles_of(first_rows);
    }

    static __device__ __forceinline__ int tiles_of(int rows) {
        return (static_cast<unsigned>(rows) + BLOCK_M - 1) / BLOCK_M;
    }
    // Tiles of all seqlen_q queries.
    __device__ __forceinline__ int count(int seqlen_q) const {
        const int rows = seqlen_q - first_rows, chunks = rows / chunk_length;
        return first_tiles + chunks * tiles_of(chunk_length) + tiles_of(rows - chunks * chunk_length);
    }
};

struct ChunkBlock : Sequence {
    int batch_idx, head_idx, kv_head_idx;
    int first_query, end_query;
    int chunk;  // that they all lie in

    __device__ __forceinline__ bool has_work() const { return batch_idx >= 0 && first_query < seqlen_q; }
    // The absolute position of a query.
    __device__ __forceinline__ int position(int query_idx) const { return query_idx + diagonal_offset; }
};

template <int BLOCK_M, typename Params>
__device__ __forceinline__ ChunkBlock chunk_block(const Params& params, const int* g_work, const int* g_cu_seqlens_q,
                                                  const int* g_cu_seqlens_k, unsigned cta_idx = blockIdx.x) {
    ChunkBlock block;
    int tile;
    if (g_work == nullptr) {
        const unsigned head = cta_idx / params.num_tiles;
        tile = params.num_tiles - 1 - static_cast<int>(cta_idx - head * params.num_tiles);
        block.batch_idx = head / params.num_heads;
        block.head_idx = head - block.batch_idx * params.num_heads;
    } else {
        const unsigned work_idx = cta_idx / params.num_heads;
        block.head_idx = cta_idx - work_idx * params.num_heads;
        block.batch_idx = g_work[2 * work_idx];
        tile = g_work[2 * work_idx + 1];
    }
    block.kv_head_idx = block.head_idx / params.heads_per_kv_head;
    if (block.batch_idx < 0) return block;
    block.find(params, block.batch_idx, g_cu_seqlens_q, g_cu_seqlens_k, nullptr);
    const ChunkTiles<BLOCK_M> tiles(block.seqlen_q, block.diagonal_offset, params.chunk_length);
    long long first = 0, end = tiles.first_rows;  // of the tile's chunk
    block.chunk = tiles.first_chunk;
    if (tile >= tiles.first_tiles) {
        const int tiles_per_chunk = tiles.tiles_of(params.chunk_length);
        tile -= tiles.first_tiles;
        const int chunks = tile / tiles_per_chunk;
        tile -= chunks * tiles_per_chunk;
        first = end + static_cast<long long>(chunks) * params.chunk_length;
        end = first + params.chunk_length;
        block.chunk += 1 + chunks;
    }
    first += static_cast<long long>(tile) * BLOCK_M;
    block.first_query = static_cast<int>(min(first, static_cast<long long>(block.seqlen_q)));
    block.end_query = static_cast<int>(min(min(end, first + BLOCK_M), static_cast<long long>(block.seqlen_q)));
    return block;
}

// Keys [begin, end) that a tile of queries is turned alike for: those of its own chunk, of the one before, or of all
// older ones. A CTA takes the three in this order, and each in tiles from its first key on, the last tile first: a tile
// lies in one stretch.
struct Stretch {
    int begin, end;

    __device__ __forceinline__ bool exists() const { return end > begin; }
    template <int BLOCK_N>
    __device__ __forceinline__ int last_tile() const {
        return begin + (end - 1 - begin) / BLOCK_N * BLOCK_N;
    }
    // Of the keys that the queries see of their own chunk; none if they stand before key 0.
    static __device__ __forceinline__ Stretch own(const ChunkBlock& block, int chunk_length) {
        return {block.chunk * chunk_length, min(block.seqlen_k, block.position(block.end_query - 1) + 1)};
    }
    __device__ __forceinline__ Stretch older(int own_key, int chunk_length) const {
        return {begin == own_key ? max(0, begin - chunk_length) : 0, begin};
    }
};

// The position, within what RoPE is told, of a row of the queries of a tile: `first` of its first row, and none beyond
// `last`.
struct TurnPositions {
    long long first, last;

    template <typename Params>
    __device__ __forceinline__ TurnPositions(const Params& params, const ChunkBlock& block, const Stretch& stretch) {
        const int own_key = block.chunk * params.chunk_length;
        first = block.position(block.first_query) - own_key;
        last = params.far_position;
        if (stretch.end == own_key) {
            first += params.chunk_length;
        } else if (stretch.end < own_key) {
            first = last;
        }
    }
    __device__ __forceinline__ long long of(int row) const { return max(0ll, min(first + row, last)); }
    // Whether all rows stand there: so it is with older chunks, and mostly with the one before.
    __device__ __forceinline__ bool all_at_last() const { return first >= last; }
};
