// What dq and dk have in common: shared memory, and the products of a chunk's terms T with keys, or queries, that decay
// channel by channel (decay_levels.cuh), with what the decays get of them.
//
// A row is a query, or a key (ROWS_ARE_KEYS). Of what a row gets at a level, times the row itself, the decay of token t
// gets the sum over those rows that lie in the same half of a block of the level, from t on for queries and before t
// for keys.
#pragma once
#include "linear/backward_blocks.cuh"

struct GradientSmem {
    SharedBlock left, right, third;  // the operands of T and a state; then k or q, the same scaled, and T
    SharedDecay decay;
    Real of_row[BLOCK];                           // the diagonal of T; or what each key gets from behind the chunk
    Real moved[CHANNELS ? BLOCK * BLOCK : 1];     // factors of a level, then what a row gets of it
    Real of_decay[CHANNELS ? BLOCK * BLOCK : 1];  // what the decays get
};

// Calls f(row, column, number) for what the decays get, where tokens and channels exist.
template <typename F>
__device__ __forceinline__ void each_of_decay(GradientSmem& smem, int num_tokens, int num_channels, F f) {
    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += NUM_THREADS) {
        const int row = i / BLOCK, col = i % BLOCK;
        if (row < num_tokens && col < num_channels) f(row, col, smem.of_decay[i]);
    }
}

// Calls f(of_decay of t, sum) for the tokens t of [begin, end) of this thread's channel: the sum of what is in `moved`
// times own(row), over the rows that are told above.
template <bool ROWS_ARE_KEYS, typename Own, typename F>
__device__ __forceinline__ void sum_moved(GradientSmem& smem, int begin, int end, Own own, F f) {
    const int column = ChannelDecay::column();
    Real sum = 0;
    for (int step = 0; step < end - begin; step++) {
        const int t = ROWS_ARE_KEYS ? begin + step : end - 1 - step, at = t * BLOCK + column;
        const Real next = fma(own(t), smem.moved[at], sum);
        f(smem.of_decay[at], ROWS_ARE_KEYS ? sum : next);
        sum = next;
    }
}

// acc += the products of T with the rows of smem.left, decayed, times factor(r) of a lane's row; and adds to of_decay.
// T is in `products`, and its diagonal, which nothing decays, in smem.of_row, factors included. own(t): the row itself,
// in this thread's channel. The caller puts a barrier before and behind.
template <bool ROWS_ARE_KEYS, typename Factor, typename Own>
__device__ __forceinline__ void add_decayed(Block& acc, Block& products, GradientSmem& smem,
                                            const ChannelDecay& channels, Factor factor, Own own) {
    const int column = ChannelDecay::column();
    acc.each([&](int r, int c, Real& x) {
        const int row = Block::row(r);
        x = fma(smem.of_row[row], to_real(smem.left[row * STRIDE + Block::column(c)]), x);
    });
    auto scale = [&](int t, Real x) {
        from_real(to_real(smem.left[t * STRIDE + column]) * x, smem.right[t * STRIDE + column]);
    };
    auto keep_factor = [&](int t, Real x) {
        smem.moved[t * BLOCK + column] = x;
        from_real(Real(0), smem.right[t * STRIDE + column]);
    };
    Block part;
#pragma unroll 1
    for (int level = 0; level < LEVELS; level++) {
        // SYNC: every thread is done with the blocks of the level before.
        __syncthreads();
        if constexpr (ROWS_ARE_KEYS) {
            channels.at(level, scale, keep_factor);
        } else {
            channels.at(level, keep_factor, scale);
        }
        const Window window = window_of<ROWS_ARE_KEYS>(level);
        each_in(products, window, [&](int r, int c, Real& x) {  // no other terms are multiplied
            const int row = Block::row(r), col = Block::column(c);
            const bool meet = at_level(ROWS_ARE_KEYS ? col : row, ROWS_ARE_KEYS ? row : col, level);
            from_real(meet ? x : Real(0), smem.third[row * STRIDE + col]);
        });
        // SYNC: the scaled rows and T are there for all.
        __syncthreads();
        part.clear();
        multiply<false, false>(part, smem.third, smem.right, WHOLE, window);
        part.each([&](int r, int c, Real& x) {
            const int row = Block::row(r);
            if ((row >> level & 1) == ROWS_ARE_KEYS) return;
            Real& moved = smem.moved[row * BLOCK + Block::column(c)];
            moved *= factor(r) * x;
            acc.at(r, c) += moved;
        });
        // SYNC: what rows get at this level is there for all.
        __syncthreads();
        const int half = 1 << level;
        for (int task = 2 * ChannelDecay::part() + !ROWS_ARE_KEYS; task < BLOCK / half;
             task += 2 * ChannelDecay::PARTS) {
            sum_moved<ROWS_ARE_KEYS>(smem, task * half, (task + 1) * half, own,
                                     [](Real& of_decay, Real sum) { of_decay += sum; });
        }
    }
}
