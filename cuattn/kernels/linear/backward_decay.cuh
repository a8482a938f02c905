// The gradient of a decay that states have as a whole, from what queries, keys and states gave: a number a token, and
// then, for a decay of all tokens, their sum.
//
// Of the first a CTA has a state: backward_blocks.cuh, with one block. Grid of the second: a CTA for each state.
#pragma once
#include "linear/backward_blocks.cuh"

// The sum over a CTA in a fixed order, in thread 0; s_sums: NUM_THREADS numbers.
__device__ __forceinline__ Real sum_of_cta(Real x, Real* s_sums) {
    s_sums[threadIdx.x] = x;
#pragma unroll 1
    for (int half = NUM_THREADS / 2; half > 0; half /= 2) {
        // SYNC: the sums of the step before are there.
        __syncthreads();
        if (threadIdx.x < half) s_sums[threadIdx.x] += s_sums[threadIdx.x + half];
    }
    return s_sums[0];
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_ddecay(
    const Real* __restrict__ g_of_queries,
    const Real* __restrict__ g_of_keys,
    const Real* __restrict__ g_through,
    Real* __restrict__ g_ddecay,  // [batch, seqlen_k, num_states]
    const int batch,
    const Params params)
{
    __shared__ Real s_sums[NUM_THREADS];
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const int outputs_per_state = params.num_outputs / params.num_states;
    const Place place = place_of_cta(params.num_states, params.seqlen_k, 1);
    const Chunk& chunk = place.chunk;
    const int state = place.head, batch_idx = place.batch_idx;
    const long long kept = kept_state(params, batch_idx, state, chunk.index);

    const int num_through = blocks_v * params.head_dim;
    Real through = 0;
    for (int i = threadIdx.x; i < num_through; i += NUM_THREADS) through += g_through[kept * num_through + i];
    sum_of_cta(through, s_sums);
    // SYNC: the sum of what goes through the chunk is there for all.
    __syncthreads();
    const int t = threadIdx.x;
    if (t >= chunk.num_tokens) return;
    Real sum = s_sums[0];
    for (int block = 0; block < blocks; block++) {
        const long long head = (static_cast<long long>(block) * batch + batch_idx) * params.num_states + state;
        sum += g_of_keys[head * params.seqlen_k + chunk.first + t];
    }
    for (int o = 0; o < outputs_per_state; o++) {
        sum += g_of_queries[first_term(params, batch_idx, state * outputs_per_state + o, chunk) + t];
    }
    g_ddecay[(static_cast<long long>(batch_idx) * params.seqlen_k + chunk.first + t) * params.num_states + state] = sum;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_ddecay_sum(
    const Real* __restrict__ g_of_tokens,  // [tokens of all batch entries, num_states]
    Real* __restrict__ g_ddecay,           // [num_states]
    const long long num_tokens,
    const int num_states)
{
    __shared__ Real s_sums[NUM_THREADS];
    Real sum = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += NUM_THREADS) sum += g_of_tokens[i * num_states + blockIdx.x];
    sum = sum_of_cta(sum, s_sums);
    if (threadIdx.x == 0) g_ddecay[blockIdx.x] = sum;
}
