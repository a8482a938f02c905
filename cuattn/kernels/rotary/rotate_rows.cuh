// RoPE of rows at neighbouring positions, in shared memory and in place, for less than a sine and a cosine an element:
// a rotation follows from that of a row before by one by the distance of the rows, which all pairs of rows share.
//
// A product of rotations errs by 2 u (u = 2^-24) more than its factors, and there are a few of them: far below the
// rounding to 16 bits, but not the same bits as rope's. Computed rotations only: tables may hold more than rotations.
//
// Constants used: Element (16-bit), INTERLEAVED, TABLES, Table.
#pragma once
#include "rotary/rotate_tile.cuh"

// Rotations of all pairs of a head, in shared memory.
template <int MAX_PAIRS>
struct alignas(16) PairTurns {
    float cos[MAX_PAIRS], sin[MAX_PAIRS];

    template <int NUM_PAIRS>
    __device__ __forceinline__ void load(Rotation<float> (&turns)[NUM_PAIRS], int first_pair) const {
        Run<float, NUM_PAIRS> c, s;
        c.load(cos + first_pair);
        s.load(sin + first_pair);
#pragma unroll
        for (int i = 0; i < NUM_PAIRS; ++i) turns[i] = {c.get(i), s.get(i)};
    }
    __device__ __forceinline__ void set(int pair, const Rotation<float>& turn) {
        cos[pair] = turn.cos;
        sin[pair] = turn.sin;
    }
};

// What the rows of a tile share.
template <int MAX_PAIRS>
struct SharedTurns {
    PairTurns<MAX_PAIRS> step;  // from one of a thread's rows to the next
    PairTurns<MAX_PAIRS> last;  // to the position that no row goes beyond
};

// A thread's part of a tile: one unit of 16 bytes of every rows_per_pass-th row.
template <int NUM_THREADS>
struct RowShare {
    int units_per_row, rows_per_pass;

    __device__ __forceinline__ explicit RowShare(int num_pairs)
        : units_per_row(num_pairs / RotaryUnit<Element, true, INTERLEAVED>::NUM_PAIRS),
          rows_per_pass(NUM_THREADS / units_per_row) {}
};

// By all threads of the CTA; a barrier has to follow before rotate_rows.
template <int NUM_THREADS, int MAX_PAIRS>
__device__ __forceinline__ void make_shared_turns(SharedTurns<MAX_PAIRS>& s_turns, const TileRotations& rotations,
                                                  int num_pairs, long long last_position) {
    const RowShare<NUM_THREADS> share(num_pairs);
    for (int pair = threadIdx.x; pair < num_pairs; pair += NUM_THREADS) {
        Rotation<float> turn[1];
        rotations.at(turn, share.rows_per_pass, pair);
        s_turns.step.set(pair, turn[0]);
        rotations.at(turn, last_position, pair);
        s_turns.last.set(pair, turn[0]);
    }
}

// Turns row r of s_tile, rows of COLS + ROW_PADDING elements, to position min(first_position + r, last_position), which
// none is below 0. Heads come in units of 16 bytes. Called by all threads of the CTA.
template <int COLS, int NUM_THREADS, int MAX_PAIRS>
__device__ __forceinline__ void rotate_rows(Element* s_tile, int num_rows, const TileRotations& rotations,
                                            int num_pairs, const SharedTurns<MAX_PAIRS>& s_turns,
                                            long long first_position, long long last_position) {
    using Unit = RotaryUnit<Element, true, INTERLEAVED>;
    constexpr int STRIDE = COLS + ROW_PADDING<Element>;
    const RowShare<NUM_THREADS> share(num_pairs);
    int row = threadIdx.x / share.units_per_row;
    if (row >= share.rows_per_pass) return;
    Unit unit(threadIdx.x - row * share.units_per_row, num_pairs);
    Rotation<float> turns[Unit::NUM_PAIRS];
    // Rows before the last position.
    const int num_before =
        static_cast<int>(max(0ll, min(last_position - first_position, static_cast<long long>(num_rows))));
    if (row < num_before) {
        rotations.at(turns, first_position + row, unit.first_pair);
    } else {
        s_turns.last.load(turns, unit.first_pair);
    }
    while (row < num_rows) {
        unit.load(s_tile + row * STRIDE);
        unit.rotate(turns);
        unit.store(s_tile + row * STRIDE);
        const bool before = row < num_before;
        row += share.rows_per_pass;
        if (row < num_before) {
            Rotation<float> step[Unit::NUM_PAIRS];
            s_turns.step.load(step, unit.first_pair);
#pragma unroll
            for (int i = 0; i < Unit::NUM_PAIRS; ++i) turns[i].turn_by(step[i]);
        } else if (before) {
            s_turns.last.load(turns, unit.first_pair);
        }
    }
}
