// dk of a block of channels of a chunk, of one key head:
//
//     dk_j = sum over states of e^(j + 1 .. last) (dS v_j + dz) + sum over outputs and i >= j of T_ij q_i
//
// with T_ij = r_i (dout_i . v_j - delta_i), decayed from j to i: by itself where a state decays as a whole, and channel
// by channel in the products with q otherwise (backward_levels.cuh). The decays get from the keys, with Y_j what k_j
// gets times k_j, what is told there, and the sum over all j < t of the chunk for what comes from behind it. What
// queries give, and what goes through the chunk, is added here for decays of channels, whose gradient is then complete;
// backward_decay.cuh does it for the others.
//
// A CTA has a key head: backward_blocks.cuh.
#pragma once
#include "linear/backward_levels.cuh"

struct KeysSmem : GradientSmem {
    SharedTerms terms;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_dk(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,  // gradients of states by now, and z and peaks
    const Real* __restrict__ g_z,
    const Real* __restrict__ g_peaks,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    const Real* __restrict__ g_through,     // of the walk; null without decay
    const Real* __restrict__ g_of_queries,  // of dq; null unless channels decay
    const Element* __restrict__ g_raw_k,    // before the feature map
    Element* __restrict__ g_dk,
    Real* __restrict__ g_of_keys,  // [blocks of channels, batch, num_states, seqlen_k]; null unless whole states decay
    Real* __restrict__ g_ddecay,   // [batch, seqlen_k, num_states, head_dim]; null unless channels decay
    const int batch,
    const Params params)
{
    KeysSmem& smem = shared_memory<KeysSmem>();
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const int outputs_per_state = params.num_outputs / params.num_states;
    const Place place = place_of_cta(params.num_states / params.states_per_k_head, params.seqlen_k, blocks);
    const Chunk& chunk = place.chunk;
    const int batch_idx = place.batch_idx;
    const int channel = place.block * BLOCK, num_channels = params.head_dim - channel;
    const Element* g_k_rows = rows_of(g_k, params.k, batch_idx, chunk, place.head) + channel;
    const int column = ChannelDecay::column();
    auto key = [&](int j) {  // of this thread's channel
        const bool exists = j < chunk.num_tokens && column < num_channels;
        return exists ? to_real(g_k_rows[j * params.k.seq + column]) : Real(0);
    };

    Block acc;
    acc.clear();
#pragma unroll 1
    for (int of_head = 0; of_head < params.states_per_k_head; of_head++) {
        const int state = place.head * params.states_per_k_head + of_head;
        const long long kept = kept_state(params, batch_idx, state, chunk.index);
        const ChannelDecay channels = channel_decay(params, g_decay, batch_idx, state, chunk, channel);
        const Element* g_v_rows = rows_of(g_v, params.v, batch_idx, chunk, heads_of_state(params, state).v);
        // SYNC: every warp is done with all of the state before.
        __syncthreads();
        if constexpr (CHANNELS) {
            if (ChannelDecay::part() == 0) {
                channels.downwards(0, BLOCK, [&](int j, Real x) { smem.moved[j * BLOCK + threadIdx.x] = x; });
            }
        } else {
            smem.decay.load(decay_of(params, g_decay, batch_idx, state, chunk), params.decay.seq, chunk.num_tokens);
        }
        Block inter;
        inter.clear();
        const Real state_units = state_unit(g_peaks + (kept * blocks + place.block) * blocks_v, 1, blocks_v);
#pragma unroll 1
        for (int block_v = 0; block_v < blocks_v; block_v++) {
            const int value = block_v * BLOCK;
            // SYNC: every warp is done with the blocks before.
            __syncthreads();
            load_block(smem.left, g_v_rows, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
            load_kept(smem.right, g_s, params, kept, channel, value, state_units);
            blocks_loaded();
            multiply<false, true>(inter, smem.left, smem.right);
        }
        inter.each([&](int r, int c, Real& x) {
            const int row = Block::row(r), col = Block::column(c);
            Real after;
            if constexpr (CHANNELS) {
                after = smem.moved[row * BLOCK + col];
            } else {
                after = smem.decay.after[row];
            }
            Real dz = 0;
            if (params.normalize && col < num_channels) dz = g_z[kept * params.head_dim + channel + col];
            x = after == 0 || row >= chunk.num_tokens ? Real(0) : after * fma(x, state_units, dz);
            acc.at(r, c) += x;
            if constexpr (CHANNELS) smem.moved[row * BLOCK + col] = x;
        });
        if (!params.causal) continue;
        if constexpr (!CHANNELS) {
            if (g_of_keys != nullptr) {
                // SYNC: every warp is done with the blocks before.
                __syncthreads();
                load_block(smem.left, g_k_rows, params.k.seq, chunk.num_tokens, 0, num_channels);
                blocks_loaded();
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    Real sum = 0;
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        sum = fma(to_real(smem.left[Block::row(r) * STRIDE + Block::column(c)]), inter.at(r, c), sum);
                    }
                    sum = row_sum(sum);
                    if (first_of_row()) smem.of_row[Block::row(r)] = sum;
                }
                // SYNC: what each key gets from behind the chunk is there for all.
                __syncthreads();
                const int t = threadIdx.x;
                if (t < chunk.num_tokens) {
                    Real sum = 0;
                    for (int j = 0; j < t; j++) sum += smem.of_row[j];
                    const long long head =
                        (static_cast<long long>(place.block) * batch + batch_idx) * params.num_states + state;
                    g_of_keys[head * params.seqlen_k + chunk.first + t] = sum;
                }
            }
        } else {
            // SYNC: what keys get from behind the chunk is there for all.
            __syncthreads();
            if (ChannelDecay::part() == 0) {
                Real through = 0;
                for (int block_v = 0; block_v < blocks_v && column < num_channels; block_v++) {
                    through += g_through[(kept * blocks_v + block_v) * params.head_dim + channel + column];
                }
                sum_moved<true>(smem, 0, BLOCK, key, [&](Real& of_decay, Real sum) { of_decay = through + sum; });
            }
        }
#pragma unroll 1
        for (int o = 0; o < outputs_per_state; o++) {
            const Heads heads = heads_of_output(params, state * outputs_per_state + o);
            const long long term = first_term(params, batch_idx, heads.output, chunk);
            const Element* g_q_rows = rows_of(g_q, params.q, batch_idx, chunk, heads.q);
            const Element* g_dout_rows = rows_of(g_dout, params.dout, batch_idx, chunk, heads.output);
            Block products;  // rows are keys
            products.clear();
#pragma unroll 1
            for (int block_v = 0; block_v < blocks_v; block_v++) {
                const int value = block_v * BLOCK;
                // SYNC: every warp is done with the blocks before.
                __syncthreads();
                load_block(smem.left, g_v_rows, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
                load_block(smem.right, g_dout_rows, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
                blocks_loaded();
                multiply<false, true>(products, smem.left, smem.right, causal_window<true>());
            }
            const Real unit = smem.terms.load(params.normalize ? g_r + term : nullptr, g_delta + term, params.scale,
                                              chunk.num_tokens);
            load_block(smem.left, g_q_rows, params.q.seq, chunk.num_tokens, channel, params.head_dim);
            products.each([&](int r, int c, Real& x) {
                const int row = Block::row(r), query = Block::column(c);
                x = (x - smem.terms.delta[query]) * smem.terms.r[query];
                if (CHANNELS && query == row) smem.of_row[row] = x * unit;
            });
            if constexpr (!CHANNELS) {
                smem.decay.apply<true>(products);
                products.store(smem.third);
            }
            blocks_loaded();
            if constexpr (!CHANNELS) {
                inter.clear();
                multiply<false, false>(inter, smem.third, smem.left, WHOLE, causal_window<true>());
                acc.each([&](int r, int c, Real& x) { x = fma(unit, inter.at(r, c), x); });
            } else {
                each_of_decay(smem, chunk.num_tokens, num_channels, [&](int row, int col, Real& x) {
                    x += g_of_queries[(term + row) * params.head_dim + channel + col];
                });
                add_decayed<true>(acc, products, smem, channels, [&](int) { return unit; }, key);
            }
        }
        if constexpr (CHANNELS) {
            // SYNC: all that the decays get is there.
            __syncthreads();
            const long long first_token = static_cast<long long>(batch_idx) * params.seqlen_k + chunk.first;
            each_of_decay(smem, chunk.num_tokens, num_channels, [&](int row, int col, Real x) {
                const long long token = first_token + row;
                g_ddecay[(token * params.num_states + state) * params.head_dim + channel + col] = x;
            });
        }
    }
    store_gradient(rows_of(g_dk, params.dk, batch_idx, chunk, place.head) + channel, params.dk.seq,
                   rows_of(g_raw_k, params.raw_k, batch_idx, chunk, place.head) + channel, params.raw_k.seq, acc,
                   chunk.num_tokens, num_channels, params.feature_map);
}
