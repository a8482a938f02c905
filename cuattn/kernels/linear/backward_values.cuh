// dv of a block of columns of a chunk, of one value head:
//
//     dv_j = sum over states of (e^(j + 1 .. last) k_j) dS + sum over outputs and i >= j of A_ij r_i dout_i
//
// with A_ij = q_i . k_j, decayed from j to i.
//
// A CTA has a value head: backward_blocks.cuh.
#pragma once
#include "linear/backward_blocks.cuh"

struct ValuesSmem {
    SharedBlock keys, third;         // k; dS or q, then A
    SharedBlock scaled_q, scaled_k;  // without channels dS in place of the first; dout in that of the second
    SharedDecay decay;
    SharedTerms terms;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_dv(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,  // gradients of states by now, and peaks
    const Real* __restrict__ g_peaks,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    Element* __restrict__ g_dv,
    const Params params)
{
    ValuesSmem& smem = shared_memory<ValuesSmem>();
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const int outputs_per_state = params.num_outputs / params.num_states;
    const Place place = place_of_cta(params.num_states / params.states_per_v_head, params.seqlen_k, blocks_v);
    const Chunk& chunk = place.chunk;
    const int batch_idx = place.batch_idx;
    const int value = place.block * BLOCK, num_values = params.head_dim_v - value;

    Block acc;
    acc.clear();
#pragma unroll 1
    for (int of_head = 0; of_head < params.states_per_v_head; of_head++) {
        const int state = place.head * params.states_per_v_head + of_head;
        const long long kept = kept_state(params, batch_idx, state, chunk.index);
        const Element* g_k_rows = rows_of(g_k, params.k, batch_idx, chunk, heads_of_state(params, state).k);
        // SYNC: every warp is done with all of the state before.
        __syncthreads();
        if (!CHANNELS) {
            smem.decay.load(decay_of(params, g_decay, batch_idx, state, chunk), params.decay.seq, chunk.num_tokens);
        }
        Block inter;
        inter.clear();
        const Real state_units = state_unit(g_peaks + kept * blocks * blocks_v + place.block, blocks_v, blocks);
        // From behind the chunk: for channels a walk of its own, as its keys are scaled; else beside the first output.
        auto load_gradient = [&](Element* s_block, int channel) {
            load_kept(s_block, g_s, params, kept, channel, value, state_units);
        };
        // Whether anything of a key is left behind the chunk, in channels of either warp of them. If not, what is there
        // is not felt, whatever it is. The terms of outputs take the place of these.
        auto reaches = [&](int row) {
            return smem.terms.r[row] != 0 || BLOCK > WARP_SIZE && smem.terms.delta[row] != 0;
        };
        auto from_behind = [&] {
            acc.each([&](int r, int c, Real& x) {
                const int row = Block::row(r);
                const Real of_decay = !CHANNELS ? smem.decay.after[row] : reaches(row) ? Real(1) : Real(0);
                x = of_decay == 0 ? x : fma(state_units * of_decay, inter.at(r, c), x);
            });
        };
        if (CHANNELS || !params.causal) {
#pragma unroll 1
            for (int block = 0; block < blocks; block++) {
                const int channel = block * BLOCK;
                // SYNC: every warp is done with the blocks before; and the decays are there for all.
                __syncthreads();
                load_block(smem.keys, g_k_rows, params.k.seq, chunk.num_tokens, channel, params.head_dim);
                load_gradient(smem.third, channel);
                blocks_loaded();
                if (CHANNELS) {
                    const ChannelDecay channels = channel_decay(params, g_decay, batch_idx, state, chunk, channel);
                    if (ChannelDecay::part() == 0) {
                        Real* s_reach = threadIdx.x < WARP_SIZE ? smem.terms.r : smem.terms.delta;
                        channels.downwards(0, BLOCK, [&](int t, Real x) {
                            Element& element = smem.keys[t * STRIDE + threadIdx.x];
                            from_real(to_real(element) * x, element);
                            const bool left = __any_sync(0xffffffff, channels.g_column != nullptr && x != 0);
                            if (lane_index() == 0 && (left || block == 0)) s_reach[t] = left;
                        });
                    }
                    // SYNC: the scaled keys are there for all.
                    __syncthreads();
                }
                multiply<false, false>(inter, smem.keys, smem.third);
            }
            from_behind();
        }
        if (!params.causal) continue;
#pragma unroll 1
        for (int o = 0; o < outputs_per_state; o++) {
            const Heads heads = heads_of_output(params, state * outputs_per_state + o);
            const long long term = first_term(params, batch_idx, heads.output, chunk);
            const Element* g_q_rows = rows_of(g_q, params.q, batch_idx, chunk, heads.q);
            const Element* g_dout_rows = rows_of(g_dout, params.dout, batch_idx, chunk, heads.output);
            const bool with_state = !CHANNELS && o == 0;
            Block scores;  // rows are keys
            scores.clear();
#pragma unroll 1
            for (int block = 0; block < blocks; block++) {
                const int channel = block * BLOCK;
                // SYNC: every warp is done with the blocks before; and the decays are there for all.
                __syncthreads();
                load_block(smem.keys, g_k_rows, params.k.seq, chunk.num_tokens, channel, params.head_dim);
                load_block(smem.third, g_q_rows, params.q.seq, chunk.num_tokens, channel, params.head_dim);
                if (with_state) load_gradient(smem.scaled_q, channel);
                blocks_loaded();
                if (CHANNELS) {
                    multiply_decayed<true>(
                        scores, smem.third, smem.keys, smem.scaled_q, smem.scaled_k,
                        channel_decay(params, g_decay, batch_idx, state, chunk, channel));
                } else {
                    multiply<false, true>(scores, smem.keys, smem.third, causal_window<true>());
                    if (with_state) multiply<false, false>(inter, smem.keys, smem.scaled_q);
                }
            }
            if (with_state) from_behind();
            // SYNC (in load): every warp is done with the blocks whose place A and dout take.
            const Real unit = smem.terms.load(params.normalize ? g_r + term : nullptr, g_delta + term, params.scale,
                                              chunk.num_tokens);
            load_block(smem.scaled_k, g_dout_rows, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
            scores.each([&](int, int c, Real& x) { x *= smem.terms.r[Block::column(c)]; });
            if (!CHANNELS) smem.decay.apply<true>(scores);
            scores.store(smem.third);
            blocks_loaded();
            inter.clear();
            multiply<false, false>(inter, smem.third, smem.scaled_k, WHOLE, causal_window<true>());
            acc.each([&](int r, int c, Real& x) { x = fma(unit, inter.at(r, c), x); });
        }
    }
    Element* g_dv_rows = rows_of(g_dv, params.dv, batch_idx, chunk, place.head) + value;
    acc.each([&](int r, int c, Real& x) {
        const int row = Block::row(r), column = Block::column(c);
        if (row < chunk.num_tokens && column < num_values) from_real(x, g_dv_rows[row * params.dv.seq + column]);
    });
}
