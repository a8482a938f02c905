// Rotary position embedding: from a position to the cosines and sines that turn the pairs of a head.
//
// Pair i of a head turns by the angle position * base^(-2i / rotary_dim). In single precision that product is wrong by
// radians at position 10^6 and even its remainder modulo 2 pi keeps nothing at 2^31, so it is never formed. Python
// gives the frequency of a pair in turns (base^(-2i / rotary_dim) / 2 pi), rounded to a multiple of 2^-64, and the
// product with the position is an integer one, modulo 2^64: whole turns fall off at the top, nothing is rounded, and a
// negative position needs no special case. What is left of a turn is off by |position| * 2^-65 turns, below 4e-10
// radians at position 2^31. For double there are 128 bits, of which the product keeps the upper 64.
#pragma once
#include "common/elements.cuh"

// Fused sums are written out here and below: left to the compiler, what it fuses depends on the code around, and with
// it the last bit of a result on how an array lies in memory.
template <typename Real>
struct Rotation {
    Real cos;
    Real sin;

    __device__ __forceinline__ void turn(Real& x, Real& y) const {
        const Real turned = fma(x, cos, -(y * sin));
        y = fma(y, cos, x * sin);
        x = turned;
    }
    // This rotation, and the other one behind it.
    __device__ __forceinline__ void turn_by(const Rotation& other) { other.turn(cos, sin); }
};

// What no rotation is: every element that it turns becomes NaN.
template <typename Real>
__device__ __forceinline__ Rotation<Real> no_rotation() {
    const Real nan = static_cast<Real>(__int_as_float(0x7fffffff));
    return {nan, nan};
}

// --- turns -----------------------------------------------------------------------------------------------------------

// What a pair turns by from one position to the next: high * 2^-64 + low * 2^-128 turns; float has no low word.
struct Turn {
    unsigned long long high;
    unsigned long long low;
};

// position * turn, modulo 1, in units of 2^-64.
__device__ __forceinline__ unsigned long long turns_at(Turn turn, long long position) {
    const unsigned long long factor = static_cast<unsigned long long>(position);
    // The carry out of the low words. A negative position reads as position + 2^64: take 2^64 times low off again.
    const unsigned long long carry = __umul64hi(factor, turn.low) - (position < 0 ? turn.low : 0);
    return factor * turn.high + carry;
}

// --- sine and cosine of a part of a turn -----------------------------------------------------------------------------

// Taylor coefficients of (sin(y) - y) / y^3 and (cos(y) - 1) / y^2 in y^2. The first terms left out, at y = pi/4, are
// 1.8e-9 and 1.2e-10 for float, 8e-20 and 2e-18 for double: far below one rounding.
template <typename Real>
struct Series {
    static constexpr int SIN_TERMS = 4, COS_TERMS = 5;
};
template <>
struct Series<double> {
    static constexpr int SIN_TERMS = 8, COS_TERMS = 8;
};

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

// Sum over i of (-1)^(i + 1) z^i / (FIRST + 2 i)!, in NUM_TERMS terms.
template <int FIRST, int NUM_TERMS, typename Real>
__device__ __forceinline__ Real alternating_series(Real z) {
    constexpr Real COEFFICIENT = static_cast<Real>(-1.0 / factorial(FIRST));
    if constexpr (NUM_TERMS == 1) {
        return COEFFICIENT;
    } else {
        return fma(-z, alternating_series<FIRST + 2, NUM_TERMS - 1>(z), COEFFICIENT);
    }
}

// The angle that `quarter` * 2^-64 quarters of a turn are, in radians. float takes the upper half of the bits, an error
// of 4e-10: with all of them the conversion would be a slow one.
__device__ __forceinline__ float radians(long long quarter, float) {
    return static_cast<float>(static_cast<int>(quarter >> 32)) * 3.6572952e-10f;  // pi/2 * 2^-32
}
__device__ __forceinline__ double radians(long long quarter, double) {
    return static_cast<double>(quarter) * 8.515303950216386e-20;  // pi/2 * 2^-64
}

