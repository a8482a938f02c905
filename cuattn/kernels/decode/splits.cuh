// Where the queries of a sequence are, and the partial results that the splits of its keys leave: what the kernels that
// make them (decode_block.cuh) and the one that merges them (attention_decode_reduce.cu) agree on.
#pragma once
#include "attention/query_block.cuh"
#include "decode/attention_decode_params.cuh"

// Partial results are rows [num_partials, num_heads]; those of token i and split s of a sequence are at
// first + s * seqlen_q + i.
struct Splits {
    int count;
    long long first;
};

template <typename Real>
__device__ __forceinline__ Splits splits_of(const DecodeParams<Real>& params, const int* g_splits, int batch_idx,
                                            int q_start) {
    if (g_splits != nullptr) return {g_splits[2 * batch_idx], g_splits[2 * batch_idx + 1]};
    return {params.num_splits, static_cast<long long>(q_start) * params.num_splits};
}

// Where the queries of a sequence are. Equal lengths: [batch, seqlen_q]; packed: see query_block.cuh.
template <typename Real>
__device__ __forceinline__ void find_queries(const DecodeParams<Real>& params, const int* g_cu_seqlens_q, int batch_idx,
                                             int& q_start, int& seqlen_q) {
    if (g_cu_seqlens_q == nullptr) {
        seqlen_q = params.seqlen_q;
        q_start = batch_idx * seqlen_q;
    } else {
        sequence_bounds(g_cu_seqlens_q, batch_idx, params.seqlen_q, params.max_seqlen_q, q_start, seqlen_q);
    }
}
