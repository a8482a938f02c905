// dq of a block of channels of a chunk, of one query head:
//
//     dq_i = sum over outputs of r_i (e^(first .. i) (S dout_i - delta_i z) + sum over j <= i of T_ij k_j)
//
// with T_ij = dout_i . v_j - delta_i, decayed from j to i: by itself where a state decays as a whole, and channel by
// channel in the products with k otherwise (decay_levels.cuh). There the decays get from the queries, with X_i what q_i
// gets at a level times q_i,
//
//     of_queries_t = sum of X_i over those i >= t that are in the same half of a block of a level, the upper one
//
// and over all i >= t of the chunk for what comes from the state before it.
//
// Grid: x = ((batch_idx * num_heads + head) * chunks + chunk) * blocks of channels + block.
#pragma once
#include "linear/backward_blocks.cuh"

struct QueriesSmem {
    SharedBlock left, right, third;  // dout, v and S; then k, scaled k and T
    SharedDecay decay;
    Real diagonal[BLOCK];
    Real moved[CHANNELS ? BLOCK * BLOCK : 1];     // factors of a level, then what q gets of it
    Real of_decay[CHANNELS ? BLOCK * BLOCK : 1];
};

struct QueriesArrays {
    const Element *dout, *q, *k, *v;
    const Element* raw_q;  // before the feature map
    const Real* decay;
    const Real *s, *z, *peaks;
    const Real *r, *delta;
    Element* dq;
    Real* of_queries;  // [batch, num_outputs, seqlen_q, head_dim]; with decay for each channel
};

