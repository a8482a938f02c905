// The decay within a chunk of tokens, of one number a token.
//
// With G_i = g_0 + ... + g_i, key j reaches query i >= j by e^(G_i - G_j), the state before the chunk by e^G_i, and the
// state after it gets key j by e^(G_last - G_j): only such differences are exponentiated, so that nothing overflows. A
// sum keeps a float of rest, so that a small difference of large sums is as exact as the decays are. A decay from which
// nothing is left in a float, -inf above all, is no term of the sums: it is counted, and what lies on different sides
// of one does not meet.
#pragma once
#include "common/ptx.cuh"
#include "linear/feature_map.cuh"

constexpr float RESET_BELOW = -200.0f;  // e^-200 < 2^-288: 0 times every float

// Of the tokens of a chunk, in shared memory; logarithms to base 2.
template <int TOKENS>
struct ChunkDecay {
    float sum[TOKENS], rest[TOKENS];  // G_i = sum + rest
    int resets[TOKENS];               // up to and including token i
    float of_state[TOKENS];           // e^G_i, or 0 behind a reset
    float to_end[TOKENS];             // e^(G_last - G_i), or 0 before a reset
    float total;                      // e^G_last, or 0 if there is a reset

    // By one warp. decay: that of tokens lane_idx * (TOKENS / 32) + i, 0 for those that do not exist.
    __device__ __forceinline__ void fill(const float (&decay)[TOKENS / 32], int lane_idx) {
        constexpr int OWN = TOKENS / 32;
        double sums[OWN];
        int counts[OWN];
        double running = 0;
        int count = 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const bool resets_here = decay[i] <= RESET_BELOW;
            running += resets_here ? 0.0 : static_cast<double>(decay[i]);
            count += resets_here;
            sums[i] = running;
            counts[i] = count;
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const double before = __shfl_up_sync(0xffffffff, running, step);
            const int count_before = __shfl_up_sync(0xffffffff, count, step);
            if (lane_idx >= step) {
                running += before;
                count += count_before;
            }
        }
        const double last = __shfl_sync(0xffffffff, running, 31);
        const int last_count = __shfl_sync(0xffffffff, count, 31);
        const double own_before = running - sums[OWN - 1];
        const int count_before = count - counts[OWN - 1];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int token = lane_idx * OWN + i;
            const double log2_sum = (own_before + sums[i]) * 1.4426950408889634;
            const double log2_rest = last * 1.4426950408889634 - log2_sum;
            const int here = count_before + counts[i];
            const float rounded = static_cast<float>(log2_sum);
            sum[token] = rounded;
            rest[token] = static_cast<float>(log2_sum - rounded);
            resets[token] = here;
            of_state[token] = here == 0 ? exp2f(rounded) : 0.0f;
            to_end[token] = here == last_count ? exp2f(static_cast<float>(log2_rest)) : 0.0f;
        }
        if (lane_idx == 0) total = last_count == 0 ? exp2f(static_cast<float>(last * 1.4426950408889634)) : 0.0f;
    }
};

// What of a token's decay a lane needs for a tile of weights.
struct TokenDecay {
    float sum, rest;
    int resets;

    template <int TOKENS>
    __device__ __forceinline__ void load(const ChunkDecay<TOKENS>& chunk, int token) {
        sum = chunk.sum[token];
        rest = chunk.rest[token];
        resets = chunk.resets[token];
    }

    // e^(G of this token - G of an earlier one).
    __device__ __forceinline__ float since(const TokenDecay& earlier) const {
        return resets == earlier.resets ? exp2_approx((sum - earlier.sum) + (rest - earlier.rest)) : 0.0f;
    }
};
