// What a kernel of linear attention is told about a problem besides its arrays: one struct, passed by value.
// Python packs the fields by their names (cuattn/ops/linear/launch.py). Real is the type of sums and states.
#pragma once
#include "attention/attention_params.cuh"

template <typename Real>
struct LinearParams {
    RowStrides q, k, v, out;
    RowStrides decay;                // 0 where the decay has no such axis
    int num_states, num_outputs;     // heads: G and O
    int outputs_per_q_head;          // O / H: output o reads query head o / (O / H) and state o / (O / G)
    int states_per_k_head;           // G / Gk: state g reads key head g / (G / Gk) ...
    int states_per_v_head;           // G / Gv: ... and value head g / (G / Gv)
    int seqlen_q, seqlen_k;          // of every sequence; of all of them together when packed
    int head_dim, head_dim_v;
    int num_slices;                  // of the columns of v: a CTA each
    int heads_per_cta, head_blocks;  // outputs of a state that a CTA computes, and the CTAs that share its outputs
    int num_segments, segment_len;   // tokens are taken in segments: a CTA each
    int states_in, states_out;       // states of a (sequence, head) in g_s_in and g_s_out: one a segment, or 1
    int feature_map;                 // enum FeatureMap
    Real scale, eps;
};
