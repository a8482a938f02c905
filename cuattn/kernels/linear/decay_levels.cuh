// Decay within a chunk of BLOCK tokens, as products of two numbers e^(sum of decays): no difference of sums is ever
// taken, so that a decay of -inf, or of any size, harms nothing beside it.
//
// What key j gives to query i > j decays by the sum of the decays of tokens j + 1 .. i. Let `level` be the highest bit
// in which i and j differ, and m the multiple of 2^level between them, j < m <= i: the upper half of a block of
// 2^(level + 1) tokens begins there, i is in that half and j in the lower one. Then
//
//     e^(sum of j + 1 .. i) = e^(sum of m .. i)  e^(sum of j + 1 .. m - 1) = upper(i) lower(j)
//
// and neither factor knows of the other's token: every level is a product of matrices whose rows are scaled.
//
// Constants used: those of block_products.cuh.
#pragma once
#include "linear/block_products.cuh"

constexpr int LEVELS = BLOCK == 64 ? 6 : 5;
static_assert(1 << LEVELS == BLOCK, "the halves of halves of a chunk end at single tokens");

// The level of two different tokens of a chunk.
__device__ __forceinline__ int level_of(int i, int j) { return 31 - __clz(i ^ j); }

// Whether query i and key j meet at a level.
__device__ __forceinline__ bool at_level(int i, int j, int level) { return i > j && (i ^ j) >> level == 1; }

// Where the rows of this warp, queries or keys, have what they meet at a level (-1: themselves): tokens in steps of 16.
template <bool ROWS_ARE_KEYS>
__device__ __forceinline__ Window window_of(int level) {
    const int first = warp_row() / 16 * 16;
    if (level < 4) return {first, first + 16};
    const bool upper = first >> level & 1;
    if (upper == ROWS_ARE_KEYS) return {0, 0};
    const int begin = (first >> level ^ 1) << level;
    return {begin, begin + (1 << level)};
}
// The same for all levels: what is not later, or not earlier, than they.
template <bool ROWS_ARE_KEYS>
__device__ __forceinline__ Window causal_window() {
    const int first = warp_row() / 16 * 16;
    return {ROWS_ARE_KEYS ? first : 0, ROWS_ARE_KEYS ? BLOCK : first + 16};
}

// A decay that a state has for all its channels, at the tokens of a chunk; those that do not exist decay nothing.
struct alignas(16) SharedDecay {
    Real upper[LEVELS][BLOCK], lower[LEVELS][BLOCK];
    Real before[BLOCK];  // e^(sum of all up to i): what the state before the chunk decays by on its way to query i
    Real after[BLOCK];   // e^(sum of all behind j): what key j gives to the state behind the chunk decays by
    Real whole;          // e^(sum of all)
    Real totals[2];      // of the tokens of a warp

    // For the whole CTA, which finds it complete behind its next barrier. Null: there is no decay.
    __device__ __forceinline__ void load(const Real* g_decay, long long stride, int num_tokens) {
        const int i = threadIdx.x, lane = lane_index();
        const bool decays = g_decay != nullptr;
        // Sums from the beginning of a token's block of 2^level tokens to itself, and from behind it to the end: blocks
        // of twice the size add the total of the other half, which the last token of that half has.
        Real down = decays && i < num_tokens && i < BLOCK ? g_decay[i * stride] : Real(0), up = 0;
#pragma unroll
        for (int level = 0; level < LEVELS; level++) {
            const int half = 1 << level;
            const bool in_upper = i & half;
            Real other;
            if (half < WARP_SIZE) {
                const int last = lane | (half - 1);
                other = __shfl_sync(0xffffffff, down, in_upper ? last - half : last + half);
            } else {
                if (lane == WARP_SIZE - 1 && i < BLOCK) totals[i / WARP_SIZE] = down;
                // SYNC: the totals of both warps are there.
                __syncthreads();
                other = totals[1 - i / WARP_SIZE % 2];
            }
            if (i < BLOCK) (in_upper ? upper : lower)[level][i] = decays ? exp(in_upper ? down : up) : Real(1);
            (in_upper ? down : up) += other;
        }
        if (i < BLOCK) {
            before[i] = decays ? exp(down) : Real(1);
            after[i] = decays ? exp(up) : Real(1);
        }
        if (i == BLOCK - 1) whole = before[i];
    }

