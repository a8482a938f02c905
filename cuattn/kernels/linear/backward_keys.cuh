// dk of a block of channels of a chunk, of one key head:
//
//     dk_j = sum over states of e^(j + 1 .. last) (dS v_j + dz) + sum over outputs and i >= j of T_ij q_i
//
// with T_ij = r_i (dout_i . v_j - delta_i), decayed from j to i: by itself where a state decays as a whole, and channel
// by channel in the products with q otherwise (decay_levels.cuh). The decays get from the keys, with Y_j what k_j gets
// at a level times k_j,
//
//     of_keys_t = sum of Y_j over those j < t that are in the same half of a block of a level, the lower one
//
// and over all j < t of the chunk for what comes from behind it. What queries give, and what goes through the chunk, is
// added here for decays of channels, whose gradient is then complete; backward_decay.cuh does it for the others.
//
// Grid: x = ((batch_idx * num_k_heads + head) * chunks + chunk) * blocks of channels + block.
#pragma once
#include "linear/backward_blocks.cuh"

struct KeysSmem {
    SharedBlock left, right, third;  // v, dout or dS; then q, scaled q and T
    SharedDecay decay;
    SharedTerms terms;
    Real of_key[BLOCK];
    Real moved[CHANNELS ? BLOCK * BLOCK : 1];  // factors of a level, then what k gets of it
    Real of_decay[CHANNELS ? BLOCK * BLOCK : 1];
};

struct KeysArrays {
    const Element *dout, *q, *k, *v;
    const Element* raw_k;  // before the feature map
    const Real* decay;
    const Real *s, *z, *peaks;  // gradients of states by now
    const Real *r, *delta;
    const Real* through;     // of the walk; null without decay
    const Real* of_queries;  // with decay for each channel
    Element* dk;
    Real* of_keys;  // of whole states: [blocks of channels, batch, num_states, seqlen_k]; null without decay
    Real* ddecay;   // of channels: [batch, seqlen_k, num_states, head_dim]
};

