// What the gradients of differential attention need of every row before anything else: the way of the gradient through
// the norm and the difference, to the two attentions.
//
//     o = out1 - lambda out2,  r = 1 / sqrt(mean(o^2) + eps),  g = output_scale weight dout
//     do = r (g - o r^2 mean(g o))  (without norm: g),   dout1 = do,  dout2 = -lambda do
//     delta s = sum(dout s * out s),   dlambda = -sum(do out2),   dweight = sum(output_scale dout o r)
//
// dout1 and dout2 are rounded and written side by side, as heads of q lie, and delta is that of the rounded ones; lse
// is made ready for the other kernels (ready_lse.cuh), as by attention_backward_rows.cu.
//
// Grid: x = part * num_heads + head_idx: a CTA has one head of a run of tokens, of which there are num_parts.
// Block: NUM_WARPS warps, which take the tokens of the run in turn. What is summed over tokens is summed in this order,
// then over the warps: dlambda and dweight come out in parts, which differential_backward_sums.cu adds up.
//
// Constants: Element, Accumulator; HEAD_DIM_V (a bucket), NUM_WARPS.
#include "backward/ready_lse.cuh"
#include "attention/attention_params.cuh"
#include "common/elements.cuh"
#include "differential/row_norm.cuh"
#include "differential/warp_row.cuh"

// Passed by value.
template <typename Real>
struct DifferentialRowsParams {
    RowStrides dout, out1, out2;
    RowStrides lambda;     // of lambda [batch, seqlen_q, heads]; 0 where it is the same
    long long num_tokens;  // of all sequences
    int seqlen_q, num_heads, head_dim_v;
    int num_parts;
    int norm;              // 0 or 1
    int base_2;            // 1: the other kernels have base-2 logits
    Real lambda_value;     // where there is no array
    Real eps, output_scale;
};

