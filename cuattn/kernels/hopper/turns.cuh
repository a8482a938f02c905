// Consuming warpgroups in turns: while one has the tensor cores, another exponentiates.
//
// Constants: NUM_CONSUMERS, PING_PONG.
#pragma once
#include "hopper/wgmma.cuh"

// Warpgroups take turns in issuing products: each waits for its own turn, and gives the turn to the next.
struct Turns {
    int consumer_idx;

    static constexpr bool ON = PING_PONG && NUM_CONSUMERS > 1;
    static constexpr int FIRST_BARRIER = 1;

    // The last one gives the first turn.
    __device__ __forceinline__ void start() const {
        if (ON && consumer_idx == NUM_CONSUMERS - 1) pass();
    }
    __device__ __forceinline__ void take() const {
        if (ON) named_barrier_sync(FIRST_BARRIER + consumer_idx, 2 * WARPGROUP_SIZE);
    }
    __device__ __forceinline__ void pass() const {
        if (ON) named_barrier_arrive(FIRST_BARRIER + (consumer_idx + 1) % NUM_CONSUMERS, 2 * WARPGROUP_SIZE);
    }
    // What the last one passed last.
    __device__ __forceinline__ void finish() const {
        if (ON && consumer_idx == 0) take();
    }
};
