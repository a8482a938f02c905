// The state of linear attention, [HEAD_DIM x SLICE] sums in float, as accumulators of tensor cores that the warps of a
// CTA share; z, the sum of keys, rides as a further tile of columns, of which the first counts.
//
// A copy rounded to elements, in shared memory, is what queries are multiplied with. It has a row for each channel;
// behind the SLICE columns, where other tiles have padding, stands z in two parts: rounded, and what that leaves. A
// __half holds no more than 65504: a larger state is divided by a power of two.
//
// Constants used: Element, HEAD_DIM, SLICE, NUM_WARPS, NORMALIZE of the including kernel.
#pragma once
#include "attention/warp_products.cuh"
#include "common/elements.cuh"

constexpr int WARPS_D = HEAD_DIM / MMA_M < NUM_WARPS ? HEAD_DIM / MMA_M : NUM_WARPS;
constexpr int WARPS_E = NUM_WARPS / WARPS_D;
constexpr int STATE_TILES = HEAD_DIM / MMA_M / WARPS_D;  // tiles of rows of a warp
constexpr int STATE_COLS = SLICE / WARPS_E;              // columns of a warp
constexpr int STATE_STRIDE = TILE_STRIDE<SLICE>;

static_assert(STATE_TILES * WARPS_D * MMA_M == HEAD_DIM && WARPS_D * WARPS_E == NUM_WARPS, "every row has a warp");
static_assert(STATE_COLS % 16 == 0, "columns come in pairs of tiles");

template <typename T>
constexpr bool NARROW_RANGE = false;
template <>
constexpr bool NARROW_RANGE<__half> = true;

// The power of two that brings numbers up to `largest` below 2^15; 1 where they are.
__device__ __forceinline__ float half_range_factor(float largest) {
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    return exponent < 15 ? 1.0f : __uint_as_float(static_cast<unsigned>(127 - (exponent - 14)) << 23);
}

// The b fragment of a column of ones, beside seven of zeros.
__device__ __forceinline__ unsigned ones_fragment(int lane_idx) {
    return lane_idx / 4 == 0 ? pack_pair(Element(), 1.0f, 1.0f) : 0;
}

// Two elements times two factors.
__device__ __forceinline__ unsigned scaled_pair(unsigned pair, float low, float high) {
    const Element* elements = reinterpret_cast<const Element*>(&pair);
    return pack_pair(Element(), to_real(elements[0]) * low, to_real(elements[1]) * high);
}

struct StateTiles {
    AccTiles<STATE_TILES, STATE_COLS> s;
    float z[STATE_TILES][4];
    float kept[STATE_TILES][2];  // what is left of each row of the state that this one began with
    int first_row, first_col;    // of this warp

