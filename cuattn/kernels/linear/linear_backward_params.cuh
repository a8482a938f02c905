// What the kernels of the gradients of linear attention are told about a problem: one struct, passed by value.
// Python packs the fields by their names (cuattn/ops/linear/backward_launch.py). Real is the type of sums and states.
#pragma once
#include "attention/attention_params.cuh"

template <typename Real>
struct LinearBackwardParams {
    RowStrides dout, q, k, v;      // last axes contiguous; q and k mapped
    RowStrides raw_q, raw_k;       // as they were
    RowStrides dq, dk, dv;         // likewise
    RowStrides decay;              // 0 along an axis that the decay does not have
    int num_states, num_outputs;   // heads: G and O
    int outputs_per_q_head;        // O / H: output o reads query head o / (O / H) and state o / (O / G)
    int states_per_k_head;         // G / Gk: state g reads key head g / (G / Gk) ...
    int states_per_v_head;         // G / Gv: ... and value head g / (G / Gv)
    int seqlen_q, seqlen_k;
    int head_dim, head_dim_v;
    int num_kept;                  // states of a head that are kept: one a chunk, or one where nothing is causal
    int feature_map;               // enum FeatureMap
    int causal, normalize;         // 0 or 1
    Real scale, eps;
};