__device__ __forceinline__ void gradient_of_keys(const KeysArrays& arrays, const Params& params, int batch,
                                                 KeysSmem& smem) {
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    const int num_chunks = num_blocks(params.seqlen_k), num_heads = params.num_states / params.states_per_k_head;
    const int outputs_per_state = params.num_outputs / params.num_states;
    unsigned rest = blockIdx.x;
    const int block = rest % blocks;
    rest /= blocks;
    const Chunk chunk(rest % num_chunks, params.seqlen_k);
    rest /= num_chunks;
    const int k_head = rest % num_heads, batch_idx = rest / num_heads;
    const int channel = block * BLOCK, num_channels = params.head_dim - channel;
    const long long state_size = static_cast<long long>(params.head_dim) * params.head_dim_v;
    const long long first = chunk.first;
    const Element* g_k =
        arrays.k + batch_idx * params.k.batch + first * params.k.seq + k_head * params.k.head + channel;
    const int column = ChannelDecay::column();
    auto key = [&](int j) {  // of this thread's channel
        const bool exists = j < chunk.num_tokens && column < num_channels;
        return exists ? to_real(g_k[j * params.k.seq + column]) : Real(0);
    };

    Block acc;
    acc.clear();
#pragma unroll 1
    for (int of_head = 0; of_head < params.states_per_k_head; of_head++) {
        const int state = k_head * params.states_per_k_head + of_head;
        const long long kept = kept_state(params, batch_idx, state, chunk.index);
        const ChannelDecay channels = channel_decay(params, arrays.decay, batch_idx, state, chunk, channel);
        const Element* g_v = arrays.v + batch_idx * params.v.batch + first * params.v.seq +
                             heads_of_state(params, state).v * params.v.head;
        // SYNC: every warp is done with all of the state before.
        __syncthreads();
        if constexpr (CHANNELS) {
            if (ChannelDecay::part() == 0) {
                channels.downwards(0, BLOCK, [&](int j, Real x) { smem.moved[j * BLOCK + threadIdx.x] = x; });
            }
        } else {
            smem.decay.load(decay_of(params, arrays.decay, batch_idx, state, chunk), params.decay.seq,
                            chunk.num_tokens);
        }
        Block inter;
        inter.clear();
        const Real state_units = state_unit(arrays.peaks + (kept * blocks + block) * blocks_v, 1, blocks_v);
#pragma unroll 1
        for (int block_v = 0; block_v < blocks_v; block_v++) {
            const int value = block_v * BLOCK;
            // SYNC: every warp is done with the blocks before.
            __syncthreads();
            load_block(smem.left, g_v, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
            load_state(smem.right, arrays.s + kept * state_size + static_cast<long long>(channel) * params.head_dim_v +
                       value, params.head_dim_v, num_channels, params.head_dim_v - value, state_units);
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
            if (params.normalize && col < num_channels) dz = arrays.z[kept * params.head_dim + channel + col];
            x = after == 0 || row >= chunk.num_tokens ? Real(0) : after * fma(x, state_units, dz);
            acc.at(r, c) += x;
            if constexpr (CHANNELS) smem.moved[row * BLOCK + col] = x;
        });
        if (!params.causal) continue;
        if constexpr (!CHANNELS) {
            if (arrays.of_keys != nullptr) {
                // SYNC: every warp is done with the blocks before.
                __syncthreads();
                load_block(smem.left, g_k, params.k.seq, chunk.num_tokens, 0, num_channels);
                blocks_loaded();
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    Real sum = 0;
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        sum = fma(to_real(smem.left[Block::row(r) * STRIDE + Block::column(c)]), inter.at(r, c), sum);
                    }
                    sum = row_sum(sum);
                    if (first_of_row()) smem.of_key[Block::row(r)] = sum;
                }
                // SYNC: what each key gets from behind the chunk is there for all.
                __syncthreads();
                const int t = threadIdx.x;
                if (t < chunk.num_tokens && t < BLOCK) {
                    Real sum = 0;
                    for (int j = 0; j < t; j++) sum += smem.of_key[j];
                    const long long head =
                        (static_cast<long long>(block) * batch + batch_idx) * params.num_states + state;
                    arrays.of_keys[head * params.seqlen_k + chunk.first + t] = sum;
                }
            }
        } else {
            // SYNC: what keys get from behind the chunk is there for all.
            __syncthreads();
            if (ChannelDecay::part() == 0) {
                Real through = 0, sum = 0;
                for (int block_v = 0; block_v < blocks_v && column < num_channels; block_v++) {
                    through += arrays.through[(kept * blocks_v + block_v) * params.head_dim + channel + column];
                }
                for (int j = 0; j < BLOCK; j++) {
                    smem.of_decay[j * BLOCK + column] = through + sum;
                    sum = fma(key(j), smem.moved[j * BLOCK + column], sum);
                }
            }
        }