    __device__ __forceinline__ StateTiles(int warp_idx)
        : first_row(warp_idx % WARPS_D * STATE_TILES * MMA_M), first_col(warp_idx / WARPS_D * STATE_COLS) {
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) kept[t][0] = kept[t][1] = 1.0f;
    }

    // visit(row, column, pair of accumulators) for each two neighbours of this lane.
    template <typename Visit>
    __device__ __forceinline__ void for_pairs(int lane_idx, Visit visit) {
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first_row + t * MMA_M + half * 8 + frag_acc_row(lane_idx);
#pragma unroll
                for (int e = 0; e < STATE_COLS / MMA_N; e++) {
                    const int col = first_col + e * MMA_N + frag_acc_col(lane_idx);
                    visit(row, col, s[t][e][2 * half], s[t][e][2 * half + 1]);
                }
            }
        }
    }

    // visit(row, z of it) for each row of this warp, in the lanes that have column 0.
    template <typename Visit>
    __device__ __forceinline__ void for_sums(int lane_idx, Visit visit) {
        if (lane_idx % 4 != 0) return;
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                visit(first_row + t * MMA_M + half * 8 + frag_acc_row(lane_idx), z[t][2 * half]);
            }
        }
    }

    // From memory, [head_dim x head_dim_v] and [head_dim]; the CTA's columns are the num_cols from first_column on.
    __device__ __forceinline__ void load(const float* g_s, const float* g_z, int head_dim, int head_dim_v,
                                         int first_column, int num_cols, int lane_idx) {
        clear(s);
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) {
#pragma unroll
            for (float& x : z[t]) x = 0.0f;
        }
        if (g_s == nullptr) return;
        for_pairs(lane_idx, [&](int row, int col, float& left, float& right) {
            if (row >= head_dim) return;
            const float* g_pair = g_s + static_cast<long long>(row) * head_dim_v + first_column + col;
            if (col < num_cols) left = g_pair[0];
            if (col + 1 < num_cols) right = g_pair[1];
        });
        if (NORMALIZE) {
            for_sums(lane_idx, [&](int row, float& sum) {
                if (row < head_dim) sum = g_z[row];
            });
        }
    }

    __device__ __forceinline__ void store(float* g_s, float* g_z, int head_dim, int head_dim_v, int first_column,
                                          int num_cols, int lane_idx) {
        for_pairs(lane_idx, [&](int row, int col, float& left, float& right) {
            if (row >= head_dim) return;
            float* g_pair = g_s + static_cast<long long>(row) * head_dim_v + first_column + col;
            if (col < num_cols) g_pair[0] = left;
            if (col + 1 < num_cols) g_pair[1] = right;
        });
        if (NORMALIZE && first_column == 0 && first_col == 0) {
            for_sums(lane_idx, [&](int row, float& sum) {
                if (row < head_dim) g_z[row] = sum;
            });
        }
    }

    // Writes what is left of each row, [head_dim]; for the first slice of columns alone.
    __device__ __forceinline__ void store_kept(float* g_kept, int head_dim, int lane_idx) {
        if (first_col != 0 || lane_idx % 4 != 0) return;
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first_row + t * MMA_M + half * 8 + frag_acc_row(lane_idx);
                if (row < head_dim) g_kept[row] = kept[t][half];
            }
        }
    }

    // The largest magnitude of this warp's part, in every lane.
    __device__ __forceinline__ float largest(int lane_idx) {
        float found = 0.0f;
        for_pairs(lane_idx, [&](int, int, float& left, float& right) {
            found = fmaxf(found, fmaxf(fabsf(left), fabsf(right)));
        });
        if (NORMALIZE) for_sums(lane_idx, [&](int, float& sum) { found = fmaxf(found, fabsf(sum)); });
#pragma unroll
        for (int step = 1; step < 32; step *= 2) found = fmaxf(found, __shfl_xor_sync(0xffffffff, found, step));
        return found;
    }

    // Writes factor times this warp's part, rounded, to s_state [HEAD_DIM][STATE_STRIDE].
    __device__ __forceinline__ void publish(Element* s_state, float factor, int lane_idx) {
        for_pairs(lane_idx, [&](int row, int col, float& left, float& right) {
            store_pair(s_state + row * STATE_STRIDE + col, left * factor, right * factor);
        });
        if (!NORMALIZE || first_col != 0) return;
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first_row + t * MMA_M + half * 8 + frag_acc_row(lane_idx);
                Element rounded;
                const float sum = z[t][2 * half] * factor;
                from_real(sum, rounded);
                const float rest = sum - to_real(rounded);
                const bool counts = lane_idx % 4 == 0;
                store_pair(s_state + row * STATE_STRIDE + SLICE + frag_acc_col(lane_idx),
                           counts ? to_real(rounded) : 0.0f, counts ? rest : 0.0f);
            }
        }
    }

    // Multiplies the rows of this lane by its factors; 0 clears whatever is there.
    __device__ __forceinline__ void scale(const float (&factors)[STATE_TILES][2], bool clears) {
#pragma unroll
        for (int t = 0; t < STATE_TILES; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float factor = factors[t][i / 2];
                if (i % 2 == 0) kept[t][i / 2] *= factor;
                auto scaled = [&](float& x) { x = clears && factor == 0.0f ? 0.0f : x * factor; };
                scaled(z[t][i]);
#pragma unroll
                for (int e = 0; e < STATE_COLS / MMA_N; e++) scaled(s[t][e][i]);
            }
        }
    }

    // By factors of the rows, factor(row). A product is enough where none of the warp's is 0.
    template <typename Factor>
    __device__ __forceinline__ void scale_rows(int lane_idx, Factor factor) {
        float factors[STATE_TILES][2];
        bool some_clear = false;
#pragma unroll
        for (int i = 0; i < 2 * STATE_TILES; i++) {
            const float of_row = factor(first_row + i / 2 * MMA_M + i % 2 * 8 + frag_acc_row(lane_idx));
            factors[i / 2][i % 2] = of_row;
            some_clear = some_clear || of_row == 0.0f;
        }
        if (__any_sync(0xffffffff, some_clear)) {
            scale(factors, true);
        } else {
            scale(factors, false);
        }
    }

    // Adds k^T v of TOKENS tokens, k [TOKENS][HEAD_DIM] times a factor for each token where s_factors is given. Before
    // each 16 tokens, before(first token) is called.
    template <int TOKENS, typename Before>
    __device__ __forceinline__ void add(const Element* s_k, const Element* s_v, const float* s_factors, int lane_idx,
                                        Before before) {
        const unsigned k_address = smem_address(s_k) +
                                   (frag_a_trans_k(lane_idx) * TILE_STRIDE<HEAD_DIM> + first_row) * sizeof(Element) +
                                   frag_a_trans_bytes(lane_idx);
        const unsigned v_address = smem_address(s_v) + lane_offset_b<SLICE>(lane_idx) + first_col * sizeof(Element);
        const unsigned ones = ones_fragment(lane_idx);
#pragma unroll
        for (int n = 0; n < TOKENS; n += MMA_M) {
            before(n);
            unsigned keys[STATE_TILES][4];
#pragma unroll
            for (int t = 0; t < STATE_TILES; t++) {
                ldmatrix_x4_trans(keys[t], k_address + (n * TILE_STRIDE<HEAD_DIM> + t * MMA_M) * sizeof(Element));
                if (s_factors != nullptr) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* factors = s_factors + n + i / 2 * 8 + frag_acc_col(lane_idx);
                        keys[t][i] = scaled_pair(keys[t][i], factors[0], factors[1]);
                    }
                }
                if (NORMALIZE) mma(Element(), z[t], keys[t], ones, ones);
            }
#pragma unroll
            for (int e = 0; e < STATE_COLS; e += 2 * MMA_N) {
                unsigned values[4];
                ldmatrix_x4_trans(values, v_address + (n * TILE_STRIDE<SLICE> + e) * sizeof(Element));
#pragma unroll
                for (int t = 0; t < STATE_TILES; t++) {
                    mma(Element(), s[t][e / MMA_N], keys[t], values[0], values[1]);
                    mma(Element(), s[t][e / MMA_N + 1], keys[t], values[2], values[3]);
                }
            }
        }
    }
};
