// Gradients of linear attention, chunk by chunk. With S the state before a chunk and dS the gradient of the one behind
// it, all of a chunk depends on nothing else: kernels of which only the walks go through chunks one by one.
//
//     cuattn_linear_map             q and k through the feature map, once            (backward_map.cuh)
//     cuattn_linear_states          S before each chunk                              (here)
//     cuattn_linear_rows            denominators and the like; decays from queries   (backward_rows.cuh)
//     cuattn_linear_dq              dq                                               (backward_queries.cuh)
//     cuattn_linear_state_gradients dS behind each chunk, in the place of S          (here)
//     cuattn_linear_dk              dk; decays of channels                           (backward_keys.cuh)
//     cuattn_linear_dv              dv                                               (backward_values.cuh)
//     cuattn_linear_ddecay, _sum    decays of whole states                           (backward_decay.cuh)
//
// Products are of blocks of BLOCK x BLOCK elements, on tensor cores for 16-bit elements and by fused multiply-adds for
// float and double (block_products.cuh). Head dims are runtime values, taken in blocks. Every sum has a fixed order.
//
// Block: NUM_WARPS warps. Constants: Element, Real (float, or double for double), BLOCK (tokens of a chunk, and columns
// of a block), NUM_WARPS, ALIGNED (bases and strides of q, k, v, dout: multiples of 16 bytes), CHANNELS (a decay for
// each channel of a key), and the bytes of the shared-memory plans.
//
// The arrays that entries share: dout [batch, seqlen_q, num_outputs, head_dim_v]; q [batch, seqlen_q, num_heads,
// head_dim] and k [batch, seqlen_k, num_k_heads, head_dim], mapped; v [batch, seqlen_k, num_v_heads, head_dim_v];
// decay null, or [batch, seqlen_k, num_states] with any strides, and with CHANNELS one more axis, head_dim,
// contiguous; kept states s, z and peaks as WalkArrays says; r and delta [batch, num_outputs, seqlen_q], null
// without normalisation.
#include "linear/backward_decay.cuh"
#include "linear/backward_keys.cuh"
#include "linear/backward_map.cuh"
#include "linear/backward_queries.cuh"
#include "linear/backward_rows.cuh"
#include "linear/backward_values.cuh"

// The walks over the chunks of a head: states before each chunk, and, backwards, the gradients of those behind each.
//
//     S <- e^(all of the chunk) S + sum over j of e^(j + 1 .. last) k_j (x) v_j
//     dS <- e^(all of the chunk) dS + sum over i of e^(first .. i) q_i (x) r_i dout_i
//     dz <- e^(all of the chunk) dz - sum over i of e^(first .. i) q_i r_i delta_i
//
// Gradients take the place of states, chunk by chunk: there is never more than one for each chunk. The state is used
// once more as it goes: what the decay of the whole chunk gets, a channel, is
//
//     through = e^(all of the chunk) (rowsum(dS S) + dz z)
//
// A CTA has a block of a state, [channels][values], in registers, and the first of a row of blocks z besides.
// Without an order of tokens (causal = 0) there is one state, that behind all, and one gradient.
//
// Grid: x = ((batch_idx * num_states + state) * blocks of channels + block) * blocks of values + block.
struct WalkSmem {
    SharedBlock keys[2], values[2];  // backwards: q and dout; the next ones load while these are used
    SharedDecay decay;
    SharedTerms terms;
    Real whole[BLOCK];         // e^(all of the chunk), a channel
    Real of_z[BLOCK];          // the part of z in what goes through
};

struct WalkArrays {
    const Element* rows;    // k, or backwards q
    const Element* columns; // v, or backwards dout
    const Real* decay;
    const Real *r, *delta;  // backwards: [batch, num_outputs, seqlen_q], null without normalisation
    const Real *first_s, *first_z;  // where the walk begins: null for zeros
    Real *last_s, *last_z;          // where it ends: null if nobody asks
    Real *s, *z, *peaks;    // kept: [kept, head_dim, head_dim_v], [kept, head_dim], [kept, blocks, blocks]
    Real* through;          // backwards: [kept, blocks of values, head_dim]; null without decay
};

