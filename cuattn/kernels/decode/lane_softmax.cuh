// The online softmax of a group of lanes (decode_lanes.cuh): what a lane carries from step to step, and how the states
// of a warp's groups become one.
//
// Constants used: Storage, Query, Accumulator, and those of decode_lanes.cuh.
#pragma once
#include "attention/online_softmax.cuh"
#include "common/ptx.cuh"
#include "decode/decode_lanes.cuh"

using Real = Accumulator;
using SoftmaxRow = OnlineSoftmaxRow<Real>;
using ValueColumns = LaneColumns<Storage, HEAD_DIM_V, false>;

__device__ __forceinline__ Real power_of_two(Real x) {
    if constexpr (sizeof(Query) == 2) {
        return exp2_approx(x);
    } else {
        return exp2(x);
    }
}

// What a lane carries from step to step: the softmax of its own row, and its columns of the output of all rows.
struct LaneState {
    SoftmaxRow row;
    Real acc_out[ROWS][ValueColumns::PER_LANE];
};

// Multiplies a row's columns with what its owner says, for all rows.
__device__ __forceinline__ void scale_output(LaneState& state, Real own_factor) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const Real factor = from_row_owner(own_factor, r);
#pragma unroll
        for (int c = 0; c < ValueColumns::PER_LANE; c++) state.acc_out[r][c] *= factor;
    }
}

// Own logits become probabilities relative to the running maximum; the output follows when a maximum rises.
__device__ __forceinline__ void softmax_step(LaneState& state, Real (&own)[PAIRS]) {
    Real step_max = own[0];
#pragma unroll
    for (int i = 1; i < OWN; i++) step_max = fmax(step_max, own[i]);
    const Real correction_log2 = state.row.raise_max(row_max(step_max));
    if (__any_sync(0xffffffff, correction_log2 != Real(0))) {
        const Real correction = power_of_two(correction_log2);
        state.row.sum *= correction;  // of this lane's own pairs only
        scale_output(state, correction);
    }
    const Real reference = state.row.reference();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        own[i] = power_of_two(SoftmaxRow::exponent(own[i] - reference));
        state.row.sum += own[i];
    }
}

// The states of all groups of the warp become one, the same in every group.
__device__ __forceinline__ void merge_groups(LaneState& state) {
    state.row.sum = row_sum(state.row.sum);
#pragma unroll
    for (int lane_mask = LANES; lane_mask < WARP_SIZE; lane_mask *= 2) {
        const Real other_max = __shfl_xor_sync(0xffffffff, state.row.max_logit, lane_mask);
        const Real correction = power_of_two(state.row.raise_max(other_max));
        state.row.sum *= correction;
        state.row.sum += __shfl_xor_sync(0xffffffff, state.row.sum, lane_mask);
        scale_output(state, correction);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < ValueColumns::PER_LANE; c++) {
                state.acc_out[r][c] += __shfl_xor_sync(0xffffffff, state.acc_out[r][c], lane_mask);
            }
        }
    }
}
