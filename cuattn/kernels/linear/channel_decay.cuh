// The decay within a chunk of tokens, of one number for each channel of a key.
//
// The chunk is blocks of 16 tokens, and c_i the sum of decays from the start of token i's block up to it. Between a
// query i and a key j of an earlier block lie the rest of the key's block, the blocks between, and the query's block up
// to i:
//
//     sum of decays from j + 1 to i = (c_last - c_j) + (sums of the blocks between) + c_i
//
// The first part goes to the key (`kept`, once a chunk), the others to the query. Within a block, i and j part at one
// of four levels: they lie in different halves of the smallest group of 16, 8, 4 or 2 tokens that holds both. With b
// the last token of the first half, c_i - c_b goes to the query and c_b - c_j to the key. So every part is a sum of
// decays from one token to a later one: no factor grows, and all products are those of tensor cores. From a decay below
// -90, nothing is left in a float: it is taken for -90.
//
// Constants used: Element, HEAD_DIM, CHUNK, NUM_THREADS of the including kernel.
#pragma once
#include "linear/feature_map.cuh"
#include "linear/linear_state.cuh"

constexpr float STRONGEST_DECAY = -90.0f;  // 2^(-90 log2(e)) is flushed to zero
constexpr int BLOCK = MMA_M;               // tokens of a block: a tile of rows of a warp
constexpr int SUM_STRIDE = HEAD_DIM + ROW_PADDING<float>;

// Replaces decays [CHUNK][SUM_STRIDE] by the sums c, to base 2; channels that do not exist forget. By all threads.
__device__ __forceinline__ void sum_blocks(float* s_decay, int head_dim) {
    for (int unit = threadIdx.x; unit < HEAD_DIM * (CHUNK / BLOCK); unit += NUM_THREADS) {
        const int channel = unit % HEAD_DIM;
        float* s_column = s_decay + unit / HEAD_DIM * BLOCK * SUM_STRIDE + channel;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            const float decay = s_column[i * SUM_STRIDE];
            const bool forgets = channel >= head_dim || decay < STRONGEST_DECAY;
            sum += (forgets ? STRONGEST_DECAY : decay) * LOG2_OF_E;
            s_column[i * SUM_STRIDE] = sum;
        }
    }
}

// kept_j = k_j e^(c_last - c_j): what is left of a key at the end of its block. By all threads.
__device__ __forceinline__ void keep_keys(Element* s_kept, const Element* s_k, const float* s_sums) {
    for (int i = threadIdx.x; i < CHUNK * (HEAD_DIM / 4); i += NUM_THREADS) {
        const int row = i / (HEAD_DIM / 4);
        const int col = i % (HEAD_DIM / 4) * 4;
        const int last = row / BLOCK * BLOCK + BLOCK - 1;
        const float4 at_end = *reinterpret_cast<const float4*>(s_sums + last * SUM_STRIDE + col);
        const float4 own = *reinterpret_cast<const float4*>(s_sums + row * SUM_STRIDE + col);
        uint2 pairs = *reinterpret_cast<const uint2*>(s_k + row * TILE_STRIDE<HEAD_DIM> + col);
        pairs.x = scaled_pair(pairs.x, exp2_approx(at_end.x - own.x), exp2_approx(at_end.y - own.y));
        pairs.y = scaled_pair(pairs.y, exp2_approx(at_end.z - own.z), exp2_approx(at_end.w - own.w));
        *reinterpret_cast<uint2*>(s_kept + row * TILE_STRIDE<HEAD_DIM> + col) = pairs;
    }
}

// Sums of decays for the elements that a lane has of a fragment of 16 rows and 16 channels: [row half][channel].
struct FragmentSums {
    float x[2][4];  // channels 0 and 1 from the lane's first one, 8 and 9

    // s_upper, s_lower: the rows of the sums, from the lane's first channel on.
    __device__ __forceinline__ void load(const float* s_upper, const float* s_lower) {
#pragma unroll
        for (int group = 0; group < 2; group++) {
            const float2 upper = *reinterpret_cast<const float2*>(s_upper + group * 8);
            const float2 lower = *reinterpret_cast<const float2*>(s_lower + group * 8);
            x[0][2 * group] = upper.x;
            x[0][2 * group + 1] = upper.y;
            x[1][2 * group] = lower.x;
            x[1][2 * group + 1] = lower.y;
        }
    }

