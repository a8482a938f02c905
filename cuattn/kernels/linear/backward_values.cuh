// dv of a block of columns of a chunk, of one value head:
//
//     dv_j = sum over states of (e^(j + 1 .. last) k_j) dS + sum over outputs and i >= j of A_ij r_i dout_i
//
// with A_ij = q_i . k_j, decayed from j to i.
//
// Grid: x = ((batch_idx * num_v_heads + head) * chunks + chunk) * blocks of values + block.
#pragma once
#include "linear/backward_blocks.cuh"

struct ValuesSmem {
    SharedBlock keys, third;         // k; dS or q, then A
    SharedBlock scaled_q, scaled_k;  // without channels dS in place of the first; dout in that of the second
    SharedDecay decay;
    SharedTerms terms;
};

struct ValuesArrays {
    const Element *dout, *q, *k;
    const Real* decay;
    const Real *s, *peaks;  // gradients of states by now
    const Real *r, *delta;
    Element* dv;
};

__device__ __forceinline__ void gradient_of_values(const ValuesArrays& arrays, const Params& params,
                                                   ValuesSmem& smem) {
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const int num_chunks = num_blocks(params.seqlen_k), num_heads = params.num_states / params.states_per_v_head;
    const int outputs_per_state = params.num_outputs / params.num_states;
    unsigned rest = blockIdx.x;
    const int block_v = rest % blocks_v;
    rest /= blocks_v;
    const Chunk chunk(rest % num_chunks, params.seqlen_k);
    rest /= num_chunks;
    const int v_head = rest % num_heads, batch_idx = rest / num_heads;
    const int value = block_v * BLOCK, num_values = params.head_dim_v - value;
    const long long state_size = static_cast<long long>(params.head_dim) * params.head_dim_v;
    const long long first = chunk.first;

    Block acc;
    acc.clear();
#pragma unroll 1
    for (int of_head = 0; of_head < params.states_per_v_head; of_head++) {
        const int state = v_head * params.states_per_v_head + of_head;
        const long long kept = kept_state(params, batch_idx, state, chunk.index);
        const Element* g_k = arrays.k + batch_idx * params.k.batch + first * params.k.seq +
                             heads_of_state(params, state).k * params.k.head;
        // SYNC: every warp is done with all of the state before.
        __syncthreads();
        if (!CHANNELS) {
            smem.decay.load(decay_of(params, arrays.decay, batch_idx, state, chunk), params.decay.seq,
                            chunk.num_tokens);
        }
        Block inter;
        inter.clear();
        const Real state_units = state_unit(arrays.peaks + kept * blocks * blocks_v + block_v, blocks_v, blocks);
        // From behind the chunk: for channels a walk of its own, as its keys are scaled; else beside the first output.
        auto load_gradient = [&](Element* s_block, int channel) {
            load_state(s_block, arrays.s + kept * state_size + static_cast<long long>(channel) * params.head_dim_v +
                       value, params.head_dim_v, params.head_dim - channel, num_values, state_units);
        };
        auto from_behind = [&] {
            acc.each([&](int r, int c, Real& x) {
                const Real of_decay = CHANNELS ? Real(1) : smem.decay.after[Block::row(r)];
                x = of_decay == 0 ? x : fma(state_units * of_decay, inter.at(r, c), x);
            });
        };
        if (CHANNELS || !params.causal) {
#pragma unroll 1
            for (int block = 0; block < blocks; block++) {
                const int channel = block * BLOCK;
                // SYNC: every warp is done with the blocks before; and the decays are there for all.
                __syncthreads();
                load_block(smem.keys, g_k, params.k.seq, chunk.num_tokens, channel, params.head_dim);
                load_gradient(smem.third, channel);
                blocks_loaded();
                if (CHANNELS) {
                    const ChannelDecay channels = channel_decay(params, arrays.decay, batch_idx, state, chunk, channel);
                    if (ChannelDecay::part() == 0) {
                        channels.downwards(0, BLOCK, [&](int t, Real x) {
                            Element& element = smem.keys[t * STRIDE + threadIdx.x];
                            from_real(to_real(element) * x, element);
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
            const long long term =
                (static_cast<long long>(batch_idx) * params.num_outputs + heads.output) * params.seqlen_q + chunk.first;
            const Element* g_q = arrays.q + batch_idx * params.q.batch + first * params.q.seq + heads.q * params.q.head;
            const Element* g_dout =
                arrays.dout + batch_idx * params.dout.batch + first * params.dout.seq + heads.output * params.dout.head;
            const bool with_state = !CHANNELS && o == 0;
            Block scores;  // rows are keys
            scores.clear();
#pragma unroll 1
            for (int block = 0; block < blocks; block++) {
                const int channel = block * BLOCK;
                // SYNC: every warp is done with the blocks before; and the decays are there for all.
                __syncthreads();
                load_block(smem.keys, g_k, params.k.seq, chunk.num_tokens, channel, params.head_dim);
                load_block(smem.third, g_q, params.q.seq, chunk.num_tokens, channel, params.head_dim);
                if (with_state) load_gradient(smem.scaled_q, channel);
                blocks_loaded();
                if (CHANNELS) {
                    multiply_decayed<true>(
                        scores, smem.third, smem.keys, smem.scaled_q, smem.scaled_k,
                        channel_decay(params, arrays.decay, batch_idx, state, chunk, channel));
                } else {
                    multiply<false, true>(scores, smem.keys, smem.third, causal_window<true>());
                    if (with_state) multiply<false, false>(inter, smem.keys, smem.scaled_q);
                }
            }
            if (with_state) from_behind();
            // SYNC (in load): every warp is done with the blocks whose place A and dout take.
            const Real unit = smem.terms.load(params.normalize ? arrays.r + term : nullptr, arrays.delta + term,
                                              params.scale, chunk.num_tokens);
            load_block(smem.scaled_k, g_dout, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
            scores.each([&](int, int c, Real& x) { x *= smem.terms.r[Block::column(c)]; });
            if (!CHANNELS) smem.decay.apply<true>(scores);
            scores.store(smem.third);
            blocks_loaded();
            inter.clear();
            multiply<false, false>(inter, smem.third, smem.scaled_k, WHOLE, causal_window<true>());
            acc.each([&](int r, int c, Real& x) { x = fma(unit, inter.at(r, c), x); });
        }
    }
    Element* g_dv = arrays.dv + batch_idx * params.dv.batch + first * params.dv.seq + v_head * params.dv.head + value;
    acc.each([&](int r, int c, Real& x) {
        const int row = Block::row(r), column = Block::column(c);
        if (row < chunk.num_tokens && column < num_values) from_real(x, g_dv[row * params.dv.seq + column]);
    });
}
