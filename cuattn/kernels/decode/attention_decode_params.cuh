// What a decode kernel is told besides its arrays; packed by cuattn/ops/decode/params.py.
//
// Of the fields of a forward pass: `k` and `v` are strides of cached rows, their `batch` the stride from page to page
// (or from batch entry to batch entry of a contiguous cache), in stored items, two numbers each where a format packs
// two; seqlen_k is the capacity of a sequence, which no length may exceed.
#pragma once
#include "attention/attention_params.cuh"
#include "rotary/rope.cuh"

template <typename Real>
struct DecodeParams : AttentionParams<Real> {
    RowStrides k_scale, v_scale;    // of g_k_scale, g_v_scale: page, slot, head; 0 along an axis without scales
    RowStrides k_blocks, v_blocks;  // of the block scales of a row: page, slot, head
    long long table_stride;         // from one sequence's block table to the next
    TableLayout tables;             // of cosines and sines
    int batch;
    int page_size, num_pages;          // page_size = seqlen_k, num_pages = batch for a contiguous cache
    unsigned page_magic;               // key / page_size = key * page_magic >> page_shift, for keys below 2^31
    int page_shift;
    int num_splits;                    // of every sequence, where no list says it
    int work_columns;                  // of g_work: decode_block.cuh
    int tokens_per_block, heads_per_block;
    unsigned heads_inverse;            // row / heads_per_block = row * heads_inverse >> 16, for rows below 512
    int num_pairs;                     // that RoPE turns
    int rotary_vectors;                // 1: in units of 16 bytes
    int rotate_keys;                   // 1: cached keys are turned too, by their index
};
