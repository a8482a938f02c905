// Blocks of the operands of the backward of linear attention on their way into shared memory, and the numbers of the
// outputs' rows: what all of its kernels share.
//
// With w the denominator of a query, the gradient of what a query reads is, for every key j <= i,
//
//     d(q_i . k_j) = r_i (dout_i . v_j - delta_i)       r = scale / w,  delta = dout . out
//
// and r = scale, delta = 0 without normalisation. A chunk takes its largest |r| out of the products (`unit`): r is as
// small as the sum of keys is large, and would be lost in 16 bits.
//
// Queries and keys have gone through the feature map before: a CTA would do it as often as it loads them.
//
// Constants used: Element, Real, BLOCK, NUM_WARPS, ALIGNED, CHANNELS of the including kernel.
#pragma once
#include "linear/block_products.cuh"
#include "linear/decay_levels.cuh"
#include "linear/feature_map.cuh"
#include "linear/linear_backward_params.cuh"

using Params = LinearBackwardParams<Real>;

template <typename Smem>
__device__ __forceinline__ Smem& shared_memory() {
    extern __shared__ __align__(16) unsigned char s_bytes[];
    return *reinterpret_cast<Smem*>(s_bytes);
}

__device__ __forceinline__ int num_blocks(int extent) { return (extent + BLOCK - 1) / BLOCK; }

// Starts loading a block of a [.., head_dim] array: tokens from g_rows on, columns from `column` of num_columns on.
// What does not exist becomes 0.
__device__ __forceinline__ void load_block(Element* s_block, const Element* g_rows, long long stride, int num_tokens,
                                           int column, int num_columns) {
    load_tile<ALIGNED, BLOCK, BLOCK, NUM_THREADS>(s_block, g_rows + column, stride, num_tokens, num_columns - column);
}

// Waits for what this CTA has begun to load.
__device__ __forceinline__ void blocks_loaded() {
    cp_async_commit();
    cp_async_wait<0>();
    // SYNC: every thread's part of the blocks has landed.
    __syncthreads();
}

// Multiplies each row of a block with factor(row), in place. The caller puts barriers before and behind.
template <typename Factor>
__device__ __forceinline__ void scale_rows(Element* s_block, Factor factor) {
    constexpr int VECTOR = 16 / sizeof(Element);
#pragma unroll 2
    for (int i = threadIdx.x; i < BLOCK * BLOCK / VECTOR; i += NUM_THREADS) {
        const int row = i / (BLOCK / VECTOR), column = i % (BLOCK / VECTOR) * VECTOR;
        const Real of_row = factor(row);
        Run<Element, VECTOR> run;
        run.load(s_block + row * STRIDE + column);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) run.set(e, run.get(e) * of_row);
        run.store(s_block + row * STRIDE + column);
    }
}

// The derivative of a feature map; that of relu is 0 at 0.
__device__ __forceinline__ Real map_derivative(Real x, int feature_map) {
    if (feature_map == MAP_ELU1) return x > 0 ? Real(1) : exp(x);
    return feature_map == MAP_SQUARE ? 2 * x : feature_map == MAP_RELU && !(x > 0) ? Real(0) : Real(1);
}

// The largest number of a CTA, in every thread; s_warps: NUM_WARPS numbers. NaN counts as none.
__device__ __forceinline__ Real largest_of_cta(Real x, Real* s_warps) {
#pragma unroll
    for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) x = fmax(x, __shfl_xor_sync(0xffffffff, x, lanes));
    // SYNC: nobody reads the numbers of the call before.
    __syncthreads();
    if (lane_index() == 0) s_warps[threadIdx.x / WARP_SIZE] = x;
    // SYNC: each warp's number is there.
    __syncthreads();
    for (int warp = 0; warp < NUM_WARPS; warp++) x = fmax(x, s_warps[warp]);
    return x;
}

// What states are divided by before they are rounded to elements, so that no 16-bit type is too narrow for them: the
// largest of `count` peaks, the largest magnitudes of their blocks. 1 for elements that are as wide as sums.
__device__ __forceinline__ Real state_unit(const Real* g_peaks, long long stride, int count) {
    Real largest = 0;
    if (TENSOR) {
        for (int i = 0; i < count; i++) largest = fmax(largest, g_peaks[i * stride]);
    }
    return largest > Real(1e-30) ? largest : Real(1);
}

