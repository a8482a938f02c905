// Rows through a feature map: MAP_LANES threads a row.
//
// Constants used: Element, Real, NUM_THREADS.
#pragma once
#include "linear/backward_blocks.cuh"

constexpr int MAP_LANES = 16;
constexpr int MAP_ROWS = NUM_THREADS / MAP_LANES;

__device__ __forceinline__ void map_rows(const Element* g_x, Element* g_mapped, const RowStrides& x, long long num_rows,
                                         int seqlen, int num_heads, int head_dim, bool vectors, int feature_map) {
    constexpr int VECTOR = 16 / sizeof(Element);
    const long long row = static_cast<long long>(blockIdx.x) * MAP_ROWS + threadIdx.x / MAP_LANES;
    if (row >= num_rows) return;
    // Few problems have more rows than 32 bits count: the others are spared a division of 64 bits.
    const bool few = num_rows >> 32 == 0;
    const long long token = few ? static_cast<unsigned>(row) / static_cast<unsigned>(num_heads) : row / num_heads;
    const int head = static_cast<int>(row - token * num_heads);
    const long long entry = few ? static_cast<unsigned>(token) / static_cast<unsigned>(seqlen) : token / seqlen;
    const Element* g_from = g_x + entry * x.batch + (token - entry * seqlen) * x.seq + head * x.head;
    Element* g_to = g_mapped + row * head_dim;
    with_feature_map<Real>(feature_map, [&](auto map) {
        if (vectors) {
            for (int i = threadIdx.x % MAP_LANES * VECTOR; i < head_dim; i += MAP_LANES * VECTOR) {
                Run<Element, VECTOR> run;
                run.load(g_from + i);
#pragma unroll
                for (int e = 0; e < VECTOR; e++) run.set(e, map(run.get(e)));
                run.store(g_to + i);
            }
        } else {
            for (int i = threadIdx.x % MAP_LANES; i < head_dim; i += MAP_LANES) {
                from_real(map(to_real(g_from[i])), g_to[i]);
            }
        }
    });
}