__device__ __forceinline__ void gradient_of_queries(const QueriesArrays& arrays, const Params& params,
                                                    QueriesSmem& smem) {
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const int num_chunks = num_blocks(params.seqlen_q), num_heads = params.num_outputs / params.outputs_per_q_head;
    unsigned rest = blockIdx.x;
    const int block = rest % blocks;
    rest /= blocks;
    const Chunk chunk(rest % num_chunks, params.seqlen_q);
    rest /= num_chunks;
    const int q_head = rest % num_heads, batch_idx = rest / num_heads;
    const int channel = block * BLOCK, num_channels = params.head_dim - channel;
    const long long state_size = static_cast<long long>(params.head_dim) * params.head_dim_v;
    const long long first = chunk.first;
    const Element* g_q =
        arrays.q + batch_idx * params.q.batch + first * params.q.seq + q_head * params.q.head + channel;
    const int column = ChannelDecay::column();
    auto query = [&](int i) {  // of this thread's channel
        const bool exists = i < chunk.num_tokens && column < num_channels;
        return exists ? to_real(g_q[i * params.q.seq + column]) : Real(0);
    };

    Block acc;
    acc.clear();
#pragma unroll 1
    for (int o = 0; o < params.outputs_per_q_head; o++) {
        const Heads heads = heads_of_output(params, q_head * params.outputs_per_q_head + o);
        const long long kept = kept_state(params, batch_idx, heads.state, chunk.index);
        const long long term =
            (static_cast<long long>(batch_idx) * params.num_outputs + heads.output) * params.seqlen_q + chunk.first;
        const ChannelDecay channels = channel_decay(params, arrays.decay, batch_idx, heads.state, chunk, channel);
        const Element* g_dout =
            arrays.dout + batch_idx * params.dout.batch + first * params.dout.seq + heads.output * params.dout.head;
        const Element* g_k = arrays.k + batch_idx * params.k.batch + first * params.k.seq + heads.k * params.k.head;
        const Element* g_v = arrays.v + batch_idx * params.v.batch + first * params.v.seq + heads.v * params.v.head;
        // SYNC: every warp is done with the decays of the output before.
        __syncthreads();
        if (!CHANNELS) {
            smem.decay.load(decay_of(params, arrays.decay, batch_idx, heads.state, chunk), params.decay.seq,
                            chunk.num_tokens);
        }
        Block inter, products;
        inter.clear();
        products.clear();
        const Real unit = state_unit(arrays.peaks + (kept * blocks + block) * blocks_v, 1, blocks_v);
#pragma unroll 1
        for (int block_v = 0; block_v < blocks_v; block_v++) {
            const int value = block_v * BLOCK;
            // SYNC: every warp is done with the blocks before.
            __syncthreads();
            load_block(smem.left, g_dout, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
            if (params.causal) {
                load_block(smem.right, g_v, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
            }
            load_state(smem.third, arrays.s + kept * state_size + static_cast<long long>(channel) * params.head_dim_v +
                       value, params.head_dim_v, num_channels, params.head_dim_v - value, unit);
            blocks_loaded();
            multiply<false, true>(inter, smem.left, smem.third);
            if (params.causal) {
                multiply<false, true>(products, smem.left, smem.right, causal_window<false>());
            }
        }
        // SYNC: every warp is done with the blocks before.
        __syncthreads();
        if (params.causal) load_block(smem.left, g_k, params.k.seq, chunk.num_tokens, channel, params.head_dim);
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
            factor[r] = !exists ? Real(0) : params.normalize ? arrays.r[term + row] : params.scale;
            delta[r] = exists && params.normalize ? arrays.delta[term + row] : Real(0);
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
            if (params.normalize && col < num_channels) z = arrays.z[kept * params.head_dim + channel + col];
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
                Real sum = 0;
                for (int i = BLOCK - 1; i >= 0; i--) {
                    sum = fma(query(i), smem.moved[i * BLOCK + column], sum);
                    smem.of_decay[i * BLOCK + column] = sum;
                }
            }
            products.each([&](int r, int c, Real& x) {
                const int row = Block::row(r), col = Block::column(c);
                x -= delta[r];
                if (row == col) smem.diagonal[row] = x * factor[r];
            });
            // SYNC: the diagonal of T is there; what queries get from the state has been read.
            __syncthreads();
            acc.each([&](int r, int c, Real& x) {
                const int row = Block::row(r);
                x = fma(smem.diagonal[row], to_real(smem.left[row * STRIDE + Block::column(c)]), x);
            });
#pragma unroll 1
            for (int level = 0; level < LEVELS; level++) {
                // SYNC: every thread is done with the blocks of the level before.
                __syncthreads();
                channels.at(
                    level,
                    [&](int i, Real x) {
                        smem.moved[i * BLOCK + column] = x;
                        from_real(Real(0), smem.right[i * STRIDE + column]);
                    },
                    [&](int j, Real x) {
                        from_real(to_real(smem.left[j * STRIDE + column]) * x, smem.right[j * STRIDE + column]);
                    });
                const Window window = window_of<false>(level);
                each_in(products, window, [&](int r, int c, Real& x) {  // no other terms are multiplied
                    const int row = Block::row(r), col = Block::column(c);
                    from_real(at_level(row, col, level) ? x : Real(0), smem.third[row * STRIDE + col]);
                });
                // SYNC: the scaled keys and T are there for all.
                __syncthreads();
                inter.clear();
                multiply<false, false>(inter, smem.third, smem.right, WHOLE, window);
                inter.each([&](int r, int c, Real& x) {
                    const int row = Block::row(r);
                    if (!(row >> level & 1)) return;
                    Real& moved = smem.moved[row * BLOCK + Block::column(c)];
                    moved *= factor[r] * x;
                    acc.at(r, c) += moved;
                });
                // SYNC: what queries get at this level is there for all.
                __syncthreads();
                const int half = 1 << level;
                for (int task = 2 * ChannelDecay::part() + 1; task < BLOCK / half; task += 2 * ChannelDecay::PARTS) {
                    Real sum = 0;
                    for (int i = (task + 1) * half - 1; i >= task * half; i--) {
                        sum = fma(query(i), smem.moved[i * BLOCK + column], sum);
                        smem.of_decay[i * BLOCK + column] += sum;
                    }
                }
            }
            // SYNC: all that the decays get is there.
            __syncthreads();
            for (int i = threadIdx.x; i < BLOCK * BLOCK; i += NUM_THREADS) {
                const int row = i / BLOCK, col = i % BLOCK;
                if (row < chunk.num_tokens && col < num_channels) {
                    arrays.of_queries[(term + row) * params.head_dim + channel + col] = smem.of_decay[i];
                }
            }
        }
    }
    store_gradient(arrays.dq + batch_idx * params.dq.batch + first * params.dq.seq + q_head * params.dq.head + channel,
                   params.dq.seq,
                   arrays.raw_q + batch_idx * params.raw_q.batch + first * params.raw_q.seq +
                       q_head * params.raw_q.head + channel,
                   params.raw_q.seq, acc, chunk.num_tokens, num_channels, params.feature_map);
}
