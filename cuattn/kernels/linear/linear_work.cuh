// Which part of a problem of linear attention a CTA computes: a slice of the columns of a state, for a segment of the
// tokens of a sequence, and the outputs of some of the heads that read the state.
//
// Grid: x = (((batch_idx * num_states + state_idx) * num_segments + segment) * head_blocks + head_block) * num_slices
// + slice: so any batch fits, and CTAs that run at the same time share the keys of their head.
#pragma once
#include "attention/query_block.cuh"
#include "linear/linear_params.cuh"

struct LinearWork {
    int batch_idx, state_idx, segment;
    int slice;
    int first_output, num_outputs;  // heads
    bool first_block;               // the one of the head blocks that writes the state
    int start;                      // the first token of the sequence in a packed array, else 0
    int first_token, end_token;     // of the segment, within the sequence
};

// seqlen: of the side whose tokens are walked over.
template <typename Real>
__device__ __forceinline__ LinearWork linear_work(const LinearParams<Real>& params, const int* g_cu_seqlens,
                                                  int seqlen) {
    LinearWork work;
    unsigned rest = blockIdx.x;
    work.slice = rest % params.num_slices;
    rest /= params.num_slices;
    const int head_block = rest % params.head_blocks;
    rest /= params.head_blocks;
    work.segment = rest % params.num_segments;
    rest /= params.num_segments;
    work.state_idx = rest % params.num_states;
    work.batch_idx = rest / params.num_states;

    const int outputs_per_state = params.num_outputs / params.num_states;
    work.first_output = work.state_idx * outputs_per_state + head_block * params.heads_per_cta;
    work.num_outputs = min(params.heads_per_cta, outputs_per_state - head_block * params.heads_per_cta);
    work.first_block = head_block == 0;

    int length = seqlen;
    work.start = 0;
    if (g_cu_seqlens != nullptr) {
        sequence_bounds(g_cu_seqlens, work.batch_idx, seqlen, seqlen, work.start, length);
    }
    const long long first = static_cast<long long>(work.segment) * params.segment_len;
    work.first_token = static_cast<int>(min(first, static_cast<long long>(length)));
    work.end_token = static_cast<int>(min(first + params.segment_len, static_cast<long long>(length)));
    return work;
}

// Whether this CTA writes the state after its segment, where there is one state for each segment or one for all.
template <typename Real>
__device__ __forceinline__ bool writes_state(const LinearParams<Real>& params, const LinearWork& work) {
    return work.first_block && (params.states_out > 1 || work.segment == params.num_segments - 1);
}

// Which state of g_s_in, g_s_out a CTA begins with and ends with, where a (sequence, head) has `count` of them.
template <typename Real>
__device__ __forceinline__ long long state_place(const LinearParams<Real>& params, const LinearWork& work, int count) {
    const long long head = static_cast<long long>(work.batch_idx) * params.num_states + work.state_idx;
    return head * count + (count > 1 ? work.segment : 0);
}
