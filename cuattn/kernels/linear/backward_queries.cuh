// dq of a block of channels of a chunk, of one query head:
//
//     dq_i = sum over outputs of r_i (e^(first .. i) (S dout_i - delta_i z) + sum over j <= i of T_ij k_j)
//
// with T_ij = dout_i . v_j - delta_i, decayed from j to i: by itself where a state decays as a whole, and channel by
// channel in the products with k otherwise (backward_levels.cuh). There the decays get from the queries what is told
// there, X_i what q_i gets at a level times q_i, and the sum over all i >= t of the chunk for what comes from the state
// before it.
//
// A CTA has a query head: backward_blocks.cuh.
#pragma once
#include "linear/backward_levels.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_dq(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,
    const Real* __restrict__ g_z,
    const Real* __restrict__ g_peaks,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    const Element* __restrict__ g_raw_q,  // before the feature map
    Element* __restrict__ g_dq,
    Real* __restrict__ g_of_queries,  // [batch, num_outputs, seqlen_q, head_dim]; null unless channels decay
    const Params params)
{
    GradientSmem& smem = shared_memory<GradientSmem>();
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const Place place = place_of_cta(params.num_outputs / params.outputs_per_q_head, params.seqlen_q, blocks);
    const Chunk& chunk = place.chunk;
    const int batch_idx = place.batch_idx;
    const int channel = place.block * BLOCK, num_channels = params.head_dim - channel;
    const Element* g_q_rows = rows_of(g_q, params.q, batch_idx, chunk, place.head) + channel;
    const int column = ChannelDecay::column();
    auto query = [&](int i) {  // of this thread's channel
        const bool exists = i < chunk.num_tokens && column < num_channels;
        return exists ? to_real(g_q_rows[i * params.q.seq + column]) : Real(0);
    };

    Block acc;
    acc.clear();
#pragma unroll 1
    for (int o = 0; o < params.outputs_per_q_head; o++) {
        const Heads heads = heads_of_output(params, place.head * params.outputs_per_q_head + o);
        const long long kept = kept_state(params, batch_idx, heads.state, chunk.index);
        const long long term = first_term(params, batch_idx, heads.output, chunk);
        const ChannelDecay channels = channel_decay(params, g_decay, batch_idx, heads.state, chunk, channel);
        const Element* g_dout_rows = rows_of(g_dout, params.dout, batch_idx, chunk, heads.output);
        const Element* g_k_rows = rows_of(g_k, params.k, batch_idx, chunk, heads.k);
        const Element* g_v_rows = rows_of(g_v, params.v, batch_idx, chunk, heads.v);
        // SYNC: every warp is done with the decays of the output before.
        __syncthreads();
        if (!CHANNELS) {
            smem.decay.load(decay_of(params, g_decay, batch_idx, heads.state, chunk), params.decay.seq,
                            chunk.num_tokens);
        }
        Block inter, products;
        inter.clear();
        products.clear();
        const Real unit = state_unit(g_peaks + (kept * blocks + place.block) * blocks_v, 1, blocks_v);
#pragma unroll 1
        for (int block_v = 0; block_v < blocks_v; block_v++) {
            const int value = block_v * BLOCK;
            // SYNC: every warp is done with the blocks before.
            __syncthreads();
            load_block(smem.left, g_dout_rows, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
            if (params.causal) {
                load_block(smem.right, g_v_rows, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
            }
            load_kept(smem.third, g_s, params, kept, channel, value, unit);
            blocks_loaded();
            multiply<false, true>(inter, smem.left, smem.third);
            if (params.causal) {
                multiply<false, true>(products, smem.left, smem.right, causal_window<false>());
            }
        }
        // SYNC: every warp is done with the blocks before.
        __syncthreads();
        if (params.causal) load_block(smem.left, g_k_rows, params.k.seq, chunk.num_tokens, channel, params.head_dim);
        if constexpr (CHANNELS) {
            if (ChannelDecay::part() == 0) {
                channels.upwards(0, BLOCK, [&](int i, Real x) { smem.moved[i * BLOCK + threadIdx.x] = x; });
            }
        }
        blocks_loaded();
        Real factor[ROWS], delta[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = Block::row(r);
            const bool exists = row < chunk.num_tokens;
            factor[r] = !exists ? Real(0) : params.normalize ? g_r[term + row] : params.scale;
            delta[r] = exists && params.normalize ? g_delta[term + row] : Real(0);
        }
        inter.each([&](int r, int c, Real& x) {
            const int row = Block::row(r), col = Block::column(c);
            Real before;
            if constexpr (CHANNELS) {
                before = smem.moved[row * BLOCK + col];
            } else {
                before = smem.decay.before[row];
            }
            Real z = 0;
            if (params.normalize && col < num_channels) z = g_z[kept * params.head_dim + channel + col];
            x = before == 0 ? Real(0) : factor[r] * before * (x * unit - delta[r] * z);
            acc.at(r, c) += x;
            if constexpr (CHANNELS) smem.moved[row * BLOCK + col] = x;
        });
        if (!params.causal) continue;
        if constexpr (!CHANNELS) {
            products.each([&](int r, int, Real& x) { x -= delta[r]; });
            smem.decay.apply<false>(products);
            products.store(smem.third);
            // SYNC: a warp reads the rows that it has written.
            __syncwarp();
            inter.clear();
            multiply<false, false>(inter, smem.third, smem.left, WHOLE, causal_window<false>());
            acc.each([&](int r, int c, Real& x) { x = fma(factor[r], inter.at(r, c), x); });
        } else {
            // SYNC: what queries get from the state is there for all.
            __syncthreads();
            if (ChannelDecay::part() == 0) {
                sum_moved<false>(smem, 0, BLOCK, query, [](Real& of_decay, Real sum) { of_decay = sum; });
            }
            products.each([&](int r, int c, Real& x) {
                const int row = Block::row(r);
                x -= delta[r];
                if (row == Block::column(c)) smem.of_row[row] = x * factor[r];
            });
            // SYNC: the diagonal of T is there; what queries get from the state has been read.
            __syncthreads();
            add_decayed<false>(acc, products, smem, channels, [&](int r) { return factor[r]; }, query);
            // SYNC: all that the decays get is there.
            __syncthreads();
            each_of_decay(smem, chunk.num_tokens, num_channels, [&](int row, int col, Real x) {
                g_of_queries[(term + row) * params.head_dim + channel + col] = x;
            });
        }
    }
    store_gradient(rows_of(g_dq, params.dq, batch_idx, chunk, place.head) + channel, params.dq.seq,
                   rows_of(g_raw_q, params.raw_q, batch_idx, chunk, place.head) + channel, params.raw_q.seq, acc,
                   chunk.num_tokens, num_channels, params.feature_map);
}
