// What may happen to a logit between the product and the softmax, in this order: scale, softcap, ALiBi, bias, masks. An
// option that a kernel is not compiled for (SOFTCAP, ALIBI, BIAS, MASK) costs nothing; one that it is compiled for may
// still be absent from a call: softcap 0, a null pointer.
//
// Logits are natural, not base 2, wherever something is added to them or they are capped: see online_softmax.cuh.
#pragma once
#include "attention/attention_params.cuh"
#include "attention/online_softmax.cuh"
#include "common/ptx.cuh"

constexpr bool NATURAL_LOGITS = SOFTCAP || ALIBI || BIAS;
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

// tanh(x) = (1 - e) / (1 + e) with e = e^(-2 |x|), in seven instructions: within 2^-22 of 1, not of the result, which
// is what a logit needs. The hardware's own tanh errs by 2^-11. `slope` is the derivative 1 - tanh^2, as 4 e /
// (1 + e)^2, which keeps its digits where tanh is near 1.
__device__ __forceinline__ float tanh_fast(float x, float& slope) {
    const float e = exp2_approx(fabsf(x) * (-2.0f * LOG2_E));
    const float r = reciprocal_approx(1.0f + e);
    slope = 4.0f * e * (r * r);
    return copysignf((1.0f - e) * r, x);
}
__device__ __forceinline__ float tanh_fast(float x) {
    float slope;
    return tanh_fast(x, slope);
}

// c tanh(score / c), to the last bits of Real.
template <typename Real>
__device__ __forceinline__ Real soft_cap(Real score, Real softcap, Real inverse_softcap) {
    return softcap * tanh(score * inverse_softcap);
}

// A number of the bias in the type of the sums. A finite double stays finite: it hides nothing.
template <typename Real, typename Bias>
__device__ __forceinline__ Real bias_value(Bias bias) {
    if constexpr (sizeof(Bias) > sizeof(Real)) {
        constexpr Bias LARGEST = 3.402823466e38;
        const bool infinite = bias == -negative_infinity<Bias>() || bias == negative_infinity<Bias>();
        // Written so that NaN passes.
        if (!infinite) bias = bias > LARGEST ? LARGEST : bias < -LARGEST ? -LARGEST : bias;
    }
    return static_cast<Real>(bias);
}

// Query minus key position along the diagonal, whose magnitude ALiBi multiplies with the slope.
template <typename Real>
__device__ __forceinline__ Real alibi_position(int query_idx, int diagonal_offset, int key_idx) {
    return static_cast<Real>(static_cast<long long>(query_idx) + diagonal_offset - key_idx);
}
