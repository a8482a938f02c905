// The elements of one tile of the logits in the backward pass, in the layout of lane_products.cuh: from scores to
// probabilities P, and from P and dP = dout v^T to dS.
//
//     P = exp(logit - lse)    dS = P (Z dP - delta)    Z = 0 or 1 / (1 - dropout_p)
//
// A CTA owns rows of one side and walks over tiles of the other: it owns queries and walks over keys, or (OWN_KEYS)
// owns keys and walks over queries, so that a tile lies transposed. Everything is in the element type and rounds to
// nearest.
//
// Constants used: Element; OWN_KEYS, LANE_M, LANE_N of the including kernel; the options (logits.cuh), DROPOUT.
#pragma once
#include "attention/lane_products.cuh"
#include "attention/logits.cuh"
#include "attention/philox.cuh"
#include "attention/tile_list.cuh"
#include "backward/ready_lse.cuh"

using Position = TilePosition<OWN_KEYS>;
using AlibiRows = TileRows<LaneLayout, OWN_KEYS, Element>;

// Whether dropout keeps element [i][j] of a lane's part of a tile, ...
__device__ __forceinline__ bool is_kept(const DropoutParams& dropout, unsigned head, Position lane, int i, int j) {
    const int query = OWN_KEYS ? j * LANES_PER_ROW : i, key = OWN_KEYS ? i : j * LANES_PER_ROW;
    return dropout_keeps(dropout, head, lane.query() + query, lane.key() + key);
}

// ... and of a listed tile.
template <int COLUMNS>
__device__ __forceinline__ bool is_kept(const DropoutParams& dropout, unsigned head,
                                        const ListedPosition<OWN_KEYS, COLUMNS>& lane, int i, int j) {
    const int column = lane.other(j * LANES_PER_ROW), row = lane.own + i;
    return dropout_keeps(dropout, head, OWN_KEYS ? column : row, OWN_KEYS ? row : column);
}

// Logits become probabilities without those that dropout takes away, and dP becomes dS. s_lse, s_delta: of this lane's
// first query; lse is ready (ready_lse.cuh). What is hidden is 0 in both, whatever lse and delta are: beside a logit of
// +inf lse is NaN.
template <typename Place>
__device__ __forceinline__ void differentiate(Weights& scores, Weights& dp, const AttentionParams<Element>& params,
                                              const Element* s_lse, const Element* s_delta, unsigned head,
                                              Place lane) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            const int query = OWN_KEYS ? j * LANES_PER_ROW : i;
            Element difference = scores[i][j] - s_lse[query];
            if (difference > Element(0) && is_large(s_lse[query])) difference = 0;
            const bool hidden = scores[i][j] == negative_infinity<Element>();
            const Element p = hidden ? Element(0) : exp2(difference * log2_e<Element>());
            bool kept = true;
            if (DROPOUT && params.use_dropout) {
                kept = is_kept(params.dropout, head, lane, i, j);
            }
            // keep_scale is 1 without dropout.
            const Element weighted = !DROPOUT ? dp[i][j] : kept ? dp[i][j] * params.keep_scale : Element(0);
            dp[i][j] = hidden ? Element(0) : p * (weighted - s_delta[query]);
            scores[i][j] = kept ? p : Element(0);
        }
    }
}