// Loads a block of a state, [channels][values], divided by its unit; g_state: its first number.
__device__ __forceinline__ void load_state(Element* s_block, const Real* g_state, int stride, int num_channels,
                                           int num_values, Real unit) {
    constexpr int VECTOR = 4;
    const Real inverse = 1 / unit;
    const bool vectors = stride % VECTOR == 0;  // rows of kept states then begin at multiples of so many numbers
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK * BLOCK / VECTOR; i += NUM_THREADS) {
        const int row = i / (BLOCK / VECTOR), column = i % (BLOCK / VECTOR) * VECTOR;
        const Real* g_run = g_state + static_cast<long long>(row) * stride + column;
        Run<Real, VECTOR> run;
        run.clear();
        if (row < num_channels && vectors && column < num_values) {
            run.load(g_run);
        } else if (row < num_channels) {
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                if (column + e < num_values) run.element[e] = g_run[e];
            }
        }
        Run<Element, VECTOR> rounded;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) rounded.set(e, run.get(e) * inverse);
        rounded.store(s_block + row * STRIDE + column);
    }
}

// r and delta of the queries of a chunk.
struct SharedTerms {
    Real r[BLOCK], delta[BLOCK];  // r divided by unit
    Real warps[NUM_WARPS];

    // For the whole CTA. Returns the unit, which the products are to be multiplied with. g_r: null without
    // normalisation, when all are the scale.
    __device__ __forceinline__ Real load(const Real* g_r, const Real* g_delta, Real scale, int num_tokens) {
        const int i = threadIdx.x;
        Real mine = 0, of_mine = 0;
        if (i < num_tokens && i < BLOCK) {
            mine = g_r == nullptr ? scale : g_r[i];
            of_mine = g_r == nullptr ? Real(0) : g_delta[i];
        }
        const Real largest = largest_of_cta(fabs(mine), warps);
        const Real unit = largest > Real(1e-30) ? largest : Real(1);
        if (i < BLOCK) {
            r[i] = mine / unit;
            delta[i] = of_mine;
        }
        // SYNC: the terms are there for all.
        __syncthreads();
        return unit;
    }
};

// Which heads of the inputs an output head, or a state, reads.
struct Heads {
    int output, state, q, k, v;
};
__device__ __forceinline__ Heads heads_of_state(const Params& params, int state) {
    return {0, state, 0, state / params.states_per_k_head, state / params.states_per_v_head};
}
__device__ __forceinline__ Heads heads_of_output(const Params& params, int output) {
    Heads heads = heads_of_state(params, output / (params.num_outputs / params.num_states));
    heads.output = output;
    heads.q = output / params.outputs_per_q_head;
    return heads;
}

// A chunk: its first token, and how many there are.
struct Chunk {
    int index, first, num_tokens;

    __device__ __forceinline__ Chunk(int index, int seqlen)
        : index(index), first(index * BLOCK), num_tokens(min(BLOCK, seqlen - index * BLOCK)) {}
};

// Which block of columns, of which chunk of which head, a CTA computes.
//
// Grid: x = ((batch_idx * num_heads + head) * chunks + chunk) * blocks + block.
struct Place {
    int batch_idx, head;
    Chunk chunk;
    int block;
};
__device__ __forceinline__ Place place_of_cta(int num_heads, int seqlen, int blocks) {
    const int num_chunks = num_blocks(seqlen);
    const unsigned at = blockIdx.x / blocks, head = at / num_chunks;
    return {static_cast<int>(head / num_heads), static_cast<int>(head % num_heads),
            Chunk(at % num_chunks, seqlen), static_cast<int>(blockIdx.x % blocks)};
}

// The first row of a chunk, of a head of an array.
template <typename T>
__device__ __forceinline__ T* rows_of(T* g_x, const RowStrides& x, int batch_idx, const Chunk& chunk, int head) {
    return g_x + batch_idx * x.batch + chunk.first * x.seq + head * x.head;
}
// The place of the first query of a chunk in arrays of [batch, num_outputs, seqlen_q].
__device__ __forceinline__ long long first_term(const Params& params, int batch_idx, int output, const Chunk& chunk) {
    return (static_cast<long long>(batch_idx) * params.num_outputs + output) * params.seqlen_q + chunk.first;
}

