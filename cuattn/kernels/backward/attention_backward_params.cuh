// What a kernel of the backward pass is told about a problem: what the forward was told, and where gradients lie.
#pragma once
#include "attention/attention_params.cuh"

template <typename Real>
struct AttentionBackwardParams : AttentionParams<Real> {
    RowStrides dout, dq, dk, dv;
};
