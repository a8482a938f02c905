// A ring of buffers in shared memory that one warpgroup fills by bulk copies and others empty.
#pragma once
#include "hopper/ptx_sm90.cuh"

// The barriers of one ring: `full` completes when the bytes of a stage have landed, `empty` when every consumer has
// released the stage.
template <int NUM_STAGES>
struct RingBarriers {
    unsigned long long full[NUM_STAGES], empty[NUM_STAGES];

    // `num_consumers`: threads that release a stage, one of every warp that reads it. `num_producers`: threads that
    // arrive on `full`, beside what bytes they announce.
    __device__ __forceinline__ void init(int num_consumers, int num_producers = 1) const {
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            mbarrier_init(smem_address(&full[stage]), num_producers);
            mbarrier_init(smem_address(&empty[stage]), num_consumers);
        }
    }
};

// Where one side of a ring stands: the stage, and the parity of the phase that makes it full.
template <int NUM_STAGES>
struct RingPosition {
    int stage = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == NUM_STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    // Consumer: the stage holds its tile.
    __device__ __forceinline__ void wait_full(const RingBarriers<NUM_STAGES>& ring) const {
        mbarrier_wait(smem_address(&ring.full[stage]), parity);
    }
    __device__ __forceinline__ void release(const RingBarriers<NUM_STAGES>& ring) const {
        mbarrier_arrive(smem_address(&ring.empty[stage]));
    }
    // Producer: every consumer is done with the stage. The first time round nobody has used it.
    __device__ __forceinline__ void wait_empty(const RingBarriers<NUM_STAGES>& ring) const {
        mbarrier_wait(smem_address(&ring.empty[stage]), parity ^ 1);
    }
};