#pragma unroll 1
        for (int o = 0; o < outputs_per_state; o++) {
            const Heads heads = heads_of_output(params, state * outputs_per_state + o);
            const long long term =
                (static_cast<long long>(batch_idx) * params.num_outputs + heads.output) * params.seqlen_q + chunk.first;
            const Element* g_q = arrays.q + batch_idx * params.q.batch + first * params.q.seq + heads.q * params.q.head;
            const Element* g_dout =
                arrays.dout + batch_idx * params.dout.batch + first * params.dout.seq + heads.output * params.dout.head;
            Block products;  // rows are keys
            products.clear();
#pragma unroll 1
            for (int block_v = 0; block_v < blocks_v; block_v++) {
                const int value = block_v * BLOCK;
                // SYNC: every warp is done with the blocks before.
                __syncthreads();
                load_block(smem.left, g_v, params.v.seq, chunk.num_tokens, value, params.head_dim_v);
                load_block(smem.right, g_dout, params.dout.seq, chunk.num_tokens, value, params.head_dim_v);
                blocks_loaded();
                multiply<false, true>(products, smem.left, smem.right, causal_window<true>());
            }
            const Real unit = smem.terms.load(params.normalize ? arrays.r + term : nullptr, arrays.delta + term,
                                              params.scale, chunk.num_tokens);
            load_block(smem.left, g_q, params.q.seq, chunk.num_tokens, channel, params.head_dim);
            products.each([&](int r, int c, Real& x) {
                const int key = Block::row(r), query = Block::column(c);
                x = (x - smem.terms.delta[query]) * smem.terms.r[query];
                if (CHANNELS && query == key) smem.of_key[key] = x * unit;
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
                for (int i = threadIdx.x; i < BLOCK * BLOCK; i += NUM_THREADS) {
                    const int row = i / BLOCK, col = i % BLOCK;
                    if (row < chunk.num_tokens && col < num_channels) {
                        smem.of_decay[i] += arrays.of_queries[(term + row) * params.head_dim + channel + col];
                    }
                }
                acc.each([&](int r, int c, Real& x) {
                    const int row = Block::row(r);
                    x = fma(smem.of_key[row], to_real(smem.left[row * STRIDE + Block::column(c)]), x);
                });
#pragma unroll 1
                for (int level = 0; level < LEVELS; level++) {
                    // SYNC: every thread is done with the blocks of the level before.
                    __syncthreads();
                    channels.at(
                        level,
                        [&](int i, Real x) {
                            from_real(to_real(smem.left[i * STRIDE + column]) * x, smem.right[i * STRIDE + column]);
                        },
                        [&](int j, Real x) {
                            smem.moved[j * BLOCK + column] = x;
                            from_real(Real(0), smem.right[j * STRIDE + column]);
                        });
                    const Window window = window_of<true>(level);
                    each_in(products, window, [&](int r, int c, Real& x) {  // no other terms are multiplied
                        const int key = Block::row(r), query = Block::column(c);
                        from_real(at_level(query, key, level) ? x : Real(0), smem.third[key * STRIDE + query]);
                    });
                    // SYNC: the scaled queries and T are there for all.
                    __syncthreads();
                    inter.clear();
                    multiply<false, false>(inter, smem.third, smem.right, WHOLE, window);
                    inter.each([&](int r, int c, Real& x) {
                        const int row = Block::row(r);
                        if (row >> level & 1) return;
                        Real& moved = smem.moved[row * BLOCK + Block::column(c)];
                        moved *= unit * x;
                        acc.at(r, c) += moved;
                    });
                    // SYNC: what keys get at this level is there for all.
                    __syncthreads();
                    const int half = 1 << level;
                    for (int task = 2 * ChannelDecay::part(); task < BLOCK / half; task += 2 * ChannelDecay::PARTS) {
                        Real sum = 0;
                        for (int j = task * half; j < (task + 1) * half; j++) {
                            smem.of_decay[j * BLOCK + column] += sum;
                            sum = fma(key(j), smem.moved[j * BLOCK + column], sum);
                        }
                    }
                }
            }
        }
        if constexpr (CHANNELS) {
            // SYNC: all that the decays get is there.
            __syncthreads();
            for (int i = threadIdx.x; i < BLOCK * BLOCK; i += NUM_THREADS) {
                const int row = i / BLOCK, col = i % BLOCK;
                if (row >= chunk.num_tokens || col >= num_channels) continue;
                const long long token = static_cast<long long>(batch_idx) * params.seqlen_k + chunk.first + row;
                arrays.ddecay[(token * params.num_states + state) * params.head_dim + channel + col] =
                    smem.of_decay[i];
            }
        }
    }
    store_gradient(arrays.dk + batch_idx * params.dk.batch + first * params.dk.seq + k_head * params.dk.head + channel,
                   params.dk.seq,
                   arrays.raw_k + batch_idx * params.raw_k.batch + first * params.raw_k.seq +
                       k_head * params.raw_k.head + channel,
                   params.raw_k.seq, acc, chunk.num_tokens, num_channels, params.feature_map);
}
