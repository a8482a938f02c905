// Attention over a union of disjoint sets of keys, from the attention over each set.
//
// Part s of a row is out_s [head_dim] and a state (max_s, sum_s) with max_s + log(sum_s) = log(sum of e^logit) over its
// keys: the maximum and the sum of a softmax, or a log-sum-exp and 1. With m = max max_s and
// weight_s = sum_s e^(max_s - m):
//
//   out = sum of weight_s * out_s / sum of weight_s,    lse = m + log(sum of weight_s)
//
// which is the softmax over all keys (Milakov and Gimelshein, 2018). A sink is a part without an out. The maximum comes
// first, in a pass over the states alone, so that nothing is ever rescaled. Splits of a sequence have maximum and sum
// apart: in one number, a logarithm of the sum would be lost beside a maximum of 10^9.
//
// Conventions, as in softmax_state.cuh:
// - a part with sum 0, or lse = -inf, is empty: its out is not read, whatever it holds;
// - a row of empty parts has weights that sum to 0: out = 0, lse = -inf;
// - a NaN or +inf lse makes the sum of the weights NaN, and with it the whole row.
//
// Needs from the constants: Element (of the parts), VECTORIZED (rows of parts and result begin at multiples of a pack).
#pragma once
#include "common/elements.cuh"
#include "softmax/softmax_state.cuh"

constexpr int PACK = 16 / sizeof(Element);  // elements of a row that a thread holds

// A RowState in memory, where it begins at any multiple of its numbers.
struct StoredState {
    Accumulator row_max, row_sum;
};

__device__ __forceinline__ RowState state_of(StoredState state) { return {state.row_max, state.row_sum}; }
__device__ __forceinline__ RowState state_of(Accumulator lse) {
    return {lse, Accumulator(lse == -infinity() ? 0 : 1)};
}

// Where the parts of a row are. The first one has pointers of its own, so that two separate arrays are parts as well as
// one array with a leading axis. State: StoredState, or Accumulator for a log-sum-exp.
template <typename State>
struct Parts {
    const Element* g_first_out;  // [head_dim]
    const Element* g_rest_out;   // [num_parts - 1, head_dim]
    const State* g_first_state;
    const State* g_rest_state;  // [num_parts - 1]
    long long rest_out_stride;  // from part to part
    long long rest_state_stride;
    unsigned num_parts;

    __device__ __forceinline__ const Element* out(unsigned part) const {
        return part == 0 ? g_first_out : g_rest_out + (part - 1) * rest_out_stride;
    }
    __device__ __forceinline__ RowState state(unsigned part) const {
        return state_of(part == 0 ? *g_first_state : g_rest_state[(part - 1) * rest_state_stride]);
    }
};

// A thread's columns of a row: neighbouring ones with VECTORIZED, else `num_lanes` apart, so that neighbouring lanes
// touch neighbouring elements.
struct PackColumns {
    unsigned first;
    unsigned step;
    unsigned end;  // head_dim

    __device__ __forceinline__ PackColumns(unsigned tile, unsigned lane, unsigned num_lanes, unsigned head_dim)
        : first(VECTORIZED ? tile + lane * PACK : tile + lane), step(VECTORIZED ? 1 : num_lanes), end(head_dim) {}
    __device__ __forceinline__ unsigned at(int i) const { return first + i * step; }
    __device__ __forceinline__ bool whole() const { return VECTORIZED && first + PACK <= end; }
};

struct MergeAccumulator {
    Accumulator row_sum;      // of the weights
    Accumulator value[PACK];  // of the weighted outs
};

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// The largest maximum of the parts first, first + step, ...; -inf for none. NaN is left out, and found again in the
// sum.
template <typename State>
__device__ __forceinline__ Accumulator largest_max(const Parts<State>& parts, unsigned first, unsigned step) {
    Accumulator row_max = -infinity();
    for (unsigned part = first; part < parts.num_parts; part += step) {
        row_max = maximum(row_max, parts.state(part).row_max);
    }
    return row_max;
}

// Sums of the parts first, first + step, ...; `shift` is the exponent_shift of the largest maximum of the whole row.
// Products and sums are rounded one by one: a fused multiply-add would give two parts other bits in the other order.
template <typename State>
__device__ __forceinline__ MergeAccumulator weighted_sum(const Parts<State>& parts, unsigned first, unsigned step,
                                                         Accumulator shift, const PackColumns& columns) {
    MergeAccumulator acc{};
    for (unsigned part = first; part < parts.num_parts; part += step) {
        const RowState state = parts.state(part);
        if (state.row_sum == Accumulator(0)) continue;
        const Accumulator weight = multiply(state.row_sum, exponential(state.row_max - shift));
        acc.row_sum = add(acc.row_sum, weight);
        const Element* g_row = parts.out(part);
        Run<Element, PACK> run;
        if (columns.whole()) {
            run.load(g_row + columns.first);
        } else {
            run.clear();
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                if (columns.at(i) < columns.end) run.element[i] = g_row[columns.at(i)];
            }
        }
#pragma unroll
        for (int i = 0; i < PACK; ++i) acc.value[i] = add(acc.value[i], multiply(weight, run.get(i)));
    }
    return acc;
}

// Writes the thread's columns of the merged row.
template <typename Result>
__device__ __forceinline__ void store_merged(Result* g_row, const MergeAccumulator& acc, const PackColumns& columns) {
    const Accumulator divisor = acc.row_sum == Accumulator(0) ? Accumulator(1) : acc.row_sum;
    Run<Result, PACK> run;
#pragma unroll
    for (int i = 0; i < PACK; ++i) run.set(i, acc.value[i] / divisor);
    if (columns.whole()) {
        run.store(g_row + columns.first);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            if (columns.at(i) < columns.end) g_row[columns.at(i)] = run.element[i];
        }
    }
}
