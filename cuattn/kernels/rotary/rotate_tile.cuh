// RoPE of rows that lie in shared memory, in place.
//
// Constants used: Element, INTERLEAVED, TABLES, Table.
#pragma once
#include "rotary/rotary_units.cuh"
#include "common/tiles.cuh"

using TileReal = RealOf<Element>::type;
using TileRotations = Rotations<TABLES, TileReal, Table>;

template <bool VECTORS, int COLS, int NUM_THREADS, typename PositionOf>
__device__ __forceinline__ void rotate_units(Element* s_tile, int num_rows, const TileRotations& rotations,
                                             int num_pairs, PositionOf position_of) {
    using Unit = RotaryUnit<Element, VECTORS, INTERLEAVED>;
    const int units_per_row = num_pairs / Unit::NUM_PAIRS;
    for (int i = threadIdx.x; i < num_rows * units_per_row; i += NUM_THREADS) {
        const int row = i / units_per_row;
        Element* s_row = s_tile + row * (COLS + ROW_PADDING<Element>);
        Unit unit(i - row * units_per_row, num_pairs);
        Rotation<TileReal> turns[Unit::NUM_PAIRS];
        rotations.at(turns, position_of(row), unit.first_pair);
        unit.load(s_row);
        unit.rotate(turns);
        unit.store(s_row);
    }
}

// Turns the first num_rows rows of s_tile, rows of COLS + ROW_PADDING elements; row r by the angles of position_of(r).
// `vectors`: units of 16 bytes fit. Called by all threads of the CTA.
template <int COLS, int NUM_THREADS, typename PositionOf>
__device__ __forceinline__ void rotate_tile(Element* s_tile, int num_rows, const TileRotations& rotations,
                                            int num_pairs, bool vectors, PositionOf position_of) {
    if (vectors) {
        rotate_units<true, COLS, NUM_THREADS>(s_tile, num_rows, rotations, num_pairs, position_of);
    } else {
        rotate_units<false, COLS, NUM_THREADS>(s_tile, num_rows, rotations, num_pairs, position_of);
    }
}
