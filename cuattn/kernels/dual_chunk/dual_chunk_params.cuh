// What a dual-chunk kernel is told besides its arrays; packed by cuattn/ops/dual_chunk/launch.py.
#pragma once
#include "attention/attention_params.cuh"
#include "rotary/rope.cuh"

template <typename Real>
struct DualChunkParams : AttentionParams<Real> {
    TableLayout tables;     // of cosines and sines
    long long far_position;  // that queries have no position beyond: min(2 L - 1, C)
    int chunk_length;       // L = C - W: keys of a chunk
    int num_tiles;          // of the queries of a head, where sequences are not packed
    int num_pairs;          // that RoPE turns
    int rotary_vectors;     // 1: in units of 16 bytes
};
