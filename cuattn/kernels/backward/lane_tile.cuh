// The elements of one tile of the logits in the backward pass, in the layout of lane_products.cuh: from scores to
// probabilities P, and from P and dP = dout v^T to dS.
//
//     P = exp(logit - lse)    dS = P (Z dP - delta)    Z = 0 or 1 / (1 - dropout_p)
//
// A CTA owns rows of one side and walks over tiles of the other: it owns queries and walks over keys, or (OWN_KEYS)
// owns keys and walks over queries, so that a tile lies transposed. Everything is in the element type and rounds to
// nearest.
//
// Constants used: Element; OWN_KEYS, LANE_M, LANE_N of the including kernel; the options (score_options.cuh), DROPOUT.
#pragma once
#include "attention/lane_products.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "backward/ready_lse.cuh"
#include "attention/score_options.cuh"

// Where a lane's part of a tile begins: weights[i][j] is owned row own + i, and row other + j * LANES_PER_ROW of the
// other side.
struct TilePosition {
    int own, other;

    __device__ __forceinline__ int query() const { return OWN_KEYS ? other : own; }
    __device__ __forceinline__ int key() const { return OWN_KEYS ? own : other; }
};

// 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = e^(-2 |x|), which keeps its digits where tanh is near 1.
__device__ __forceinline__ Element tanh_slope(Element x) {
    const Element e = exp(Element(-2) * fabs(x));
    const Element sum = Element(1) + e;
    return Element(4) * e / (sum * sum);
}

// Scores become logits: scale, softcap, ALiBi. `slopes` are the derivatives of the softcap; they are
// set only where SOFTCAP is compiled in.
__device__ __forceinline__ void scale_scores(Weights& scores, Weights& slopes, const AttentionParams<Element>& params,
                                             Element alibi_slope, int diagonal_offset, TilePosition lane) {
    const Element inverse_softcap = Element(1) / params.softcap;
    const Element position = alibi_position<Element>(lane.query(), diagonal_offset, lane.key());
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            Element& score = scores[i][j];
            score *= params.scale;
            if (SOFTCAP) {
                slopes[i][j] = 1;
                if (params.softcap != Element(0)) {
                    slopes[i][j] = tanh_slope(score * inverse_softcap);
                    score = soft_cap(score, params.softcap, inverse_softcap);
                }
            }
            if (ALIBI) {
                const int distance = OWN_KEYS ? j * LANES_PER_ROW - i : i - j * LANES_PER_ROW;
                score -= alibi_slope * fabs(position + static_cast<Element>(distance));
            }
        }
    }
}

// Adds the bias, and -inf where the mask says so. Nothing outside of [num_own, num_other] is read.
__device__ __forceinline__ void add_bias_and_mask(Weights& scores, const AttentionParams<Element>& params,
                                                  const ScoreOptions<Element>& options, TilePosition lane, int num_own,
                                                  int num_other) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        const int num_columns = lane.own + i < num_own ? num_other - lane.other : 0;
        const int query = lane.query() + (OWN_KEYS ? 0 : i), key = lane.key() + (OWN_KEYS ? i : 0);
        if (BIAS && options.g_bias != nullptr) {
            const BiasElement* g_bias = options.g_bias + params.bias.offset(0, 0, query, key);
            const long long stride = OWN_KEYS ? params.bias.query : params.bias.key;
#pragma unroll
            for (int j = 0; j < LANE_N; j++) {
                const int column = j * LANES_PER_ROW;
                if (column < num_columns) scores[i][j] += bias_value<Element>(g_bias[column * stride]);
            }
        }
        if (MASK && options.g_mask != nullptr) {
            const unsigned char* g_mask = options.g_mask + params.mask.offset(0, 0, query, key);
            const long long stride = OWN_KEYS ? params.mask.query : params.mask.key;
#pragma unroll
            for (int j = 0; j < LANE_N; j++) {
                const int column = j * LANES_PER_ROW;
                if (column < num_columns && !g_mask[column * stride]) scores[i][j] = negative_infinity<Element>();
            }
        }
    }
}

// -inf where query and key do not see each other by their positions. `band` is that of the owned side.
template <typename Band>
__device__ __forceinline__ void hide_outside_band(Weights& scores, const Band& band, TilePosition lane) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        // Counted from this lane's first column, so that the comparisons below are with constants.
        const int begin = band.begin(lane.own + i) - lane.other, end = band.end(lane.own + i) - lane.other;
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            const int column = j * LANES_PER_ROW;
            if (column >= end || (Band::HAS_BEGIN && column < begin)) scores[i][j] = negative_infinity<Element>();
        }
    }
}

// Logits become probabilities without those that dropout takes away, and dP becomes dS. s_lse, s_delta: of this lane's
// first query; lse is ready (ready_lse.cuh). What is hidden is 0 in both, whatever lse and delta are: beside a logit of
// +inf lse is NaN.
__device__ __forceinline__ void differentiate(Weights& scores, Weights& dp, const AttentionParams<Element>& params,
                                              const Element* s_lse, const Element* s_delta, unsigned head,
                                              TilePosition lane) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            const int query = OWN_KEYS ? j * LANES_PER_ROW : i, key = OWN_KEYS ? i : j * LANES_PER_ROW;
            Element difference = scores[i][j] - s_lse[query];
            if (difference > Element(0) && is_large(s_lse[query])) difference = 0;
            const bool hidden = scores[i][j] == negative_infinity<Element>();
            const Element p = hidden ? Element(0) : exp2(difference * log2_e<Element>());
            bool kept = true;
            if (DROPOUT && params.use_dropout) {
                kept = dropout_keeps(params.dropout, head, lane.query() + query, lane.key() + key);
            }
            // keep_scale is 1 without dropout.
            const Element weighted = !DROPOUT ? dp[i][j] : kept ? dp[i][j] * params.keep_scale : Element(0);
            dp[i][j] = hidden ? Element(0) : p * (weighted - s_delta[query]);
            scores[i][j] = kept ? p : Element(0);
        }
    }
}

// ds *= slopes: through the softcap.
__device__ __forceinline__ void multiply_elements(Weights& ds, const Weights& slopes) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) ds[i][j] *= slopes[i][j];
    }
}
