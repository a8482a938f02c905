// The difference of two attentions that lie in memory, as decoding leaves them.
//
//     out = output_scale weight o / sqrt(mean(o^2) + eps),  o = out1 - lambda out2  (norm and weight: where asked for)
//
// Grid: one warp for each query of each head; row = (batch_idx * seqlen_q + query_idx) * num_heads + head_idx.
// Block: NUM_WARPS warps.
//
// Constants: Element, Accumulator; HEAD_DIM_V (a bucket), NUM_WARPS.
#include "attention/attention_params.cuh"
#include "common/elements.cuh"
#include "differential/row_norm.cuh"
#include "differential/warp_row.cuh"

// Passed by value.
template <typename Real>
struct DifferentialCombineParams {
    RowStrides out1, out2, out;
    RowStrides lambda;  // of lambda [batch, seqlen_q, heads]; 0 where it is the same
    long long num_rows;
    int seqlen_q, num_heads, head_dim_v;
    int norm;           // 0 or 1
    Real lambda_value;  // where there is no array
    Real eps, output_scale;
};

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_differential_combine(
    const Element* __restrict__ g_out1,             // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_out2,             // likewise
    const Accumulator* __restrict__ g_lambda,       // [batch, seqlen_q, num_heads] or less; may be null
    const Accumulator* __restrict__ g_norm_weight,  // [head_dim_v]; may be null
    Element* __restrict__ g_out,                    // like out1
    const DifferentialCombineParams<Accumulator> params)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const long long row = static_cast<long long>(blockIdx.x) * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (row >= params.num_rows) return;
    const int head_idx = row % params.num_heads;
    const long long position = row / params.num_heads;
    const int query_idx = position % params.seqlen_q;
    const long long batch_idx = position / params.seqlen_q;
    auto offset = [&](const RowStrides& strides) {
        return batch_idx * strides.batch + query_idx * strides.seq + head_idx * strides.head;
    };
    const Accumulator lambda = g_lambda == nullptr ? params.lambda_value : g_lambda[offset(params.lambda)];
    g_out1 += offset(params.out1);
    g_out2 += offset(params.out2);
    g_out += offset(params.out);
    Row difference = {};
    each_column(lane_idx, params.head_dim_v, [&](int i, int column) {
        difference[i] = fma(-lambda, static_cast<Accumulator>(to_real(g_out2[column])),
                            static_cast<Accumulator>(to_real(g_out1[column])));
    });
    Accumulator factor = params.output_scale, normed = 1;
    if (params.norm) {
        auto sum_of_squares = [&](Accumulator by) {
            return row_sum([&](int i) { return difference[i] * by * (difference[i] * by); });
        };
        const RowNorm<Accumulator> norm(sum_of_squares, params.head_dim_v, params.eps);
        normed = norm.factor;
        factor *= norm.inverse;
    }
    each_column(lane_idx, params.head_dim_v, [&](int i, int column) {
        Accumulator x = difference[i] * normed * factor;
        if (g_norm_weight != nullptr) x *= g_norm_weight[column];
        from_real(x, g_out[column]);
    });
}