template <bool BACKWARDS>
__device__ __forceinline__ void walk_states(const WalkArrays& arrays, const Params& params, WalkSmem& smem) {
    const int blocks = num_blocks(params.head_dim), blocks_v = num_blocks(params.head_dim_v);
    unsigned rest = blockIdx.x;
    const int block_v = rest % blocks_v;
    rest /= blocks_v;
    const int block = rest % blocks;
    rest /= blocks;
    const int state = rest % params.num_states, batch_idx = rest / params.num_states;
    const int channel = block * BLOCK, value = block_v * BLOCK;
    const int num_channels = params.head_dim - channel, num_values = params.head_dim_v - value;
    const Heads heads = heads_of_state(params, state);
    const int outputs_per_state = BACKWARDS ? params.num_outputs / params.num_states : 1;

    const int seqlen = BACKWARDS ? params.seqlen_q : params.seqlen_k;
    const int num_chunks = num_blocks(seqlen);
    const long long state_size = static_cast<long long>(params.head_dim) * params.head_dim_v;
    const long long head = static_cast<long long>(batch_idx) * params.num_states + state;
    const long long place = static_cast<long long>(channel) * params.head_dim_v + value;  // of the block in a state
    // The channel of z that this thread has, if it has one.
    const int z_channel = channel + threadIdx.x;
    const bool has_z = params.normalize && block_v == 0 && threadIdx.x < BLOCK && z_channel < params.head_dim;

    Block acc;
    Real z = has_z && arrays.first_z != nullptr ? arrays.first_z[head * params.head_dim + z_channel] : Real(0);
    acc.each([&](int r, int c, Real& x) {
        const int row = Block::row(r), column = Block::column(c);
        const bool exists = arrays.first_s != nullptr && row < num_channels && column < num_values;
        const long long at = head * state_size + place + static_cast<long long>(row) * params.head_dim_v + column;
        x = exists ? arrays.first_s[at] : Real(0);
    });

    auto store_state = [&](Real* g_s) {  // from the first number of the block on
        const bool pairs = TENSOR && params.head_dim_v % 2 == 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = Block::row(r);
            if (row >= num_channels) continue;
            Real* g_row = g_s + static_cast<long long>(row) * params.head_dim_v;
#pragma unroll
            for (int c = 0; c < COLUMNS; c += 2) {
                if (pairs) {
                    const int column = Block::column(c);
                    if (column < num_values) {
                        *reinterpret_cast<float2*>(g_row + column) = make_float2(acc.at(r, c), acc.at(r, c + 1));
                    }
                } else {
                    if (Block::column(c) < num_values) g_row[Block::column(c)] = acc.at(r, c);
                    if (Block::column(c + 1) < num_values) g_row[Block::column(c + 1)] = acc.at(r, c + 1);
                }
            }
        }
    };
    auto keep = [&](long long kept) {
        Real* g_s = arrays.s + kept * state_size + place;
        Real largest = 0;
        store_state(g_s);
        acc.each([&](int, int, Real& x) { largest = fmax(largest, fabs(x)); });  // 0 where there is no element
        if (has_z) arrays.z[kept * params.head_dim + z_channel] = z;
        if (TENSOR) {
            largest = largest_of_cta(largest, smem.terms.warps);
            if (threadIdx.x == 0) arrays.peaks[(kept * blocks + block) * blocks_v + block_v] = largest;
        }
    };
    auto go_through = [&](long long kept) {
        const Real* g_s = arrays.s + kept * state_size + place;
        if (threadIdx.x < BLOCK) {
            const Real whole = smem.whole[threadIdx.x];
            const bool some = has_z && whole != 0;
            smem.of_z[threadIdx.x] = some ? whole * z * arrays.z[kept * params.head_dim + z_channel] : Real(0);
        }
        // SYNC: the parts of z are there for all.
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = Block::row(r);
            const Real whole = smem.whole[row];
            Real sum = 0;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const int column = Block::column(c);
                if (whole != 0 && row < num_channels && column < num_values) {
                    sum = fma(acc.at(r, c) * whole, g_s[static_cast<long long>(row) * params.head_dim_v + column], sum);
                }
            }
            sum = row_sum(sum) + smem.of_z[row];
            if (first_of_row() && row < num_channels) {
                arrays.through[(kept * blocks_v + block_v) * params.head_dim + channel + row] = sum;
            }
        }
    };

    // One output of a chunk after the other, or just one chunk after the other.
    const int num_steps = num_chunks * outputs_per_state;
    auto chunk_of = [&](int step) {
        const int at = step / outputs_per_state;
        return Chunk(BACKWARDS ? num_chunks - 1 - at : at, seqlen);
    };
    auto output_of = [&](int step) { return state * outputs_per_state + step % outputs_per_state; };
    auto load = [&](int step) {
        if (step < num_steps) {
            const Chunk chunk = chunk_of(step);
            const int output = output_of(step);
            const RowStrides& rows = BACKWARDS ? params.q : params.k;
            const RowStrides& columns = BACKWARDS ? params.dout : params.v;
            const int row_head = BACKWARDS ? output / params.outputs_per_q_head : heads.k;
            const int column_head = BACKWARDS ? output : heads.v;
            load_block(smem.keys[step % 2], rows_of(arrays.rows, rows, batch_idx, chunk, row_head), rows.seq,
                       chunk.num_tokens, channel, params.head_dim);
            load_block(smem.values[step % 2], rows_of(arrays.columns, columns, batch_idx, chunk, column_head),
                       columns.seq, chunk.num_tokens, value, params.head_dim_v);
        }
        cp_async_commit();
    };

    load(0);
