// The elements of one tile of the logits in the backward pass, in the accumulator layout of the tensor cores (mma.cuh):
// from scores to probabilities P, and from P and dP = dout v^T to dS.
//
//     P = exp(logit - lse)    dS = P (Z dP - delta)    Z = 0 or 1 / (1 - dropout_p)
//
// P is 2^LOG2_P_FACTOR times as large, and Z dP - delta that much smaller; dS is dS.
//
// A CTA owns BLOCK_OWN rows of one side and walks over tiles of BLOCK_OTHER columns of the other: it owns queries and
// walks over keys, or (OWN_KEYS) owns keys and walks over queries, so that a tile lies transposed. Either way a warp
// has ROW_TILES * MMA_M rows, and a lane's element [t][n][i] is row t * MMA_M + i / 2 * 8 and column n * MMA_N + i % 2
// from where its part of the tile begins.
//
// Constants used: OWN_KEYS, BLOCK_OTHER, ROW_TILES of the including kernel; the options (logits.cuh), DROPOUT.
#pragma once
#include "attention/logits.cuh"
#include "attention/philox.cuh"
#include "attention/query_block.cuh"
#include "attention/tile_list.cuh"
#include "backward/ready_lse.cuh"
#include "attention/warp_products.cuh"

constexpr int COL_TILES = BLOCK_OTHER / MMA_N;

using Layout = AccLayout<ROW_TILES, BLOCK_OTHER>;
using Tile = Layout::Tile;
using Position = TilePosition<OWN_KEYS>;
using AlibiRows = TileRows<Layout, OWN_KEYS, float>;

static_assert(BLOCK_OTHER % 16 == 0, "a tile is whole k steps of the products with it");

// A number of every query, lse or delta. Queries are rows, whose two numbers a lane keeps in registers, or columns,
// whose numbers are in shared memory beside the tile.
struct QueryTerms {
    float rows[ROW_TILES][2];
    const float* s_columns;  // from this lane's first column on

    __device__ __forceinline__ float at(int t, int n, int i) const {
        return OWN_KEYS ? s_columns[n * MMA_N + i % 2] : rows[t][i / 2];
    }

    // For the whole warp: whether an lse of its rows, or of the BLOCK_OTHER columns at s_lse, is large.
    __device__ __forceinline__ bool any_large(const float* s_lse, int lane_idx) const {
        float largest = 0.0f;
        if (OWN_KEYS) {
#pragma unroll
            for (int first = 0; first < BLOCK_OTHER; first += WARP_SIZE) {
                const int column = first + lane_idx;
                const bool exists = BLOCK_OTHER % WARP_SIZE == 0 || column < BLOCK_OTHER;
                if (exists) largest = fmaxf(largest, fabsf(s_lse[column]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) largest = fmaxf(largest, fabsf(rows[i / 2][i % 2]));
        }
        return __any_sync(0xffffffff, is_large(largest));
    }
};

// The base-2 exponent of a probability, from a natural logit or, where NATURAL_LOGITS is false, a product q k^T.
__device__ __forceinline__ float exponent_of(float score, float ready_lse, float scale_log2) {
    if (!NATURAL_LOGITS) return fmaf(score, scale_log2, -ready_lse);
    const float difference = score - ready_lse;
    return LOG2_P_FACTOR == 0 ? difference * LOG2_E : fmaf(difference, LOG2_E, float(LOG2_P_FACTOR));
}

// The same where the lse may be large: ready_lse.cuh. The product with the scale is rounded by itself, as it was in the
// lse of a forward that saw one key.
__device__ __forceinline__ float exponent_of_large(float score, float ready_lse, float scale, float scale_log2) {
    float exponent = exponent_of(score, ready_lse, scale_log2);
    if (!NATURAL_LOGITS && is_large(ready_lse)) {
        exponent = fmaf(__fmul_rn(score, scale) - 0.5f * ready_lse, LOG2_E, float(LOG2_P_FACTOR));
    }
    // Not fminf, which would make a number of NaN.
    return exponent > LOG2_P_FACTOR ? float(LOG2_P_FACTOR) : exponent;
}

// Logits, or products q k^T where NATURAL_LOGITS is false, become probabilities. `large`: some lse of the tile is.
__device__ __forceinline__ void probabilities_from_logits(Tile& scores, const QueryTerms& lse, bool large, float scale,
                                                          float scale_log2) {
    auto exponentiate = [&](auto exponent) {
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // Written out where a mask may have hidden the key: lse is NaN beside a logit of +inf.
                    const bool hidden = TILE_CLASSES && scores[t][n][i] == negative_infinity<float>();
                    const float p = exp2_approx(exponent(scores[t][n][i], lse.at(t, n, i)));
                    scores[t][n][i] = hidden ? 0.0f : p;
                }
            }
        }
    };
    if (large) {
        exponentiate([&](float score, float ready_lse) {
            return exponent_of_large(score, ready_lse, scale, scale_log2);
        });
    } else {
        exponentiate([&](float score, float ready_lse) { return exponent_of(score, ready_lse, scale_log2); });
    }
}

