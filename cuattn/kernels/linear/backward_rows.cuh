// What the gradients need to know about each query, from the state before its chunk and the keys of the chunk:
//
//     w = scale (sum over j <= i of A_ij + e^(first .. i) q_i z) + eps        A_ij = q_i . k_j, decayed from j to i
//     r = scale / w, 0 where w is;   delta = r (sum over j <= i of A_ij (dout_i . v_j) + e^(first .. i) q_i S dout_i)
//
// and, where a state decays as a whole, what the decays of the chunk get from its queries: with
// W_ij = A_ij r_i (dout_i . v_j - delta_i) and x_i the same for the state before the chunk,
//
//     of_queries_t = sum over i >= t of (sum over j < t of W_ij + x_i)
//
// These sums are taken as they stand here. As differences of what queries and keys get (q dq - k dk, summed from the
// end) they would be the small rest of large numbers, and a reset's would not be 0.
//
// A CTA has an output: backward_blocks.cuh, with one block.
#pragma once
#include "linear/backward_blocks.cuh"

constexpr int TABLE_STRIDE = BLOCK + 1;  // of W: threads walk along rows and along columns

struct RowsSmem {
    union {
        struct {
            SharedBlock q, k, dout, values;  // the latter two: scaled q and k too
        };
        Real table[BLOCK * TABLE_STRIDE];
    };
    union {
        SharedDecay decay;
        Real before[CHANNELS ? BLOCK * BLOCK : 1];
    };
    Real x[BLOCK];
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_rows(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,
    const Real* __restrict__ g_z,
    const Real* __restrict__ g_peaks,
    Real* __restrict__ g_r,
    Real* __restrict__ g_delta,
    Real* __restrict__ g_of_queries,  // [batch, num_outputs, seqlen_q]; null unless whole states decay
    const Params params)
{
    RowsSmem& smem = shared_memory<RowsSmem>();
    const Place place = place_of_cta(params.num_outputs, params.seqlen_q, 1);
    const Chunk& chunk = place.chunk;
    const int batch_idx = place.batch_idx;
    const Heads heads = heads_of_output(params, place.head);
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const long long kept = kept_state(params, batch_idx, heads.state, chunk.index);
    const Element* g_q_rows = rows_of(g_q, params.q, batch_idx, chunk, heads.q);
    const Element* g_dout_rows = rows_of(g_dout, params.dout, batch_idx, chunk, heads.output);
    const Element* g_k_rows = rows_of(g_k, params.k, batch_idx, chunk, heads.k);
    const Element* g_v_rows = rows_of(g_v, params.v, batch_idx, chunk, heads.v);
    if (!CHANNELS) {
        smem.decay.load(decay_of(params, g_decay, batch_idx, heads.state, chunk), params.decay.seq, chunk.num_tokens);
    }

    Block scores, products;  // A, and dout v^T
    scores.clear();
    products.clear();
    Real of_state[ROWS] = {}, of_z[ROWS] = {};  // e^(first .. i) times q S dout and q z: this lane's part
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        const int channel = block * BLOCK, num_channels = params.head_dim - channel;
        const ChannelDecay channels = channel_decay(params, g_decay, batch_idx, heads.state, chunk, channel);
        Block inter;
        inter.clear();
        const Real unit = state_unit(g_peaks + (kept * blocks + block) * blocks_v, 1, blocks_v);
#pragma unroll 1
        for (int block_v = 0; block_v < blocks_v; block_v++) {
            const int value = block_v * BLOCK;
            // SYNC: every warp is done with the blocks that the next ones take the place of.
            __syncthreads();
            load_block(smem.dout, g_dout_rows, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
            load_kept(smem.values, g_s, params, kept, channel, value, unit);
            if (params.causal && block == 0) {
                load_block(smem.k, g_v_rows, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
            }
            blocks_loaded();
            multiply<false, true>(inter, smem.dout, smem.values);
            if (params.causal && block == 0) {
                multiply<false, true>(products, smem.dout, smem.k, causal_window<false>());
            }
        }
        // SYNC: every warp is done with the values in the place of k.
        __syncthreads();
        load_block(smem.q, g_q_rows, params.q.seq, chunk.num_tokens, channel, params.head_dim);
        if (params.causal) load_block(smem.k, g_k_rows, params.k.seq, chunk.num_tokens, channel, params.head_dim);
        if (CHANNELS && ChannelDecay::part() == 0) {
            channels.upwards(0, BLOCK, [&](int i, Real factor) { smem.before[i * BLOCK + threadIdx.x] = factor; });
        }
        blocks_loaded();
        inter.each([&](int r, int c, Real& x) {
            const int row = Block::row(r), column = Block::column(c);
            const Real before = CHANNELS ? smem.before[row * BLOCK + column] : smem.decay.before[row];
            if (before == 0 || column >= num_channels) return;  // nothing is left of the state, whatever it holds
            const Real q = to_real(smem.q[row * STRIDE + column]) * before;
            of_state[r] = fma(q, x * unit, of_state[r]);
            if (params.normalize) of_z[r] = fma(q, g_z[kept * params.head_dim + channel + column], of_z[r]);
        });
        if (!params.causal) continue;
        if (CHANNELS) {
            multiply_decayed<false>(scores, smem.q, smem.k, smem.dout, smem.values, channels);
        } else {
            multiply<false, true>(scores, smem.q, smem.k, causal_window<false>());
        }
    }
    // SYNC: every warp is done with the blocks, whose place the table takes.
    __syncthreads();
    const long long term = first_term(params, batch_idx, heads.output, chunk);
    if (!CHANNELS) smem.decay.apply<false>(scores);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = Block::row(r);
        Real below = 0, above = 0;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            below += scores.at(r, c);
            above = fma(scores.at(r, c), products.at(r, c), above);
        }
        const Real x = row_sum(of_state[r]), of_keys = row_sum(of_z[r]);
        below = row_sum(below) + of_keys;
        above = row_sum(above) + x;
        Real factor = params.scale, delta = 0;
        if (params.normalize) {
            const Real w = fma(params.scale, below, params.eps);
            factor = w == 0 ? Real(0) : params.scale / w;
            delta = factor * above;
            if (first_of_row() && row < chunk.num_tokens) {
                g_r[term + row] = factor;
                g_delta[term + row] = delta;
            }
        }
        if (g_of_queries == nullptr) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int column = Block::column(c);
            smem.table[row * TABLE_STRIDE + column] =
                column < row ? scores.at(r, c) * factor * (products.at(r, c) - delta) : Real(0);
        }
        if (first_of_row()) smem.x[row] = factor * (x - delta * of_keys);
    }
    if (g_of_queries == nullptr) return;
    // SYNC: W and x are there for all.
    __syncthreads();
    const int t = threadIdx.x;
    if (t < BLOCK) {
        Real sum = 0;
        for (int j = 0; j < BLOCK; j++) {
            const Real w = smem.table[t * TABLE_STRIDE + j];
            smem.table[t * TABLE_STRIDE + j] = sum;
            sum += w;
        }
    }
    // SYNC: the sums over keys before each token are there for all.
    __syncthreads();
    if (t < chunk.num_tokens) {
        Real sum = 0;
        for (int i = chunk.num_tokens - 1; i >= t; i--) sum += smem.table[i * TABLE_STRIDE + t] + smem.x[i];
        g_of_queries[term + t] = sum;
    }
}
