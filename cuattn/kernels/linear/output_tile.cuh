// What a warp computes of one output head within a chunk: 16 rows of the weights, and of the outputs.
//
// Constants used: Element, HEAD_DIM, SLICE, CHUNK, NUM_WARPS, DECAY, NORMALIZE of the including kernel.
#pragma once
#include "hopper/quad_store.cuh"
#include "linear/channel_decay.cuh"
#include "linear/chunk_decay.cuh"
#include "linear/linear_state.cuh"
#include "linear/linear_work.cuh"

constexpr int WARPS_M = CHUNK / MMA_M < NUM_WARPS ? CHUNK / MMA_M : NUM_WARPS;
constexpr int OUT_COLS = SLICE / (NUM_WARPS / WARPS_M);
constexpr int OUT_TILES = OUT_COLS / MMA_N;
constexpr int STORED_TILES = (OUT_TILES + 3) / 4 * 4;  // quad_store.cuh takes four at a time
constexpr int CHUNK_TILES = CHUNK / MMA_N;

static_assert(WARPS_M * MMA_M == CHUNK, "a warp has one tile of rows of a chunk");
static_assert(OUT_COLS % 16 == 0 && CHUNK % 32 == 0, "products are in pairs of tiles");

// What a warp computes of one output head: its 16 rows.
struct OutputTile {
    AccTiles<1, CHUNK> weights;
    AccTiles<1, OUT_COLS> out;
    float below[1][1][4];  // the denominators, in the columns 0 and 1

    // q S and q K^T. s_q, s_k, s_state: fragment addresses of this lane; s_z that of the columns of z.
    __device__ __forceinline__ void multiply(unsigned s_q, unsigned s_k, unsigned s_state, unsigned s_z,
                                             bool has_keys, int last_row) {
        clear(weights);
        clear(out);
        clear(below);
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += MMA_M) {
            unsigned frag_q[4];
            ldmatrix_x4(frag_q, s_q + d * sizeof(Element));
            if (has_keys) {
#pragma unroll
                for (int n = 0; n < CHUNK_TILES; n += 2) {
                    if (n * MMA_N > last_row) continue;
                    unsigned frag_k[4];
                    ldmatrix_x4(frag_k, s_k + (n * MMA_N * TILE_STRIDE<HEAD_DIM> + d) * sizeof(Element));
                    mma(Element(), weights[0][n], frag_q, frag_k[0], frag_k[1]);
                    mma(Element(), weights[0][n + 1], frag_q, frag_k[2], frag_k[3]);
                }
            }
            add_state(frag_q, s_state + d * STATE_STRIDE * sizeof(Element), s_z + d * STATE_STRIDE * sizeof(Element));
        }
    }

    // The same with a decay of each channel, which is in the weights then, and in what comes from the state. s_k: of
    // the keys of this warp's own tokens; s_kept: of all, as they are at the end of their blocks. s_sums: of the
    // decays, from this lane's first channel on.
    __device__ __forceinline__ void multiply_channels(unsigned s_q, unsigned s_k, unsigned s_kept, unsigned s_state,
                                                      unsigned s_z, const float* s_sums, int first_row, int lane_idx) {
        clear(weights);
        clear(out);
        clear(below);
        DiagonalWeights diagonal;
        diagonal.compute(s_q, s_k, s_sums + first_row * SUM_STRIDE, lane_idx);
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (n / 2 * BLOCK == first_row) weights[0][n][i] = diagonal.acc[n % 2][i];
            }
        }
        float largest[2] = {2 * STRONGEST_DECAY, 2 * STRONGEST_DECAY};
        const float* s_upper = s_sums + (first_row + frag_acc_row(lane_idx)) * SUM_STRIDE;
#pragma unroll 1
        for (int d = 0; d < HEAD_DIM; d += MMA_M) {
            unsigned frag_q[4], decayed[4];
            ldmatrix_x4(frag_q, s_q + d * sizeof(Element));
            FragmentSums sums;
            sums.load(s_upper + d, s_upper + 8 * SUM_STRIDE + d);
            // Back through the blocks: each one more that lies between.
#pragma unroll
            for (int first_key = CHUNK - 2 * BLOCK; first_key >= 0; first_key -= BLOCK) {
                if (first_key >= first_row) continue;
                sums.decay_a(decayed, frag_q);
                unsigned frag_k[4];
                ldmatrix_x4(frag_k, s_kept + (first_key * TILE_STRIDE<HEAD_DIM> + d) * sizeof(Element));
                mma(Element(), weights[0][first_key / MMA_N], decayed, frag_k[0], frag_k[1]);
                mma(Element(), weights[0][first_key / MMA_N + 1], decayed, frag_k[2], frag_k[3]);
                sums.add(s_sums + (first_key + BLOCK - 1) * SUM_STRIDE + d);
            }
            sums.raise(largest);
            sums.decay_a(decayed, frag_q);
            add_state(decayed, s_state + d * STATE_STRIDE * sizeof(Element), s_z + d * STATE_STRIDE * sizeof(Element));
        }
        // A query behind a reset of all channels reads nothing, whatever the state holds: 0 times infinity is NaN.
        scale_rows(exp2_approx(quad_max(largest[0])) == 0.0f ? 0.0f : 1.0f,
                   exp2_approx(quad_max(largest[1])) == 0.0f ? 0.0f : 1.0f);
    }

    // Adds the product of 16 channels of q with the state's rows of them.
    __device__ __forceinline__ void add_state(const unsigned (&frag_q)[4], unsigned s_state, unsigned s_z) {
#pragma unroll
        for (int e = 0; e < OUT_TILES; e += 2) {
            unsigned frag_s[4];
            ldmatrix_x4_trans(frag_s, s_state + e * MMA_N * sizeof(Element));
            mma(Element(), out[0][e], frag_q, frag_s[0], frag_s[1]);
            mma(Element(), out[0][e + 1], frag_q, frag_s[2], frag_s[3]);
        }
        if (NORMALIZE) {
            unsigned frag_z[4];
            ldmatrix_x4_trans(frag_z, s_z);
            mma(Element(), below[0][0], frag_q, frag_z[0], frag_z[1]);
        }
    }

    // Multiplies what came from the state, of the two rows of this lane.
    __device__ __forceinline__ void scale_rows(float upper, float lower) {
        auto scale = [&](float (&acc)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float factor = i < 2 ? upper : lower;
                acc[i] = factor == 0.0f ? 0.0f : acc[i] * factor;
            }
        };