    // Adds one row to both.
    __device__ __forceinline__ void add(const float* s_row) {
#pragma unroll
        for (int group = 0; group < 2; group++) {
            const float2 sum = *reinterpret_cast<const float2*>(s_row + group * 8);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                x[half][2 * group] += sum.x;
                x[half][2 * group + 1] += sum.y;
            }
        }
    }

    // The largest of each row half and `largest`.
    __device__ __forceinline__ void raise(float (&largest)[2]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            largest[0] = fmaxf(largest[0], x[0][i]);
            largest[1] = fmaxf(largest[1], x[1][i]);
        }
    }

    // An a fragment times e^x: its registers are (upper, lower) rows of the first channels, then of the others.
    __device__ __forceinline__ void decay_a(unsigned (&to)[4], const unsigned (&frag)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[i] = scaled_pair(frag[i], exp2_approx(x[i % 2][i / 2 * 2]), exp2_approx(x[i % 2][i / 2 * 2 + 1]));
        }
    }
};

// Weights of one block with itself, [16 x 16], whose columns are keys of the same tokens as its rows.
struct DiagonalWeights {
    float acc[2][4];

    // Those that part at groups of 2 HALF tokens; HALF = 0: of each token with itself. s_q, s_k: fragment addresses;
    // s_sums: the first row of the block, from the lane's first channel on.
    template <int HALF>
    __device__ __forceinline__ void add_level(unsigned s_q, unsigned s_k, const float* s_sums, int lane_idx) {
        const int row = frag_acc_row(lane_idx);
        // Whether the upper and the lower of a lane's rows lie in the second half of their groups; where those part.
        const bool second[2] = {HALF != 8 && (row & HALF) != 0, HALF == 8 || (row & HALF) != 0};
        const int parting = HALF == 8 ? 7 : row / (2 * HALF + !HALF) * 2 * HALF + HALF - 1;
        const float* s_parting[2] = {s_sums + parting * SUM_STRIDE,
                                     s_sums + (HALF == 8 ? parting : parting + 8) * SUM_STRIDE};
        float level[2][4] = {};
#pragma unroll 1
        for (int d = 0; d < HEAD_DIM; d += MMA_M) {
            unsigned frag_q[4], frag_k[4];
            ldmatrix_x4(frag_q, s_q + d * sizeof(Element));
            ldmatrix_x4(frag_k, s_k + d * sizeof(Element));
            if (HALF > 0) {
                FragmentSums own, at_parting;
                own.load(s_sums + row * SUM_STRIDE + d, s_sums + (row + 8) * SUM_STRIDE + d);
                at_parting.load(s_parting[0] + d, s_parting[1] + d);
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int group = 0; group < 2; group++) {
                        float factors[2];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const float since = own.x[half][2 * group + i] - at_parting.x[half][2 * group + i];
                            factors[i] = exp2_approx(second[half] ? since : -since);
                        }
                        unsigned& query = frag_q[half + 2 * group];
                        unsigned& key = frag_k[2 * half + group];
                        const unsigned scaled = scaled_pair(second[half] ? query : key, factors[0], factors[1]);
                        query = second[half] ? scaled : 0;
                        key = second[half] ? 0 : scaled;
                    }
                }
            }
            mma(Element(), level[0], frag_q, frag_k[0], frag_k[1]);
            mma(Element(), level[1], frag_q, frag_k[2], frag_k[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = row + i / 2 * 8;
                const int key = n * MMA_N + frag_acc_col(lane_idx) + i % 2;
                const bool parts_here = HALF == 0 ? query == key
                                                  : query / (2 * HALF + !HALF) == key / (2 * HALF + !HALF) &&
                                                        (query & HALF) != 0 && (key & HALF) == 0;
                if (parts_here) acc[n][i] = level[n][i];
            }
        }
    }

    __device__ __forceinline__ void compute(unsigned s_q, unsigned s_k, const float* s_sums, int lane_idx) {
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i / 4][i % 4] = 0.0f;
        add_level<0>(s_q, s_k, s_sums, lane_idx);
        add_level<1>(s_q, s_k, s_sums, lane_idx);
        add_level<2>(s_q, s_k, s_sums, lane_idx);
        add_level<4>(s_q, s_k, s_sums, lane_idx);
        add_level<8>(s_q, s_k, s_sums, lane_idx);
    }
};