using Params = DifferentialRowsParams<Accumulator>;

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_differential_backward_rows(
    const Element* __restrict__ g_dout,             // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_out1,             // likewise
    const Element* __restrict__ g_out2,             // likewise
    const Accumulator* __restrict__ g_lse,          // [batch, num_heads, 2, seqlen_q], contiguous
    const Accumulator* __restrict__ g_lambda,       // [batch, seqlen_q, num_heads] or less; may be null
    const Accumulator* __restrict__ g_norm_weight,  // [head_dim_v]; may be null
    Element* __restrict__ g_douts,                  // [batch, seqlen_q, 2 num_heads, head_dim_v], contiguous
    Accumulator* __restrict__ g_ready_lse,          // like lse
    Accumulator* __restrict__ g_delta,              // like lse
    Accumulator* __restrict__ g_dlambda,            // [batch, seqlen_q, num_heads], contiguous; may be null
    Accumulator* __restrict__ g_dlambda_parts,      // [num_parts, num_heads]
    Accumulator* __restrict__ g_dweight_parts,      // [num_parts, num_heads, head_dim_v]; may be null
    const Params params)
{
    __shared__ Accumulator s_sums[NUM_WARPS][HEAD_DIM_V + 1];  // of each warp: dweight, and dlambda last
    const int warp_idx = threadIdx.x / WARP_SIZE, lane_idx = threadIdx.x % WARP_SIZE;
    const int part = blockIdx.x / params.num_heads, head_idx = blockIdx.x - part * params.num_heads;
    const int num_cols = params.head_dim_v;
    const long long first = params.num_tokens / params.num_parts * part + min(static_cast<long long>(part),
                                                                              params.num_tokens % params.num_parts);
    const long long count = params.num_tokens / params.num_parts + (part < params.num_tokens % params.num_parts);

    Row weight, dweight;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        weight[i] = 1;
        dweight[i] = 0;
    }
    if (g_norm_weight != nullptr) {
        each_column(lane_idx, num_cols, [&](int i, int column) { weight[i] = g_norm_weight[column]; });
    }
    Accumulator dlambda_sum = 0;
    for (long long token = first + warp_idx; token < first + count; token += NUM_WARPS) {
        const long long batch_idx = token / params.seqlen_q;
        const int query_idx = token - batch_idx * params.seqlen_q;
        auto row_of = [&](const Element* g_rows, const RowStrides& strides) {
            return g_rows + batch_idx * strides.batch + query_idx * strides.seq + head_idx * strides.head;
        };
        const Element* g_dout_row = row_of(g_dout, params.dout);
        const Element* g_out1_row = row_of(g_out1, params.out1);
        const Element* g_out2_row = row_of(g_out2, params.out2);
        Accumulator lambda = params.lambda_value;
        if (g_lambda != nullptr) {
            lambda = g_lambda[batch_idx * params.lambda.batch + query_idx * params.lambda.seq +
                              head_idx * params.lambda.head];
        }
        Row gradient = {}, out1 = {}, out2 = {};
        each_column(lane_idx, num_cols, [&](int i, int column) {
            gradient[i] = static_cast<Accumulator>(to_real(g_dout_row[column])) * params.output_scale;
            out1[i] = to_real(g_out1_row[column]);
            out2[i] = to_real(g_out2_row[column]);
        });
        if (params.norm) {
            auto difference = [&](int i) { return fma(-lambda, out2[i], out1[i]); };
            const RowNorm<Accumulator> norm(
                [&](Accumulator by) {
                    return row_sum([&](int i) { return difference(i) * by * (difference(i) * by); });
                },
                num_cols, params.eps);
            // The row divided by its root mean square.
            auto unit = [&](int i) { return difference(i) * norm.factor * norm.inverse; };
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                dweight[i] = fma(gradient[i], unit(i), dweight[i]);
                gradient[i] *= weight[i];
            }
            const Accumulator mean = row_sum([&](int i) { return gradient[i] * unit(i); }) / num_cols;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                gradient[i] = fma(-mean, unit(i), gradient[i]) * norm.factor * norm.inverse;
            }
        }
        const Accumulator dlambda = -row_sum([&](int i) { return gradient[i] * out2[i]; });
        dlambda_sum += dlambda;

        Element* g_douts_row = g_douts + (token * 2 * params.num_heads + 2 * head_idx) * num_cols;
        Row first_gradient = {}, second_gradient = {};  // as they are rounded
        each_column(lane_idx, num_cols, [&](int i, int column) {
            Element rounded;
            from_real(gradient[i], rounded);
            g_douts_row[column] = rounded;
            first_gradient[i] = to_real(rounded);
            from_real(-lambda * gradient[i], rounded);
            g_douts_row[num_cols + column] = rounded;
            second_gradient[i] = to_real(rounded);
        });
        const Accumulator deltas[2] = {row_sum([&](int i) { return first_gradient[i] * out1[i]; }),
                                       row_sum([&](int i) { return second_gradient[i] * out2[i]; })};
        if (lane_idx == 0) {
            const long long at = (batch_idx * params.num_heads + head_idx) * 2 * params.seqlen_q + query_idx;
#pragma unroll
            for (int stream = 0; stream < 2; stream++) {
                const Accumulator lse = g_lse[at + stream * params.seqlen_q];
                const Accumulator delta = deltas[stream] * Accumulator(INVERSE_P_FACTOR);
                g_delta[at + stream * params.seqlen_q] = isnan(lse) ? Accumulator(0) : delta;
                g_ready_lse[at + stream * params.seqlen_q] = make_ready_lse(lse, params.base_2);
            }
            if (g_dlambda != nullptr) g_dlambda[token * params.num_heads + head_idx] = dlambda;
        }
    }

    each_column(lane_idx, num_cols, [&](int i, int column) { s_sums[warp_idx][column] = dweight[i]; });
    if (lane_idx == 0) s_sums[warp_idx][HEAD_DIM_V] = dlambda_sum;
    // SYNC: the sums of every warp are in shared memory.
    __syncthreads();
    auto sum_of_warps = [&](int column) {
        Accumulator sum = 0;
        for (int warp = 0; warp < NUM_WARPS; warp++) sum += s_sums[warp][column];
        return sum;
    };
    if (g_dweight_parts != nullptr) {
        for (int column = threadIdx.x; column < num_cols; column += NUM_WARPS * WARP_SIZE) {
            g_dweight_parts[static_cast<long long>(blockIdx.x) * num_cols + column] = sum_of_warps(column);
        }
    }
    if (g_dlambda == nullptr && threadIdx.x == 0) g_dlambda_parts[blockIdx.x] = sum_of_warps(HEAD_DIM_V);
}
