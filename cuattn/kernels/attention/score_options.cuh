// The arrays that options on logits come with, and what they do to a whole tile. What happens to a logit is in
// logits.cuh.
#pragma once
#include "attention/attention_params.cuh"

constexpr bool TILE_CLASSES = BIAS || MASK;  // g_tile_class says which tiles a bias and a mask leave alone or hide

// What a bias and a mask do to a tile, together (attention_mask_tiles.cu finds out).
enum TileClass : unsigned char {
    TILE_HIDDEN = 0,  // no key of it is visible to any query of it: it is skipped
    TILE_OPEN = 1,    // they change nothing: it is treated as if there were none
    TILE_MIXED = 2,
};

// Pointers of the options, moved to one batch entry and head. BiasElement is any float type.
template <typename Real>
struct ScoreOptions {
    const BiasElement* g_bias;         // [seqlen_q, seqlen_k], strides params.bias.query and .key; may be null
    const unsigned char* g_mask;       // likewise; 0 hides a key
    const unsigned char* g_tile_class;  // [query tiles, key tiles]; null: every tile is open
    Real slope;                        // of ALiBi; 0: none

    __device__ __forceinline__ ScoreOptions(const AttentionParams<Real>& params, const BiasElement* bias,
                                            const unsigned char* mask, const unsigned char* tile_class,
                                            const Real* alibi_slopes, int batch_idx, int head_idx, int q_tile) {
        if (BIAS && bias != nullptr) bias += params.bias.offset(batch_idx, head_idx, 0, 0);
        if (MASK && mask != nullptr) mask += params.mask.offset(batch_idx, head_idx, 0, 0);
        if (TILE_CLASSES && tile_class != nullptr) {
            tile_class += params.tile_class.offset(batch_idx, head_idx, q_tile, 0);
        }
        g_bias = bias;
        g_mask = mask;
        g_tile_class = tile_class;
        slope = 0;
        if (ALIBI && alibi_slopes != nullptr) slope = alibi_slopes[batch_idx * params.alibi_batch + head_idx];
    }

    __device__ __forceinline__ TileClass tile_class(const AttentionParams<Real>& params, int tile_idx) const {
        if (!TILE_CLASSES || g_tile_class == nullptr) return TILE_OPEN;
        return static_cast<TileClass>(g_tile_class[tile_idx * params.tile_class.key]);
    }

    // The last tile of [first_tile, tile_idx] that is not hidden; first_tile - 1 if all are.
    __device__ __forceinline__ int visible_tile(const AttentionParams<Real>& params, int first_tile,
                                                int tile_idx) const {
        if (TILE_CLASSES) {
            while (tile_idx >= first_tile && tile_class(params, tile_idx) == TILE_HIDDEN) tile_idx--;
        }
        return tile_idx;
    }
};

// The class of one tile of the logits.
template <typename Real>
__device__ __forceinline__ TileClass tile_class_at(const AttentionParams<Real>& params,
                                                   const unsigned char* g_tile_class, int batch_idx, int head_idx,
                                                   int q_tile, int k_tile) {
    if (!TILE_CLASSES || g_tile_class == nullptr) return TILE_OPEN;
    return static_cast<TileClass>(g_tile_class[params.tile_class.offset(batch_idx, head_idx, q_tile, k_tile)]);
}