#pragma unroll 1
    for (int step = 0; step < num_steps; step++) {
        const Chunk chunk = chunk_of(step);
        Element *s_keys = smem.keys[step % 2], *s_values = smem.values[step % 2];
        const ChannelDecay channels = channel_decay(params, arrays.decay, batch_idx, state, chunk, channel);
        // SYNC: every warp is done with the blocks and the decays of the step before.
        __syncthreads();
        load(step + 1);
        if (step % outputs_per_state == 0) {
            if (CHANNELS) {
                if (ChannelDecay::part() == 0) {
                    Real sum = 0;
                    for (int i = 0; i < BLOCK; i++) sum += channels.log(i);
                    smem.whole[threadIdx.x] = exp(sum);
                }
            } else {
                smem.decay.load(decay_of(params, arrays.decay, batch_idx, state, chunk), params.decay.seq,
                                chunk.num_tokens);
                // SYNC: the decay of the whole chunk is there.
                __syncthreads();
                if (threadIdx.x < BLOCK) smem.whole[threadIdx.x] = smem.decay.whole;
            }
            // SYNC: what each channel decays by is there for all.
            __syncthreads();
            if (params.causal) {
                const long long kept = kept_state(params, batch_idx, state, chunk.index);
                if (BACKWARDS && arrays.through != nullptr) go_through(kept);
                keep(kept);
            }
            acc.each([&](int r, int c, Real& x) {
                const Real whole = smem.whole[Block::row(r)];
                x = whole == 0 ? Real(0) : x * whole;
            });
            if (has_z) z = smem.whole[threadIdx.x] == 0 ? Real(0) : z * smem.whole[threadIdx.x];
        }
        Real unit = 1;
        if (BACKWARDS) {
            const long long term =
                (static_cast<long long>(batch_idx) * params.num_outputs + output_of(step)) * seqlen + chunk.first;
            unit = smem.terms.load(arrays.r == nullptr ? nullptr : arrays.r + term, arrays.delta + term, params.scale,
                                   chunk.num_tokens);
        }
        cp_async_wait<1>();
        // SYNC: every thread's part of the blocks of this step has landed.
        __syncthreads();
        if (!CHANNELS && arrays.decay != nullptr || BACKWARDS && arrays.r != nullptr) {
            scale_rows(s_keys, [&](int t) {
                const Real of_decay = CHANNELS ? Real(1) : BACKWARDS ? smem.decay.before[t] : smem.decay.after[t];
                return BACKWARDS ? of_decay * smem.terms.r[t] : of_decay;
            });
            // SYNC: the scaled block is there for all.
            __syncthreads();
        }
        if (CHANNELS) {
            if (ChannelDecay::part() == 0) {
                auto scale = [&](int t, Real x) {
                    Element& element = s_keys[t * STRIDE + threadIdx.x];
                    from_real(to_real(element) * x, element);
                };
                if (BACKWARDS) {
                    channels.upwards(0, BLOCK, scale);
                } else {
                    channels.downwards(0, BLOCK, scale);
                }
            }
            // SYNC: the scaled block is there for all.
            __syncthreads();
        }
        if (BACKWARDS) {
            Block part;
            part.clear();
            multiply<true, false>(part, s_keys, s_values);
            acc.each([&](int r, int c, Real& x) { x = fma(unit, part.at(r, c), x); });
        } else {
            multiply<true, false>(acc, s_keys, s_values);
        }
        if (has_z) {
            Real sum = 0;
            for (int t = 0; t < chunk.num_tokens; t++) {
                const Real x = to_real(s_keys[t * STRIDE + threadIdx.x]);
                sum += BACKWARDS ? -x * smem.terms.delta[t] : x;
            }
            z = fma(unit, sum, z);
        }
    }
    if (!params.causal) keep(head);
    if (arrays.last_s != nullptr) {
        store_state(arrays.last_s + head * state_size + place);
        if (has_z) arrays.last_z[head * params.head_dim + z_channel] = z;
    }
}

