// How the lanes of a warp share the work of attention without tensor cores where rows are few: LANES neighbouring lanes
// hold one key and its value between them, so that a warp works on GROUPS keys at a time, and every group on KEYS of
// them in a step. A lane has the same columns of every key, of the query rows and of the output.
//
// A lane's part of the dot products of a step is PAIRS numbers, pair r * KEYS + u for row r and key u of the group. The
// sums over the group leave OWN pairs of one row with each lane, or COPIES lanes with the same pair: what happens to a
// logit on its way to a probability then happens once, not once for each lane of the group.
//
// Constants used: HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, ALIGNED, ROTATE, INTERLEAVED.
#pragma once
#include "kv/kv_pairs.cuh"
#include "rotary/rope.cuh"

constexpr int WARP_SIZE = 32;
constexpr int ROWS = BLOCK_M / WARPS_M;  // query rows of a warp

// The fewest lanes that leave a lane no more of a row than its registers hold: with q and the output of all rows, 8 or
// 16 of them for each. A lane has at least two columns, a pair that RoPE turns.
template <typename Real>
constexpr int lanes_per_key() {
    constexpr int WIDTH = HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V;
    constexpr int NARROW = HEAD_DIM < HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V;
    const int most_columns = (ROWS >= 8 ? 8 : 16) * 4 / static_cast<int>(sizeof(Real));
    int lanes = ROWS;
    while (lanes < WARP_SIZE && 2 * lanes <= NARROW / 2 && lanes * most_columns < WIDTH) lanes *= 2;
    return lanes;
}

constexpr int LANES = lanes_per_key<Accumulator>();
constexpr int GROUPS = WARP_SIZE / LANES;
constexpr int KEYS = BLOCK_N / (WARPS_N * GROUPS);
constexpr int WARP_KEYS = GROUPS * KEYS;  // of a step
constexpr int PAIRS = ROWS * KEYS;
constexpr int OWN = PAIRS > LANES ? PAIRS / LANES : 1;
constexpr int COPIES = PAIRS > LANES ? 1 : LANES / PAIRS;
constexpr int LANES_PER_ROW = LANES / ROWS;  // lanes of a group that own pairs of one row

static_assert(BLOCK_M == ROWS * WARPS_M && BLOCK_N == WARPS_N * WARP_KEYS, "whole rows, whole keys");
static_assert((PAIRS & (PAIRS - 1)) == 0 && KEYS > 0 && ROWS <= LANES, "a lane owns pairs of one row");

// --- which columns ---------------------------------------------------------------------------------------------------

// The largest power of two that divides x, up to `limit`.
constexpr int run_length(int x, int limit) { return x % 2 || limit < 2 ? 1 : 2 * run_length(x / 2, limit / 2); }

// A lane's columns of rows of WIDTH numbers, stored as Storage: CHUNKS runs of CHUNK neighbours. A run is read in one
// access if rows are ALIGNED: then they hold whole runs. Otherwise a run is one number, or a pair that RoPE turns.
//
// With PAIRED, columns i and i + num_pairs are in the same lane, in runs 2c and 2c + 1: num_pairs is then a multiple of
// CHUNK. What follows behind the pairs is dealt out run by run.
template <typename Storage, int WIDTH, bool PAIRED>
struct LaneColumns {
    static constexpr int PER_LANE = WIDTH / LANES;
    static constexpr int VECTOR = 16 / sizeof(Storage) * KvFormat<Storage>::PER_ITEM;
    static constexpr int CHUNK =
        ALIGNED ? run_length(PAIRED ? PER_LANE / 2 : PER_LANE, VECTOR) : ROTATE && INTERLEAVED ? 2 : 1;
    static constexpr int CHUNKS = PER_LANE / CHUNK;
    // Stored items of a run. A run of one e2m1 number is half of one.
    static constexpr int ITEMS = (CHUNK + KvFormat<Storage>::PER_ITEM - 1) / KvFormat<Storage>::PER_ITEM;

    int lane, num_pairs, num_cols;