#pragma unroll
        for (int e = 0; e < OUT_TILES; e++) scale(out[0][e]);
        if (NORMALIZE) scale(below[0][0]);
    }

    // Hides later keys, and lets weights decay.
    __device__ __forceinline__ void decay_weights(const ChunkDecay<CHUNK>& decay, int first_row, int lane_idx) {
        TokenDecay rows[2];
        if (DECAY == 1) {
            rows[0].load(decay, first_row + frag_acc_row(lane_idx));
            rows[1].load(decay, first_row + frag_acc_row(lane_idx) + 8);
        }
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n++) {
            if (n * MMA_N > first_row + MMA_M - 1) continue;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int column = n * MMA_N + frag_acc_col(lane_idx) + j;
                TokenDecay key;
                if (DECAY == 1) key.load(decay, column);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& weight = weights[0][n][2 * half + j];
                    const bool seen = column <= first_row + half * 8 + frag_acc_row(lane_idx);
                    const float factor = DECAY == 1 ? rows[half].since(key) : 1.0f;
                    weight = seen && factor != 0.0f ? weight * factor : 0.0f;
                }
            }
        }
    }

    // Factors that bring the weights of this lane's two rows into the range of a __half.
    __device__ __forceinline__ void weight_range(float& upper, float& lower) const {
        float largest[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) largest[i / 2] = fmaxf(largest[i / 2], fabsf(weights[0][n][i]));
        }
        upper = half_range_factor(quad_max(largest[0]));
        lower = half_range_factor(quad_max(largest[1]));
    }

    // Adds the weights times v, and their sums. s_v: fragment address of this lane.
    __device__ __forceinline__ void add_values(unsigned s_v, float upper, float lower, int last_row, int lane_idx) {
        const unsigned ones = ones_fragment(lane_idx);
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n += 2) {
            if (n * MMA_N > last_row) continue;
            if (NARROW_RANGE<Element>) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    weights[0][n][i] *= i < 2 ? upper : lower;
                    weights[0][n + 1][i] *= i < 2 ? upper : lower;
                }
            }
            unsigned frag[4];
            frag_a_from_acc<Element>(frag, weights[0][n], weights[0][n + 1]);
#pragma unroll
            for (int e = 0; e < OUT_TILES; e += 2) {
                unsigned frag_v[4];
                ldmatrix_x4_trans(frag_v, s_v + (n * TILE_STRIDE<SLICE> + e) * MMA_N * sizeof(Element));
                mma(Element(), out[0][e], frag, frag_v[0], frag_v[1]);
                mma(Element(), out[0][e + 1], frag, frag_v[2], frag_v[3]);
            }
            if (NORMALIZE) mma(Element(), below[0][0], frag, ones, ones);
        }
    }

    // Writes this warp's rows; g_rows at its first row and column.
    __device__ __forceinline__ void store(Element* g_rows, const LinearParams<float>& params, float upper, float lower,
                                          int num_rows, int num_cols, int lane_idx) {
        const unsigned long long places =
            reinterpret_cast<unsigned long long>(g_rows) | params.out.seq * sizeof(Element);
        const bool vectors = num_cols % 8 == 0 && places % 16 == 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = half * 8 + frag_acc_row(lane_idx);
            const float range = half == 0 ? upper : lower;
            float factor = params.scale / range;
            if (NORMALIZE) {
                const float sums = (below[0][0][2 * half] + below[0][0][2 * half + 1]) / range;
                const float denominator =
                    fmaf(params.scale, __shfl_sync(0xffffffff, sums, lane_idx & ~3), params.eps);
                factor = denominator == 0.0f ? 0.0f : params.scale / denominator / range;
            }
            unsigned pairs[STORED_TILES];
#pragma unroll
            for (int e = 0; e < STORED_TILES; e++) {
                pairs[e] = 0;
                if (e < OUT_TILES && factor != 0.0f) {
                    pairs[e] = pack_pair(Element(), out[0][e][2 * half] * factor, out[0][e][2 * half + 1] * factor);
                }
            }
            store_quad_row(g_rows + row * params.out.seq, pairs, num_cols, vectors, row < num_rows, lane_idx);
        }
    }
};
