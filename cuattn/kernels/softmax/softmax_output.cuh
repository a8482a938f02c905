// What is written for a row once its state is known: probabilities, their logarithms, or the log-sum-exp.
//
// A row of state row_sum = 0 has no distribution (all -inf, or, under the naive algorithm, all underflowed):
// probabilities 0, logarithms -inf.
//
// Needs from the constants: Element, OUTPUT.
#pragma once
#include "softmax/softmax_rows.cuh"

constexpr int SOFTMAX = 0;
constexpr int LOG_SOFTMAX = 1;
constexpr int LOGSUMEXP = 2;
static_assert(OUTPUT == SOFTMAX || OUTPUT == LOG_SOFTMAX || OUTPUT == LOGSUMEXP, "unknown OUTPUT");

template <int OUTPUT_KIND>
struct ResultOf {
    using type = Element;
};
template <>
struct ResultOf<LOGSUMEXP> {
    using type = Accumulator;  // a float16 could not hold the log-sum-exp of large logits
};
using Result = ResultOf<OUTPUT>::type;

// What the elements of a row have in common.
struct Normalizer {
    Accumulator shift;
    Accumulator divisor;  // SOFTMAX: of e^(x - shift)
    Accumulator log_sum;  // LOG_SOFTMAX: to subtract from x - shift

    __device__ __forceinline__ explicit Normalizer(RowState state)
        : shift(exponent_shift(state.row_max)),
          divisor(state.row_sum == Accumulator(0) ? Accumulator(1) : state.row_sum),
          log_sum(state.row_sum == Accumulator(0) ? infinity() : logarithm(state.row_sum)) {}

    // The result for an element given as x - shift.
    __device__ __forceinline__ Accumulator log_probability(Accumulator shifted) const { return shifted - log_sum; }

    // ... and given as e^(x - shift). 16-bit results are far coarser than the rounding of a reciprocal.
    __device__ __forceinline__ Accumulator probability(Accumulator exponential_of_shifted) const {
        if constexpr (sizeof(Element) == 2) return exponential_of_shifted * (Accumulator(1) / divisor);
        return exponential_of_shifted / divisor;
    }

    __device__ __forceinline__ Accumulator operator()(Accumulator x) const {
        if constexpr (OUTPUT == LOG_SOFTMAX) return log_probability(x - shift);
        return probability(exponential(x - shift));
    }
};

// The last pass over [begin, end) of a row: one read, one write. Each thread writes exactly the elements that it has
// just read itself, so that `out` may be `x`.
__device__ __forceinline__ void write_row(const Element* g_x, Result* g_out, const RowLayout& layout, unsigned begin,
                                          unsigned end, int thread, RowState state) {
    if constexpr (OUTPUT == LOGSUMEXP) {
        if (thread == 0 && begin < end) *g_out = logsumexp(state);
    } else {
        const Normalizer normalizer(state);
        Element* g_row = reinterpret_cast<Element*>(g_out);  // Result is Element here, which only this branch knows
        for (unsigned tile = begin; tile < end; tile += TILE_COLS) {
            Pack pack = load_pack(g_x, layout.x_col_stride, tile, thread, end);
#pragma unroll
            for (int i = 0; i < PACK; ++i) pack.value[i] = normalizer(pack.value[i]);
            store_pack(g_row, layout.out_col_stride, tile, thread, end, pack);
        }
    }
}
