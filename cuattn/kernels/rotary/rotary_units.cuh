// How threads share a head: each takes one unit of it, in every head of its group, so that the rotations of a unit are
// made once and used for all of them.
//
// A rotary unit is a number of pairs: (i, i + num_pairs), or (2i, 2i + 1) with INTERLEAVED. Vectorized, it is 16 bytes
// from each half of the rotated part, or 16 bytes of whole pairs; else one pair. The elements behind the rotated part
// are in copy units of 16 bytes, or of one element. Rotary units come first.
#pragma once
#include "rotary/rope.cuh"

template <typename Element, bool VECTORIZED>
constexpr int UNIT_PACK = VECTORIZED ? 16 / sizeof(Element) : 1;

template <typename Element, bool VECTORIZED, bool INTERLEAVED>
struct RotaryUnit {
    using Real = typename RealOf<Element>::type;
    static constexpr int PACK = UNIT_PACK<Element, VECTORIZED>;
    static constexpr bool ONE_RUN = VECTORIZED && INTERLEAVED;
    static constexpr int NUM_PAIRS = ONE_RUN ? PACK / 2 : PACK;

    int first_pair;
    int first, second;  // where the runs start in a head
    Real x[NUM_PAIRS], y[NUM_PAIRS];

    __device__ __forceinline__ RotaryUnit(int unit_idx, int num_pairs)
        : first_pair(unit_idx * NUM_PAIRS),
          first(INTERLEAVED ? 2 * first_pair : first_pair),
          second(INTERLEAVED ? first + 1 : first + num_pairs) {}

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < NUM_PAIRS; ++i) x[i] = y[i] = 0;
    }

    __device__ __forceinline__ void load(const Element* g_head) {
        Run<Element, PACK> run;
        run.load(g_head + first);
        if constexpr (ONE_RUN) {
#pragma unroll
            for (int i = 0; i < NUM_PAIRS; ++i) x[i] = run.get(2 * i), y[i] = run.get(2 * i + 1);
        } else {
            Run<Element, PACK> other;
            other.load(g_head + second);
#pragma unroll
            for (int i = 0; i < NUM_PAIRS; ++i) x[i] = run.get(i), y[i] = other.get(i);
        }
    }

    __device__ __forceinline__ void store(Element* g_head) const {
        Run<Element, PACK> run;
        if constexpr (ONE_RUN) {
            Real elements[PACK];
#pragma unroll
            for (int i = 0; i < NUM_PAIRS; ++i) elements[2 * i] = x[i], elements[2 * i + 1] = y[i];
            run.set_all(elements);
        } else {
            Run<Element, PACK> other;
            run.set_all(x);
            other.set_all(y);
            other.store(g_head + second);
        }
        run.store(g_head + first);
    }

    __device__ __forceinline__ void add(const RotaryUnit& other) {
#pragma unroll
        for (int i = 0; i < NUM_PAIRS; ++i) x[i] += other.x[i], y[i] += other.y[i];
    }

    __device__ __forceinline__ void rotate(const Rotation<Real> (&rotations)[NUM_PAIRS]) {
#pragma unroll
        for (int i = 0; i < NUM_PAIRS; ++i) rotations[i].turn(x[i], y[i]);
    }
};

// Element 0 of copy unit `unit_idx`, the units counted from the first rotary one.
template <typename Element, bool VECTORIZED, bool INTERLEAVED>
__device__ __forceinline__ int copy_offset(int unit_idx, int num_pairs) {
    using Unit = RotaryUnit<Element, VECTORIZED, INTERLEAVED>;
    return 2 * num_pairs + (unit_idx - num_pairs / Unit::NUM_PAIRS) * Unit::PACK;
}