// The place of a kept state: that before a chunk, or the gradient of that behind it.
__device__ __forceinline__ long long kept_state(const Params& params, int batch_idx, int state, int chunk) {
    const long long head = static_cast<long long>(batch_idx) * params.num_states + state;
    return head * params.num_kept + (params.causal ? chunk : 0);
}

// Loads a block of a kept state, from a channel and a value on, divided by its unit.
__device__ __forceinline__ void load_kept(Element* s_block, const Real* g_s, const Params& params, long long kept,
                                          int channel, int value, Real unit) {
    const long long row = kept * params.head_dim + channel;
    load_state(s_block, g_s + row * params.head_dim_v + value, params.head_dim_v, params.head_dim - channel,
               params.head_dim_v - value, unit);
}

// The decay of a state at a chunk: null where there is none.
__device__ __forceinline__ const Real* decay_of(const Params& params, const Real* g_decay, int batch_idx, int state,
                                                const Chunk& chunk) {
    return g_decay == nullptr ? nullptr : rows_of(g_decay, params.decay, batch_idx, chunk, state);
}
__device__ __forceinline__ ChannelDecay channel_decay(const Params& params, const Real* g_decay, int batch_idx,
                                                      int state, const Chunk& chunk, int first_channel) {
    const int channel = first_channel + ChannelDecay::column();
    const Real* g_chunk = decay_of(params, g_decay, batch_idx, state, chunk);
    return {channel < params.head_dim ? g_chunk + channel : nullptr, params.decay.seq, chunk.num_tokens};
}

// acc += the products q_i . k_j of a block of channels, each decayed channel by channel from j to i, for j <= i. Rows
// of acc are queries, or keys (ROWS_ARE_KEYS). s_scaled_q, s_scaled_k: room for scaled ones. Begins
// and ends with a barrier's worth of room: the caller puts one before and behind.
template <bool ROWS_ARE_KEYS>
__device__ __forceinline__ void multiply_decayed(Block& acc, const Element* s_q, const Element* s_k,
                                                 Element* s_scaled_q, Element* s_scaled_k, const ChannelDecay& decay) {
    const int column = ChannelDecay::column();
    Block part;
#pragma unroll 1
    for (int level = -1; level < LEVELS; level++) {  // -1: i == j, where nothing decays
        if (level >= 0) {
            // SYNC: every warp is done with the scaled blocks of the level before.
            __syncthreads();
            decay.at(
                level,
                [&](int i, Real factor) {
                    const int at = i * STRIDE + column;
                    from_real(to_real(s_q[at]) * factor, s_scaled_q[at]);
                    from_real(Real(0), s_scaled_k[at]);
                },
                [&](int j, Real factor) {
                    const int at = j * STRIDE + column;
                    from_real(to_real(s_k[at]) * factor, s_scaled_k[at]);
                    from_real(Real(0), s_scaled_q[at]);
                });
            // SYNC: the scaled blocks are there for all.
            __syncthreads();
        }
        const Element* s_queries = level < 0 ? s_q : s_scaled_q;
        const Element* s_keys = level < 0 ? s_k : s_scaled_k;
        part.clear();
        const Window window = window_of<ROWS_ARE_KEYS>(level);
        multiply<false, true>(part, ROWS_ARE_KEYS ? s_keys : s_queries, ROWS_ARE_KEYS ? s_queries : s_keys,
                              window);
        each_in(acc, window, [&](int r, int c, Real& x) {
            const int row = Block::row(r), col = Block::column(c);
            const int i = ROWS_ARE_KEYS ? col : row, j = ROWS_ARE_KEYS ? row : col;
            if (level < 0 ? i == j : at_level(i, j, level)) x += part.at(r, c);
        });
    }
}

// Writes this lane's elements of a block of a gradient times the derivative of the feature map at the inputs; both from
// the first row and column of the block on.
__device__ __forceinline__ void store_gradient(Element* g_out, long long out_stride, const Element* g_in,
                                               long long in_stride, Block& acc, int num_tokens, int num_columns,
                                               int feature_map) {
    acc.each([&](int r, int c, Real& x) {
        const int row = Block::row(r), column = Block::column(c);
        if (row >= num_tokens || column >= num_columns) return;
        const Real slope = map_derivative(to_real(g_in[row * in_stride + column]), feature_map);
        from_real(x * slope, g_out[row * out_stride + column]);
    });
}