static_assert(sizeof(WalkSmem) == WALK_SMEM_BYTES && sizeof(RowsSmem) == ROWS_SMEM_BYTES &&
                  sizeof(GradientSmem) == DQ_SMEM_BYTES && sizeof(KeysSmem) == DK_SMEM_BYTES &&
                  sizeof(ValuesSmem) == DV_SMEM_BYTES,
              "ops/linear/backward_config.py and this file agree on the shared-memory plans");

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_states(
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_first_s,  // [batch, num_states, head_dim, head_dim_v]; null: zeros
    const Real* __restrict__ g_first_z,  // [batch, num_states, head_dim]
    Real* __restrict__ g_s,
    Real* __restrict__ g_z,
    Real* __restrict__ g_peaks,
    const Params params)
{
    const WalkArrays arrays{g_k, g_v, g_decay, nullptr, nullptr, g_first_s, g_first_z, nullptr, nullptr,
                            g_s, g_z, g_peaks, nullptr};
    walk_states<false>(arrays, params, shared_memory<WalkSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_state_gradients(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    const Real* __restrict__ g_dlast_s,  // the gradient of the last state; null: zeros
    const Real* __restrict__ g_dlast_z,
    Real* __restrict__ g_dfirst_s,       // that of the initial state; null if there is none
    Real* __restrict__ g_dfirst_z,
    Real* g_s,
    Real* g_z,
    Real* __restrict__ g_peaks,
    Real* __restrict__ g_through,        // null without decay
    const Params params)
{
    const WalkArrays arrays{g_q, g_dout, g_decay, g_r, g_delta, g_dlast_s, g_dlast_z, g_dfirst_s, g_dfirst_z,
                            g_s, g_z, g_peaks, g_through};
    walk_states<true>(arrays, params, shared_memory<WalkSmem>());
}
