// Shared memory of a CTA of a forward kernel without tensor cores that has one stream of queries and keys. To be
// included after attention/lane_products.cuh.
//
// Constants used: Element, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, ONE_PLACE (k and v take turns), SMEM_BYTES;
// NUM_WARPS and WARP_M.
#pragma once
#include "common/tiles.cuh"

struct Smem {
    static constexpr int K_SIZE = BLOCK_N * TILE_STRIDE<HEAD_DIM>, V_SIZE = BLOCK_N * TILE_STRIDE<HEAD_DIM_V>;

    Element q[BLOCK_M][TILE_STRIDE<HEAD_DIM>];
    Element kv[ONE_PLACE ? (K_SIZE > V_SIZE ? K_SIZE : V_SIZE) : K_SIZE + V_SIZE];
    Element p[BLOCK_M][TILE_STRIDE<BLOCK_N>];  // each warp uses its own rows

    __device__ __forceinline__ Element* k() { return kv; }
    __device__ __forceinline__ Element* v() { return kv + (ONE_PLACE ? 0 : K_SIZE); }
};

static_assert(BLOCK_M == NUM_WARPS * WARP_M && WARP_M % 2 == 0, "every lane has whole rows");
static_assert(BLOCK_N % LANES_PER_ROW == 0, "every lane has whole columns");
static_assert(HEAD_DIM % DOT_BLOCK == 0, "head dims come in buckets");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");