    // First column of run c.
    __device__ __forceinline__ int at(int c) const {
        if (!PAIRED) return (lane + c * LANES) * CHUNK;
        const int pair_run = lane + c / 2 * LANES, behind = pair_run - num_pairs / CHUNK;
        if (behind < 0) return pair_run * CHUNK + c % 2 * num_pairs;
        return 2 * num_pairs + (2 * behind + c % 2) * CHUNK;
    }
    __device__ __forceinline__ bool exists(int c) const { return at(c) < num_cols; }
};

// --- stored numbers --------------------------------------------------------------------------------------------------

// A lane's part of a stored row: zeros where there is no such row or column.
template <typename Columns, typename Storage>
struct StoredRow {
    static constexpr int BLOCK = KvFormat<Storage>::BLOCK;
    using Items = Run<Storage, Columns::ITEMS>;

    Items runs[Columns::CHUNKS];
    unsigned char scales[BLOCK == 0 ? 1 : Columns::CHUNKS];

    // g_row, g_blocks: the row and its block scales; exists: whether they may be read.
    __device__ __forceinline__ void load(const Columns& columns, const Storage* g_row, const unsigned char* g_blocks,
                                         bool exists) {
#pragma unroll
        for (int c = 0; c < Columns::CHUNKS; c++) {
            runs[c].clear();
            if constexpr (BLOCK != 0) scales[c] = 0;
            if (exists && columns.exists(c)) {
                const int col = columns.at(c);
                const Storage* g_run = g_row + col / KvFormat<Storage>::PER_ITEM;
                if constexpr (ALIGNED) {
                    runs[c].load(g_run);
                } else {
#pragma unroll
                    for (int i = 0; i < Columns::ITEMS; i++) {
                        if (i == 0 || col + i * KvFormat<Storage>::PER_ITEM < columns.num_cols) {
                            runs[c].element[i] = g_run[i];
                        }
                    }
                }
                if constexpr (BLOCK != 0) scales[c] = g_blocks[col / BLOCK];
            }
        }
    }

    // As numbers, times their block scales.
    template <typename Real>
    __device__ __forceinline__ void widen_to(Real (&x)[Columns::PER_LANE], const Columns& columns) const {
#pragma unroll
        for (int c = 0; c < Columns::CHUNKS; c++) {
            Real numbers[Columns::ITEMS * KvFormat<Storage>::PER_ITEM];
            if constexpr (sizeof(Storage) == 1 && Columns::CHUNK % 8 == 0) {
#pragma unroll
                for (int n = 0; n < Columns::CHUNK; n += 8) widen_eight(numbers + n, runs[c], n);
            } else {
                widen(numbers, runs[c].element);
            }
            if constexpr (Columns::CHUNK < KvFormat<Storage>::PER_ITEM) {
                if (columns.at(c) % 2 != 0) numbers[0] = numbers[1];
            }
#pragma unroll
            for (int i = 0; i < Columns::CHUNK; i++) {
                x[c * Columns::CHUNK + i] = numbers[i];
                if constexpr (BLOCK != 0) x[c * Columns::CHUNK + i] *= block_scale(Storage(), scales[c]);
            }
        }
    }

   private:
    // Numbers first .. first + 7 of a run, by way of __half, which holds all numbers of 8 and 4 bits.
    static __device__ __forceinline__ void widen_eight(float* x, const Items& run, int first) {
        constexpr int WORDS = STORED_WORDS<Storage>;
        unsigned words[WORDS], pairs[4];
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            words[w] = reinterpret_cast<const unsigned*>(run.element)[first / 8 * WORDS + w];
        }
        widen_pairs(__half(), Storage(), pairs, words);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
};