    // What key j <= i decays by on its way to query i.
    __device__ __forceinline__ Real between(int i, int j) const {
        if (i == j) return 1;
        const int level = level_of(i, j);
        return upper[level][i] * lower[level][j];
    }

    // Multiplies all elements with what key j decays by on its way to query i; 0 where j > i. Rows of the block are
    // queries, or keys.
    template <bool ROWS_ARE_KEYS>
    __device__ __forceinline__ void apply(Block& block) const {
        if constexpr (TENSOR) {
            // Two tiles of 8 tokens that are not the same have one level.
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int row = Block::row(r), row_tile = warp_row() / MMA_N + r;
#pragma unroll
                for (int n = 0; n < BLOCK / MMA_N; n++) {
                    Real &left = block.at(r, 2 * n), &right = block.at(r, 2 * n + 1);
                    const int column = Block::column(2 * n);
                    if (n == row_tile) {
                        left = factor_of<ROWS_ARE_KEYS>(row, column) * left;
                        right = factor_of<ROWS_ARE_KEYS>(row, column + 1) * right;
                    } else if (ROWS_ARE_KEYS ? n > row_tile : n < row_tile) {
                        const int level = 3 + level_of(n, row_tile);
                        const Real of_row = ROWS_ARE_KEYS ? lower[level][row] : upper[level][row];
                        const Real* of_columns = (ROWS_ARE_KEYS ? upper[level] : lower[level]) + column;
                        left *= of_row * of_columns[0];
                        right *= of_row * of_columns[1];
                    } else {
                        left = right = 0;
                    }
                }
            }
        } else {
            block.each([&](int r, int c, Real& x) { x *= factor_of<ROWS_ARE_KEYS>(Block::row(r), Block::column(c)); });
        }
    }

private:
    template <bool ROWS_ARE_KEYS>
    __device__ __forceinline__ Real factor_of(int row, int column) const {
        const int i = ROWS_ARE_KEYS ? column : row, j = ROWS_ARE_KEYS ? row : column;
        return j > i ? Real(0) : between(i, j);
    }
};

// A decay for each channel: a thread walks down or up a column.
struct ChannelDecay {
    const Real* g_column;  // of this thread's channel, from the first token of the chunk on; null: does not exist
    long long stride;
    int num_tokens;

    static __device__ __forceinline__ int column() { return threadIdx.x % BLOCK; }
    static __device__ __forceinline__ int part() { return threadIdx.x / BLOCK; }
    static constexpr int PARTS = NUM_THREADS / BLOCK;

    __device__ __forceinline__ Real log(int i) const {
        return g_column != nullptr && i < num_tokens ? g_column[i * stride] : Real(0);
    }
    // f(i, e^(sum of begin .. i)) for the tokens from begin on.
    template <typename F>
    __device__ __forceinline__ void upwards(int begin, int end, F f) const {
        Real sum = 0;
#pragma unroll 4
        for (int i = begin; i < end; i++) {
            sum += log(i);
            f(i, exp(sum));
        }
    }
    // f(j, e^(sum of j + 1 .. end - 1)) for the tokens before end, the last first.
    template <typename F>
    __device__ __forceinline__ void downwards(int begin, int end, F f) const {
        Real sum = 0;
#pragma unroll 4
        for (int j = end - 1; j >= begin; j--) {
            f(j, exp(sum));
            sum += log(j);
        }
    }
    // For the whole CTA: upper(i, factor) and lower(j, factor) for all tokens of this thread's channel, at a level.
    template <typename Upper, typename Lower>
    __device__ __forceinline__ void at(int level, Upper upper, Lower lower) const {
        const int half = 1 << level;
#pragma unroll 1
        for (int task = part(); task < BLOCK / half; task += PARTS) {
            if (task % 2) {
                upwards(task * half, (task + 1) * half, upper);
            } else {
                downwards(task * half, (task + 1) * half, lower);
            }
        }
    }
};
