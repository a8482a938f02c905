// Which keys a query may see.
#pragma once

// One past the last key that query `query_idx` sees: it sees keys [0, key_end). With CAUSAL, key j is visible when
// j <= query_idx + diagonal_offset, so that rows far above the diagonal see nothing and key_end is 0.
template <bool CAUSAL>
__device__ __forceinline__ int key_end(int query_idx, int seqlen_k, int diagonal_offset) {
    return CAUSAL ? max(0, min(seqlen_k, query_idx + diagonal_offset + 1)) : seqlen_k;
}

// The key tiles that a block of queries [first_query, last_query] has to visit: [0, num_tiles), of which the first
// num_full_tiles are visible to every query in whole and need no mask.
struct KeyTiles {
    int num_tiles;
    int num_full_tiles;
};

template <bool CAUSAL, int BLOCK_N>
__device__ __forceinline__ KeyTiles key_tiles(int first_query, int last_query, int seqlen_k, int diagonal_offset) {
    KeyTiles tiles;
    const unsigned last_key_end = key_end<CAUSAL>(last_query, seqlen_k, diagonal_offset);
    tiles.num_tiles = (last_key_end + BLOCK_N - 1) / BLOCK_N;
    tiles.num_full_tiles = key_end<CAUSAL>(first_query, seqlen_k, diagonal_offset) / BLOCK_N;
    return tiles;
}