// Turns the pairs of a lane's part of a row.
template <typename Columns, typename Real, typename Rotations>
__device__ __forceinline__ void rotate_row(Real (&x)[Columns::PER_LANE], const Columns& columns,
                                           const Rotations& rotations, long long position) {
    constexpr int CHUNK = Columns::CHUNK;
    if constexpr (INTERLEAVED) {
#pragma unroll
        for (int c = 0; c < Columns::CHUNKS; c++) {
            const int first_pair = columns.at(c) / 2;
            if (first_pair >= columns.num_pairs) continue;
            Rotation<Real> turns[CHUNK / 2];
            rotations.at(turns, position, first_pair);
#pragma unroll
            for (int i = 0; i < CHUNK / 2; i++) turns[i].turn(x[c * CHUNK + 2 * i], x[c * CHUNK + 2 * i + 1]);
        }
    } else {
#pragma unroll
        for (int c = 0; c < Columns::CHUNKS; c += 2) {
            const int first_pair = (columns.lane + c / 2 * LANES) * CHUNK;
            if (first_pair >= columns.num_pairs) continue;
            Rotation<Real> turns[CHUNK];
            rotations.at(turns, position, first_pair);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) turns[i].turn(x[c * CHUNK + i], x[(c + 1) * CHUNK + i]);
        }
    }
}

// --- between the lanes of a group ------------------------------------------------------------------------------------

// The sums over the group, in x[0] .. x[OWN - 1] those of this lane's own pairs. Half of what a lane holds goes to the
// other half of the lanes at every step, as long as it holds more than one number.
template <int COUNT = PAIRS, int LANE_MASK = LANES / 2, typename Real>
__device__ __forceinline__ void sum_over_group(Real (&x)[PAIRS], int lane) {
    if constexpr (LANE_MASK > 0 && COUNT > 1) {
        const bool upper = lane & LANE_MASK;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            const Real kept = upper ? x[i + COUNT / 2] : x[i];
            const Real given = upper ? x[i] : x[i + COUNT / 2];
            x[i] = kept + __shfl_xor_sync(0xffffffff, given, LANE_MASK);
        }
        sum_over_group<COUNT / 2, LANE_MASK / 2>(x, lane);
    } else if constexpr (LANE_MASK > 0) {
        x[0] += __shfl_xor_sync(0xffffffff, x[0], LANE_MASK);
        sum_over_group<1, LANE_MASK / 2>(x, lane);
    }
}

// A lane's own pairs: of one row, keys first_key, first_key + 1, ... of the group.
struct OwnPairs {
    int row, first_key;

    __device__ __forceinline__ explicit OwnPairs(int lane) {
        const int pair = lane / COPIES * OWN;
        row = pair / KEYS;
        first_key = pair % KEYS;
    }
};

// The dot products of a lane's own pairs as its part of a tile of logits (attention/logits.cuh).
template <typename Real, bool APPROXIMATE_>
struct OwnLayout {
    using Tile = Real[PAIRS];
    static constexpr int ROWS = 1, COLUMNS = OWN;
    static constexpr bool APPROXIMATE = APPROXIMATE_;
    static __device__ __forceinline__ int row(int) { return 0; }
    static __device__ __forceinline__ int column(int c) { return c * GROUPS; }
    static __device__ __forceinline__ Real& at(Tile& own, int, int c) { return own[c]; }
};

// The number that lane LANE_OF_PAIR has for pair `pair` of the group.
template <typename Real>
__device__ __forceinline__ Real from_owner(const Real (&own)[PAIRS], int pair) {
    return __shfl_sync(0xffffffff, own[pair % OWN], pair / OWN * COPIES, LANES);
}

// What the lanes that own row `row` have; they all have the same.
template <typename Real>
__device__ __forceinline__ Real from_row_owner(Real own, int row) {
    return __shfl_sync(0xffffffff, own, row * LANES_PER_ROW, LANES);
}

// Over the lanes of a group that own different pairs of the same row.
template <typename Real>
__device__ __forceinline__ Real row_max(Real x) {
#pragma unroll
    for (int lane_mask = COPIES; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
        x = fmax(x, __shfl_xor_sync(0xffffffff, x, lane_mask));
    }
    return x;
}
template <typename Real>
__device__ __forceinline__ Real row_sum(Real x) {
#pragma unroll
    for (int lane_mask = COPIES; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
        x += __shfl_xor_sync(0xffffffff, x, lane_mask);
    }
    return x;
}