// Cosine and sine of `turns` * 2^-64 turns, each to within 3 u absolute (u = 2^-24 or 2^-53): y carries three
// roundings of a number below pi/4, the series and the final sum less than one more.
template <typename Real>
__device__ __forceinline__ Rotation<Real> rotation_by(unsigned long long turns) {
    // The two highest bits: the nearest quadrant of 0, 1, 2, 3 (mod 4).
    const int quadrant = static_cast<int>(static_cast<unsigned>(turns >> 32) + (1u << 29));
    const Real y = radians(static_cast<long long>(turns << 2), Real());
    const Real z = y * y;
    const Real sin = fma(y, z * alternating_series<3, Series<Real>::SIN_TERMS>(z), y);
    const Real cos = fma(z, alternating_series<2, Series<Real>::COS_TERMS>(z), Real(1));
    const bool swap = quadrant & (1 << 30);
    const Real cos_of_turn = swap ? sin : cos;
    const Real sin_of_turn = swap ? cos : sin;
    const bool second_or_third = static_cast<int>(static_cast<unsigned>(quadrant) + (1u << 30)) < 0;
    return {second_or_third ? -cos_of_turn : cos_of_turn, quadrant < 0 ? -sin_of_turn : sin_of_turn};
}

// --- where rotations come from ---------------------------------------------------------------------------------------

// How tables of cosines and sines [num_positions, num_pairs] lie; strides in elements. Packed by Python.
struct TableLayout {
    long long cos_stride;
    long long sin_stride;
    long long num_positions;
};

// The rotations of a launch: computed, or read from tables. Either way `at` gives those of the pairs first_pair ..
// first_pair + NUM_PAIRS - 1 at a position; first_pair is a multiple of NUM_PAIRS.
template <bool TABLES, typename Real, typename Table>
struct Rotations {
    const unsigned long long* g_turns;  // [1 or, for double, 2][num_pairs]: high words, then low ones
    int num_pairs;

    __device__ __forceinline__ Rotations(const unsigned long long* g_turns_, int num_pairs_, const Table*, const Table*,
                                         const TableLayout&)
        : g_turns(g_turns_), num_pairs(num_pairs_) {}

    template <int NUM_PAIRS>
    __device__ __forceinline__ void at(Rotation<Real> (&rotations)[NUM_PAIRS], long long position,
                                       int first_pair) const {
        Run<unsigned long long, NUM_PAIRS> high, low;
        low.clear();
        high.load(g_turns + first_pair);
        if constexpr (sizeof(Real) == 8) low.load(g_turns + num_pairs + first_pair);
#pragma unroll
        for (int i = 0; i < NUM_PAIRS; ++i) {
            rotations[i] = rotation_by<Real>(turns_at({high.element[i], low.element[i]}, position));
        }
    }
};

template <typename Real, typename Table>
struct Rotations<true, Real, Table> {
    const Table* g_cos;
    const Table* g_sin;
    TableLayout layout;

    __device__ __forceinline__ Rotations(const unsigned long long*, int, const Table* g_cos_, const Table* g_sin_,
                                         const TableLayout& layout_)
        : g_cos(g_cos_), g_sin(g_sin_), layout(layout_) {}

    // A position that the tables do not hold is never looked up: what it turns becomes NaN.
    template <int NUM_PAIRS>
    __device__ __forceinline__ void at(Rotation<Real> (&rotations)[NUM_PAIRS], long long position,
                                       int first_pair) const {
        if (position < 0 || position >= layout.num_positions) {
#pragma unroll
            for (int i = 0; i < NUM_PAIRS; ++i) rotations[i] = no_rotation<Real>();
            return;
        }
        Run<Table, NUM_PAIRS> cos, sin;
        cos.load(g_cos + position * layout.cos_stride + first_pair);
        sin.load(g_sin + position * layout.sin_stride + first_pair);
#pragma unroll
        for (int i = 0; i < NUM_PAIRS; ++i) {
            rotations[i] = {static_cast<Real>(cos.get(i)), static_cast<Real>(sin.get(i))};
        }
    }
};
