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
// Grid: x = (batch_idx * num_outputs + output) * chunks + chunk.
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

struct RowsArrays {
    const Element *dout, *q, *k, *v;
    const Real* decay;
    const Real *s, *z, *peaks;
    Real *r, *delta;   // [batch, num_outputs, seqlen_q]
    Real* of_queries;  // likewise; null where no decay of whole states asks
};

__device__ __forceinline__ void query_rows(const RowsArrays& arrays, const Params& params, RowsSmem& smem) {
    const int num_chunks = num_blocks(params.seqlen_q);
    const Chunk chunk(blockIdx.x % num_chunks, params.seqlen_q);
    const unsigned row_of_heads = blockIdx.x / num_chunks;
    const int batch_idx = row_of_heads / params.num_outputs;
    const Heads heads = heads_of_output(params, row_of_heads % params.num_outputs);
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const long long kept = kept_state(params, batch_idx, heads.state, chunk.index);
    const long long state_size = static_cast<long long>(params.head_dim) * params.head_dim_v;
    const long long first = chunk.first;
    const Element* g_q = arrays.q + batch_idx * params.q.batch + first * params.q.seq + heads.q * params.q.head;
    const Element* g_dout =
        arrays.dout + batch_idx * params.dout.batch + first * params.dout.seq + heads.output * params.dout.head;
    const Element* g_k = arrays.k + batch_idx * params.k.batch + first * params.k.seq + heads.k * params.k.head;
    const Element* g_v = arrays.v + batch_idx * params.v.batch + first * params.v.seq + heads.v * params.v.head;
    if (!CHANNELS) {
        smem.decay.load(decay_of(params, arrays.decay, batch_idx, heads.state, chunk), params.decay.seq,
                        chunk.num_tokens);
    }

    Block scores, products;  // A, and dout v^T
    scores.clear();
    products.clear();
    Real of_state[ROWS] = {}, of_z[ROWS] = {};  // e^(first .. i) times q S dout and q z: this lane's part
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        const int channel = block * BLOCK, num_channels = params.head_dim - channel;
        const ChannelDecay channels = channel_decay(params, arrays.decay, batch_idx, heads.state, chunk, channel);
        Block inter;
        inter.clear();
        const Real unit = state_unit(arrays.peaks + (kept * blocks + block) * blocks_v, 1, blocks_v);
#pragma unroll 1
        for (int block_v = 0; block_v < blocks_v; block_v++) {
            const int value = block_v * BLOCK;
            // SYNC: every warp is done with the blocks that the next ones take the place of.
            __syncthreads();
            load_block(smem.dout, g_dout, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
            load_state(smem.values, arrays.s + kept * state_size + static_cast<long long>(channel) * params.head_dim_v +
                       value, params.head_dim_v, num_channels, params.head_dim_v - value, unit);
            if (params.causal && block == 0) {
                load_block(smem.k, g_v, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
            }
            blocks_loaded();
            multiply<false, true>(inter, smem.dout, smem.values);
            if (params.causal && block == 0) {
                multiply<false, true>(products, smem.dout, smem.k, causal_window<false>());
            }
        }
        // SYNC: every warp is done with the values in the place of k.
        __syncthreads();
        load_block(smem.q, g_q, params.q.seq, chunk.num_tokens, channel, params.head_dim);
        if (params.causal) load_block(smem.k, g_k, params.k.seq, chunk.num_tokens, channel, params.head_dim);
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
            if (params.normalize) of_z[r] = fma(q, arrays.z[kept * params.head_dim + channel + column], of_z[r]);
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
    const long long term =
        (static_cast<long long>(batch_idx) * params.num_outputs + heads.output) * params.seqlen_q + chunk.first;
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
                arrays.r[term + row] = factor;
                arrays.delta[term + row] = delta;
            }
        }
        if (arrays.of_queries == nullptr) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int column = Block::column(c);
            smem.table[row * TABLE_STRIDE + column] =
                column < row ? scores.at(r, c) * factor * (products.at(r, c) - delta) : Real(0);
        }
        if (first_of_row()) smem.x[row] = factor * (x - delta * of_keys);
    }
    if (arrays.of_queries == nullptr) return;
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
        arrays.of_queries[term + t] = sum;
    }
}
