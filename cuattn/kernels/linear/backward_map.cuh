// Rows through a feature map: MAP_LANES threads a row. Grid: x = rows / MAP_ROWS, rounded up.
//
// Constants used: Element, Real, NUM_THREADS.
#pragma once
#include "linear/backward_blocks.cuh"

constexpr int MAP_LANES = 16;
constexpr int MAP_ROWS = NUM_THREADS / MAP_LANES;

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_map(
    const Element* __restrict__ g_x,  // [batch, seqlen, num_heads, head_dim], last axis contiguous
    Element* __restrict__ g_mapped,   // the same, contiguous
    const RowStrides x,
    const long long num_rows,  // of a token and a head
    const int seqlen,
    const int num_heads,
    const int head_dim,
    const int vectors,  // whether all rows, of both, lie at multiples of 16 bytes
    const int feature_map)
{
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
