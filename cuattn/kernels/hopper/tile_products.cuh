// The two products of a warpgroup over tiles in shared memory: scores = q k^T and output += probabilities v, issued and
// not waited for; and how probabilities come from the one to the other.
//
// Constants: Element; BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V. Tiles are columns of SPAN elements: see wgmma.cuh.
#pragma once
#include "attention/score_tile.cuh"
#include "hopper/transpose_e4m3.cuh"
#include "hopper/wgmma.cuh"

constexpr int SPAN = SPAN_BYTES / sizeof(Element);  // columns of a tile that lie side by side
constexpr int QK_SPANS = (HEAD_DIM + SPAN - 1) / SPAN;
constexpr int V_SPANS = (HEAD_DIM_V + SPAN - 1) / SPAN;
constexpr int MMA_K = WGMMA_K_BYTES / sizeof(Element);
constexpr int SPAN_STEPS = SPAN / MMA_K;

// Values of 8 bits are multiplied column by column.
constexpr bool TRANSPOSE_V = sizeof(Element) == 1;

using Layout = AccLayout<1, BLOCK_N>;
using Scores = Layout::Tile;
using OutputTile = float[1][HEAD_DIM_V / MMA_N][4];
using Probabilities = unsigned[BLOCK_N / MMA_K][4];

// Issues scores = q k^T of this warpgroup's rows.
__device__ __forceinline__ void issue_scores(Scores& scores, unsigned long long desc_q, unsigned long long desc_k) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / MMA_K; step++) {
        const int column = step % SPAN_STEPS * WGMMA_K_BYTES / 16, span = step / SPAN_STEPS;
        Wgmma<BLOCK_N>::template issue<false>(
            Element(), scores[0], desc_q + span * (BLOCK_M * SPAN_BYTES / 16) + column,
            desc_k + span * (BLOCK_N * SPAN_BYTES / 16) + column, step > 0);
    }
    wgmma_commit();
}

// Issues acc_out += probabilities v.
__device__ __forceinline__ void issue_output(OutputTile& acc_out, const Probabilities& probabilities,
                                             unsigned long long desc_v) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_N / MMA_K; step++) {
        const int offset = TRANSPOSE_V ? step / SPAN_STEPS * HEAD_DIM_V * SPAN_BYTES + step % SPAN_STEPS * WGMMA_K_BYTES
                                       : step * MMA_K * SPAN_BYTES;
        Wgmma<HEAD_DIM_V>::template issue<!TRANSPOSE_V>(Element(), acc_out[0], probabilities[step],
                                                        desc_v + offset / 16, 1);
    }
    wgmma_commit();
}

// Accumulators of MMA_K keys as an a fragment.
template <typename Rounded>
__device__ __forceinline__ void probability_fragment(Rounded, unsigned (&frag_a)[4], const float (*acc)[4]) {
    frag_a_from_acc<Rounded>(frag_a, acc[0], acc[1]);
}
__device__ __forceinline__ void probability_fragment(Float8E4M3, unsigned (&frag_a)[4], const float (*acc)[4]) {
    frag_a_from_acc(frag_a, acc);
}

__device__ __forceinline__ void round_probabilities(Probabilities& probabilities, const Scores& scores) {
#pragma unroll
    for (int step = 0; step < BLOCK_N / MMA_K; step++) {
        probability_fragment(Element(), probabilities[step], scores[0] + step * (MMA_K / MMA_N));
    }
}