// Marks the probabilities that dropout does not keep with the sign, wherever the call lies in the mask;
// column_of(column): of the tile's columns behind the lane's first.
template <typename ColumnOf>
__device__ __forceinline__ void mark_by_element(Tile& probabilities, const DropoutParams& dropout, unsigned head,
                                                int first_row, const ColumnOf& column_of) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        const unsigned kept = dropout_kept<OWN_KEYS, COL_TILES>(dropout, head, first_row + t * MMA_M, column_of);
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& p = probabilities[t][n][i];
                if ((kept >> (4 * n + i) & 1) == 0) p = -p;
            }
        }
    }
}

// Marks the probabilities that dropout does not keep with the sign: they have no part in dv, and no dP in dS. Two
// accumulators side by side and the two halves of their rows share a Philox call.
__device__ __forceinline__ void mark_dropped(Tile& probabilities, const DropoutParams& dropout, unsigned head,
                                             Position lane) {
    if (ANYWHERE_IN_MASK && dropout.by_element) {
        mark_by_element(probabilities, dropout, head, lane.own, [&](int column) { return lane.other + column; });
        return;
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n += 2) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = t * MMA_M, column = n * MMA_N + i;
                const PhiloxWords words =
                    dropout_words(dropout, head, lane.query() + (OWN_KEYS ? column : row),
                                  lane.key() + (OWN_KEYS ? row : column));
#pragma unroll
                for (int w = 0; w < 4; w++) {  // word w is of query + 8 (w / 2), key + 8 (w % 2)
                    const int row_half = OWN_KEYS ? w % 2 : w / 2, column_tile = OWN_KEYS ? w / 2 : w % 2;
                    float& p = probabilities[t][n + column_tile][2 * row_half + i];
                    if (words.word[w] >= dropout.threshold) p = -p;
                }
            }
        }
    }
}

// The same for a listed tile. Granules side by side in the tile share a call where they do in the logits.
__device__ __forceinline__ void mark_dropped(Tile& probabilities, const DropoutParams& dropout, unsigned head,
                                             const ListedPosition<OWN_KEYS, BLOCK_OTHER>& lane) {
    if (ANYWHERE_IN_MASK && dropout.by_element) {
        mark_by_element(probabilities, dropout, head, lane.own, [&](int column) { return lane.other(column); });
        return;
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        const int row = lane.own + t * MMA_M;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            PhiloxWords words{};
            int last_column = -1;
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
                const int column = lane.other(n * MMA_N) + i;
                if (n == 0 || column / 16 != last_column / 16) {
                    words = dropout_words(dropout, head, OWN_KEYS ? column : row, OWN_KEYS ? row : column);
                }
                last_column = column;
                const bool second = column / 8 % 2;
#pragma unroll
                for (int half = 0; half < 2; half++) {  // word w is of query + 8 (w / 2), key + 8 (w % 2)
                    const unsigned word = second ? words.word[OWN_KEYS ? 2 + half : 2 * half + 1]
                                                 : words.word[OWN_KEYS ? half : 2 * half];
                    float& p = probabilities[t][n][2 * half + i];
                    if (word >= dropout.threshold) p = -p;
                }
            }
        }
    }
}

// What of the marked probabilities has a part in dv.
__device__ __forceinline__ void kept_probabilities(Tile& kept, const Tile& probabilities) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = probabilities[t][n][i];
                kept[t][n][i] = DROPOUT && signbit(p) ? 0.0f : p;
            }
        }
    }
}

// dP becomes dS, with probabilities as mark_dropped leaves them. It is 0 where they are: delta and dP are finite.
__device__ __forceinline__ void score_gradients(Tile& dp, const Tile& probabilities, const QueryTerms& delta,
                                                float keep_scale) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = probabilities[t][n][i];
                if (DROPOUT) {
                    const float kept = signbit(p) ? 0.0f : keep_scale * INVERSE_P_FACTOR;
                    dp[t][n][i] = fabsf(p) * fmaf(dp[t][n][i], kept, -delta.at(t, n, i));
                } else {
                    dp[t][n][i] = p * fmaf(dp[t][n][i], INVERSE_P_FACTOR, -delta.at(t, n, i));
                }
            }
        }
    }
}
