// What a kernel of differential attention is told beside attention_params.cuh, whose heads are pairs: query heads 2 h
// and 2 h + 1, the streams of output head h. q.head and k.head lead from pair to pair, and so do the strides of bias
// and mask; what is added for the second stream is told here.
#pragma once
#include "attention/attention_params.cuh"
#include "attention/score_options.cuh"

template <typename Real>
struct DifferentialParams : AttentionParams<Real> {
    RowStrides state;               // of out1 and out2
    RowStrides lambda;              // of lambda [batch, seqlen_q, heads]; 0 where it is the same
    long long q_stream, k_stream;   // from stream to stream; k_stream 0: both read the same keys
    long long bias_stream, mask_stream, class_stream;  // likewise; 0: one for both
    long long alibi_head, alibi_stream;                // of slopes, from pair to pair and from stream to stream
    Real lambda_value;              // where there is no array
    Real eps, output_scale;         // what is added to the mean square; the factor of the result
    int norm;                       // 0 or 1: whether rows are divided by the root of their mean square
};

// One of the two streams of a pair of heads.
struct StreamOfPair {
    int stream;

    // Its head among those of q.
    __device__ __forceinline__ int head(int pair) const { return 2 * pair + stream; }

    // Its slope of ALiBi, for a pair of heads.
    template <typename Real>
    __device__ __forceinline__ Real slope(const DifferentialParams<Real>& params, const Real* g_alibi_slopes,
                                          int batch_idx, int pair) const {
        if (!ALIBI || g_alibi_slopes == nullptr) return 0;
        return g_alibi_slopes[batch_idx * params.alibi_batch + pair * params.alibi_head + stream * params.alibi_stream];
    }

    // Its options, for a pair of heads.
    template <typename Real>
    __device__ __forceinline__ ScoreOptions<Real> options(const DifferentialParams<Real>& params,
                                                          const BiasElement* g_bias, const unsigned char* g_mask,
                                                          const unsigned char* g_tile_class,
                                                          const Real* g_alibi_slopes, int batch_idx, int pair,
                                                          int q_tile) const {
        if (BIAS && g_bias != nullptr) g_bias += stream * params.bias_stream;
        if (MASK && g_mask != nullptr) g_mask += stream * params.mask_stream;
        if (TILE_CLASSES && g_tile_class != nullptr) g_tile_class += stream * params.class_stream;
        ScoreOptions<Real> own(params, g_bias, g_mask, g_tile_class, nullptr, batch_idx, pair, q_tile);
        own.slope = slope(params, g_alibi_slopes, batch_idx, pair);
        return own;
    }

    // The last tile of [first_tile, tile_idx] that one of the streams sees something of; first_tile - 1 if there is
    // none. `options` are those of this stream.
    template <typename Real>
    __device__ __forceinline__ int visible_tile(const DifferentialParams<Real>& params,
                                                const ScoreOptions<Real>& options, int first_tile,
                                                int tile_idx) const {
        if (!TILE_CLASSES || params.class_stream == 0) return options.visible_tile(params, first_tile, tile_idx);
        const long long to_other = stream == 0 ? params.class_stream : -params.class_stream;
        for (; tile_idx >= first_tile; tile_idx--) {
            const unsigned char* g_class = options.g_tile_class + tile_idx * params.tile_class.key;
            if (g_class[0] != TILE_HIDDEN || g_class[to_other] != TILE_HIDDEN) break;
        }
        return tile_idx;
    }
};

// The factor of the second stream in a row.
template <typename Real>
__device__ __forceinline__ Real lambda_of(const DifferentialParams<Real>& params, const Real* g_lambda, int batch_idx,
                                          int query_idx, int pair) {
    if (g_lambda == nullptr) return params.lambda_value;
    return g_lambda[batch_idx * params.lambda.batch + query_idx * params.lambda.seq + pair * params.lambda.head];
}
