// What a lane of a forward kernel without tensor cores carries from tile to tile of keys, and what becomes of it: the
// step of the softmax, dropout of the probabilities, and the end of the softmax. To be included after the constants
// LANE_M and LANE_N, after attention/lane_products.cuh, and after the types SoftmaxRow and LanePosition.
#pragma once

#include "attention/online_softmax.cuh"
#include "attention/philox.cuh"
#include "attention/tile_list.cuh"

// What a lane carries from tile to tile.
struct LaneState {
    RowParts<HEAD_DIM_V> acc_out;
    SoftmaxRow rows[LANE_M];
};

// scores become probabilities relative to the running maximum; the accumulated output follows when the maximum rises.
__device__ __forceinline__ void softmax_step(LaneState& state, Weights& scores) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        SoftmaxRow& row = state.rows[i];
        Element tile_max = scores[i][0];
#pragma unroll
        for (int j = 1; j < LANE_N; j++) tile_max = fmax(tile_max, scores[i][j]);
#pragma unroll
        for (int lane_mask = 1; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
            tile_max = fmax(tile_max, __shfl_xor_sync(0xffffffff, tile_max, lane_mask));
        }
        const Element correction = exp2(row.raise_max(tile_max));
        const Element reference = row.reference();
        row.sum *= correction;  // of this lane's columns only: summed over the row after the last tile
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            scores[i][j] = exp2(SoftmaxRow::exponent(scores[i][j] - reference));
            row.sum += scores[i][j];
        }
        state.acc_out[i].scale(correction);
    }
}

// Probabilities that dropout does not keep become 0. The others are scaled once, with the output.
__device__ __forceinline__ void drop_probabilities(Weights& probabilities, const DropoutParams& dropout, unsigned head,
                                                   LanePosition lane) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            const bool kept = dropout_keeps(dropout, head, lane.query() + i, lane.key() + j * LANES_PER_ROW);
            if (!kept) probabilities[i][j] = 0;
        }
    }
}

// The same for a listed tile.
__device__ __forceinline__ void drop_probabilities(Weights& probabilities, const DropoutParams& dropout, unsigned head,
                                                   const ListedPosition<false, BLOCK_N>& lane) {
#pragma unroll
    for (int j = 0; j < LANE_N; j++) {
        const int key = lane.other(j * LANES_PER_ROW);
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
            if (!dropout_keeps(dropout, head, lane.own + i, key)) probabilities[i][j] = 0;
        }
    }
}

// Completes a row's sum over its lanes, takes the sink in as one more term, and returns what to multiply the
// accumulated output with.
__device__ __forceinline__ Element finish_row(SoftmaxRow& row, const Element* g_sinks, int head_idx) {
#pragma unroll
    for (int lane_mask = 1; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
        row.sum += __shfl_xor_sync(0xffffffff, row.sum, lane_mask);
    }
    if (g_sinks == nullptr) return row.inverse_sum();
    Element correction, term;
    row.sink_exponents(g_sinks[head_idx], correction, term);
    correction = exp2(correction);
    row.sum = row.sum * correction + exp2(term);
    return correction * row.inverse_sum();
}
