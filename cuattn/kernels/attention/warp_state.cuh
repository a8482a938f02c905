// What a warp of a tensor-core forward kernel carries from tile to tile of keys, and what becomes of it: dropout of the
// probabilities, the end of the softmax, and the output on its way to memory. To be included after the constants
// ROW_TILES, WARP_M, V_STRIDE (of the output tile in shared memory) and the types Scores, Params and LanePosition.
#pragma once

#include "attention/philox.cuh"
#include "attention/tile_list.cuh"
#include "attention/score_tile.cuh"

// What a warp carries from tile to tile. Accumulator rows: see frag_acc_row; rows[t][1] is eight rows below rows[t][0].
struct WarpState {
    AccTiles<ROW_TILES, HEAD_DIM_V> acc_out;
    SoftmaxRow rows[ROW_TILES][2];
};

// Probabilities that dropout does not keep become 0, wherever the call lies in the mask; key_of(column): of the tile's
// columns behind the lane's first.
template <typename KeyOf>
__device__ __forceinline__ void drop_by_element(Scores& probabilities, const DropoutParams& dropout, unsigned head,
                                                int first_query, const KeyOf& key_of) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        const unsigned kept =
            dropout_kept<false, BLOCK_N / MMA_N>(dropout, head, first_query + t * MMA_M, key_of);
#pragma unroll
        for (int n = 0; n < BLOCK_N / MMA_N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if ((kept >> (4 * n + i) & 1) == 0) probabilities[t][n][i] = 0.0f;
            }
        }
    }
}

// Probabilities that dropout does not keep become 0. The others are scaled once, with the output. Two accumulators
// side by side and the two halves of their rows share a Philox call.
__device__ __forceinline__ void drop_probabilities(Scores& probabilities, const DropoutParams& dropout, unsigned head,
                                                   LanePosition lane) {
    if (ANYWHERE_IN_MASK && dropout.by_element) {
        drop_by_element(probabilities, dropout, head, lane.query(), [&](int column) { return lane.key() + column; });
        return;
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < BLOCK_N / MMA_N; n += 2) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const PhiloxWords words =
                    dropout_words(dropout, head, lane.query() + t * MMA_M, lane.key() + n * MMA_N + i);
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    if (words.word[w] >= dropout.threshold) probabilities[t][n + w % 2][w / 2 * 2 + i] = 0.0f;
                }
            }
        }
    }
}

// The same for a listed tile. Granules side by side in the tile share a call where they do in the logits.
__device__ __forceinline__ void drop_probabilities(Scores& probabilities, const DropoutParams& dropout, unsigned head,
                                                   const ListedPosition<false, BLOCK_N>& lane) {
    if (ANYWHERE_IN_MASK && dropout.by_element) {
        drop_by_element(probabilities, dropout, head, lane.own, [&](int column) { return lane.other(column); });
        return;
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            PhiloxWords words{};
            int last_key = -1;
#pragma unroll
            for (int n = 0; n < BLOCK_N / MMA_N; n++) {
                const int key = lane.other(n * MMA_N) + i;
                if (n == 0 || key / 16 != last_key / 16) {
                    words = dropout_words(dropout, head, lane.own + t * MMA_M, key);
                }
                last_key = key;
                const int half = key / 8 % 2;
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    const unsigned word = half ? words.word[2 * row + 1] : words.word[2 * row];
                    if (word >= dropout.threshold) probabilities[t][n][row * 2 + i] = 0.0f;
                }
            }
        }
    }
}

// Completes the row sums over the quad, and takes the sink in as one more term.
__device__ __forceinline__ void finish_rows(WarpState& state, float scale, float scale_log2, const float* g_sinks,
                                            int head_idx) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        SoftmaxRow& row = state.rows[i / 2][i % 2];
        finish_softmax(row, scale, scale_log2);
        if (g_sinks != nullptr) {
            float correction, term;
            row.sink_exponents(g_sinks[head_idx], correction, term);
            correction = exp2_approx(correction);
            row.sum = row.sum * correction + exp2_approx(term);
#pragma unroll
            for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
                state.acc_out[i / 2][e][i % 2 * 2] *= correction;
                state.acc_out[i / 2][e][i % 2 * 2 + 1] *= correction;
            }
        }
    }
}

// Divides by the row sums, rounds, and writes this warp's rows to its part of the shared output tile.
__device__ __forceinline__ void stage_output(const WarpState& state, Output (*s_out)[V_STRIDE], float factor,
                                             int lane_idx) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float row_factor = state.rows[t][half].inverse_sum() * factor;
            Output* s_row = s_out[t * MMA_M + half * 8 + frag_acc_row(lane_idx)] + frag_acc_col(lane_idx);
#pragma unroll
            for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
                store_pair(s_row + e * MMA_N, state.acc_out[t][e][2 * half] * row_factor,
                           state.acc_out[t][e][2 * half + 1] * row_factor);
            }
        }
    }
}

// Divides by the row sums, and writes this warp's rows [num_rows x num_cols] to memory without rounding them. `pairs`:
// every row begins at a multiple of 8 bytes.
__device__ __forceinline__ void store_output(const WarpState& state, float* g_rows, long long g_stride, float factor,
                                             int num_rows, int num_cols, bool pairs, int lane_idx) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        const int row = i * 8 + frag_acc_row(lane_idx);
        const float row_factor = state.rows[i / 2][i % 2].inverse_sum() * factor;
        if (row < num_rows) {
            store_acc_row(g_rows + row * g_stride, state.acc_out[i / 2], i % 2, row_factor, num_cols, pairs, lane_idx);
        }
    }
}
