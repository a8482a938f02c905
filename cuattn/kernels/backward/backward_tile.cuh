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
// Constants used: OWN_KEYS, BLOCK_OTHER, ROW_TILES of the including kernel; the options (score_options.cuh), DROPOUT.
#pragma once
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/query_block.cuh"
#include "backward/ready_lse.cuh"
#include "attention/score_options.cuh"
#include "attention/warp_products.cuh"

constexpr int COL_TILES = BLOCK_OTHER / MMA_N;

using Tile = AccTiles<ROW_TILES, BLOCK_OTHER>;

static_assert(BLOCK_OTHER % 16 == 0, "a tile is whole k steps of the products with it");

// Where a lane's part of a tile begins.
struct TilePosition {
    int own, other;

    __device__ __forceinline__ int query() const { return OWN_KEYS ? other : own; }
    __device__ __forceinline__ int key() const { return OWN_KEYS ? own : other; }
};

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

// Scores become natural logits before bias and masks: scale, softcap, ALiBi. `slopes` are the derivatives of the
// softcap, 1 - tanh^2; they are set only where SOFTCAP is compiled in.
__device__ __forceinline__ void scale_scores(Tile& scores, Tile& slopes, const AttentionParams<float>& params,
                                             float alibi_slope, int diagonal_offset, TilePosition lane) {
    const float inverse_softcap = 1.0f / params.softcap;
    const float position = alibi_position<float>(lane.query(), diagonal_offset, lane.key());
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& score = scores[t][n][i];
                score *= params.scale;
                if (SOFTCAP) {
                    slopes[t][n][i] = 1.0f;
                    if (params.softcap != 0.0f) {
                        score = params.softcap * tanh_fast(score * inverse_softcap, slopes[t][n][i]);
                    }
                }
                if (ALIBI) {
                    const int row = t * MMA_M + i / 2 * 8, column = n * MMA_N + i % 2;
                    score -= alibi_slope * fabsf(position + static_cast<float>(OWN_KEYS ? column - row : row - column));
                }
            }
        }
    }
}

// Adds the bias, and -inf where the mask says so. Nothing outside of [num_own, num_other] is read.
__device__ __forceinline__ void add_bias_and_mask(Tile& scores, const AttentionParams<float>& params,
                                                  const ScoreOptions<float>& options, TilePosition lane, int num_own,
                                                  int num_other) {
    const int num_columns = num_other - lane.other;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = t * MMA_M + half * 8;
            if (lane.own + row >= num_own) continue;
            const int query = lane.query() + (OWN_KEYS ? 0 : row), key = lane.key() + (OWN_KEYS ? row : 0);
            if (BIAS && options.g_bias != nullptr) {
                const BiasElement* g_bias = options.g_bias + params.bias.offset(0, 0, query, key);
                const long long stride = OWN_KEYS ? params.bias.query : params.bias.key;
#pragma unroll
                for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int column = n * MMA_N + i;
                        if (column < num_columns) {
                            scores[t][n][2 * half + i] += bias_value<float>(g_bias[column * stride]);
                        }
                    }
                }
            }
            if (MASK && options.g_mask != nullptr) {
                const unsigned char* g_mask = options.g_mask + params.mask.offset(0, 0, query, key);
                const long long stride = OWN_KEYS ? params.mask.query : params.mask.key;
#pragma unroll
                for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int column = n * MMA_N + i;
                        if (column < num_columns && !g_mask[column * stride]) {
                            scores[t][n][2 * half + i] = negative_infinity<float>();
                        }
                    }
                }
            }
        }
    }
}

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

// 0 where query and key do not see each other by their positions, and for keys that do not exist: they are rows of
// zeros, whose probabilities e^(0 - lse) have no bound. (A query that does not exist has lse +inf.) `band` is that of
// the owned side, of num_own rows.
template <typename Band>
__device__ __forceinline__ void hide_outside_band(Tile& probabilities, const Band& band, TilePosition lane,
                                                  int num_own) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = lane.own + t * MMA_M + half * 8;
            // Counted from this lane's first column, so that the comparisons below are with constants.
            const int begin = band.begin(row) - lane.other;
            const int end = !OWN_KEYS || row < num_own ? band.end(row) - lane.other : 0;
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int column = n * MMA_N + i;
                    if (column >= end || (Band::HAS_BEGIN && column < begin)) probabilities[t][n][2 * half + i] = 0.0f;
                }
            }
        }
    }
}

// Marks the probabilities that dropout does not keep with the sign: they have no part in dv, and no dP in dS. Two
// accumulators side by side and the two halves of their rows share a Philox call.
__device__ __forceinline__ void mark_dropped(Tile& probabilities, const DropoutParams& dropout, unsigned head,
                                             TilePosition lane) {
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

__device__ __forceinline__ void multiply_elements(Tile& tile, const Tile& factors) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) tile[t][n][i] *= factors[t][n][i];
        }
    }
}
