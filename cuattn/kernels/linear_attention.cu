// Linear attention on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer), for 16-bit elements.
//
//     S_t = e^g_t S_{t-1} + k_t (x) v_t        o_t = scale q_t S_t, or scale q_t S_t / (scale q_t z_t + eps)
//
// A CTA has a slice of the columns of a state in the accumulators of its warps (linear_state.cuh), and walks over the
// tokens of a segment in chunks. With G the running sum of g within the chunk (chunk_decay.cuh), for a chunk's rows:
//
//     A = (Q K^T) e^(G_i - G_j), j <= i;    O = A V + e^G_i (Q S);    S <- e^G_last S + (e^(G_last - G_j) K)^T V
//
// With a decay of each channel, G is a vector, and its factors are within the products: channel_decay.cuh. A and S are
// rounded to elements before they are multiplied. z, the sum of keys, is one more column: of V it would be
// ones. Every output head of the state takes its turn within a chunk, so that keys, values and the state are read once.
// In chunks, the same sums are matrix products: Yang et al., "Gated linear attention transformers with
// hardware-efficient training", 2023; Dao and Gu, "Transformers are SSMs", 2024.
//
// A call without keys reads the state that it is given for every query; one without queries makes a state.
//
// Grid: linear_work.cuh. Block: NUM_WARPS warps. Of the outputs of a chunk a warp has 16 rows and OUT_COLS columns; of
// the state the rows and columns that linear_state.cuh gives it.
//
// Constants: Element; HEAD_DIM (a bucket), SLICE, CHUNK, NUM_WARPS, NUM_STAGES, SMEM_BYTES; ALIGNED (rows of q, k, v
// and of decays of channels begin at multiples of 16 bytes); DECAY (0: none, 1: one number a state and token, 2: one
// for each channel), NORMALIZE.
#include "common/elements.cuh"

constexpr int NUM_THREADS = NUM_WARPS * 32;

#include "linear/feature_map.cuh"
#include "linear/output_tile.cuh"

using Params = LinearParams<float>;

struct Smem {
    Element q[NUM_STAGES][CHUNK][TILE_STRIDE<HEAD_DIM>];
    Element k[NUM_STAGES][CHUNK][TILE_STRIDE<HEAD_DIM>];
    Element v[NUM_STAGES][CHUNK][TILE_STRIDE<SLICE>];
    Element state[HEAD_DIM][STATE_STRIDE];
    Element kept[DECAY == 2 ? CHUNK : 1][TILE_STRIDE<HEAD_DIM>];  // keys at the end of their blocks
    float sums[DECAY == 2 ? CHUNK : 1][SUM_STRIDE];               // decays of each channel, then their sums
    ChunkDecay<CHUNK> decay;
    float largest[NUM_WARPS];  // of each warp's part of the state
};

static_assert(DECAY != 2 || NUM_STAGES == 1, "there is one place for the decays of channels");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

// A tile of the walk: an output head's part of a chunk.
struct Step {
    int first_token, head, num_rows;
};

// Maps the elements [num_rows x num_cols] of a tile; what lies outside stays zero.
template <int ROWS>
__device__ __forceinline__ void map_tile(Element* s_tile, int feature_map, int num_rows, int num_cols) {
    if (feature_map == MAP_NONE) return;
    constexpr int RUN = 8;
    constexpr int RUNS = HEAD_DIM / RUN;
    with_feature_map<float, true>(feature_map, [&](auto map) {
#pragma unroll 2
        for (int i = threadIdx.x; i < ROWS * RUNS; i += NUM_THREADS) {
            const int row = i / RUNS;
            const int col = i % RUNS * RUN;
            if (row >= num_rows || col >= num_cols) continue;
            uint4& run = *reinterpret_cast<uint4*>(s_tile + row * TILE_STRIDE<HEAD_DIM> + col);
            unsigned pairs[] = {run.x, run.y, run.z, run.w};
#pragma unroll
            for (int j = 0; j < RUN / 2; j++) {
                const Element* elements = reinterpret_cast<const Element*>(&pairs[j]);
                pairs[j] = pack_pair(Element(), map(to_real(elements[0])), map(to_real(elements[1])));
            }
            if (col + RUN > num_cols) {
#pragma unroll
                for (int j = 0; j < RUN / 2; j++) {
                    const int left = num_cols - col - 2 * j;
                    pairs[j] = left <= 0 ? 0 : left == 1 ? pairs[j] & 0xffff : pairs[j];
                }
            }
            run = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    });
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_attention(
    const Element* __restrict__ g_q,      // [batch, seqlen_q, num_heads, head_dim]; null: no outputs
    const Element* __restrict__ g_k,      // [batch, seqlen_k, num_k_heads, head_dim]; null: the state is only read
    const Element* __restrict__ g_v,      // [batch, seqlen_k, num_v_heads, head_dim_v]
    const float* __restrict__ g_decay,    // [batch, seqlen_k, num_states]
    const float* g_s_in,                  // [batch, num_states, states_in, head_dim, head_dim_v]; null: zeros
    const float* g_z_in,                  // [batch, num_states, states_in, head_dim]
    Element* __restrict__ g_out,          // [batch, seqlen_q, num_outputs, head_dim_v]
    float* g_s_out,                       // like g_s_in, states_out; or null. It may be g_s_in
    float* g_z_out,                       // like g_z_in
    float* __restrict__ g_kept,           // [batch, num_states, states_out, head_dim]: what is left of the first state
    const int* __restrict__ g_cu_seqlens, // [batch + 1]: q, k, v, decay and out are packed, without a batch axis
    const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;

    const bool has_keys = g_k != nullptr;
    const bool has_queries = g_q != nullptr;
    const LinearWork work = linear_work(params, g_cu_seqlens, has_keys ? params.seqlen_k : params.seqlen_q);
    const int heads = has_queries ? work.num_outputs : 1;
    const int first_col = work.slice * SLICE;
    const int num_cols = min(SLICE, params.head_dim_v - first_col);

    // Each array from the first token of this sequence on, at the heads of this state.
    const long long batch = work.batch_idx, start = work.start;
    g_q += batch * params.q.batch + start * params.q.seq;
    g_out += batch * params.out.batch + start * params.out.seq + work.first_output * params.out.head + first_col;
    g_k += batch * params.k.batch + start * params.k.seq + work.state_idx / params.states_per_k_head * params.k.head;
    g_v += batch * params.v.batch + start * params.v.seq + work.state_idx / params.states_per_v_head * params.v.head +
           first_col;
    g_decay += batch * params.decay.batch + start * params.decay.seq + work.state_idx * params.decay.head;

    StateTiles state(warp_idx);
    {
        const long long place = state_place(params, work, params.states_in) * params.head_dim;
        state.load(g_s_in == nullptr ? nullptr : g_s_in + place * params.head_dim_v, g_z_in + place, params.head_dim,
                   params.head_dim_v, first_col, num_cols, lane_idx);
    }

    // A chunk's keys and values are loaded with the queries of its first head.
    auto load = [&](const Step& step, int stage, int kv_stage) {
        const long long token = step.first_token;
        if (has_queries) {
            const int head = (work.first_output + step.head) / params.outputs_per_q_head;
            load_tile<ALIGNED, CHUNK, HEAD_DIM, NUM_THREADS>(smem.q[stage][0],
                                                             g_q + token * params.q.seq + head * params.q.head,
                                                             params.q.seq, step.num_rows, params.head_dim);
        }
        if (has_keys && step.head == 0) {
            load_tile<ALIGNED, CHUNK, HEAD_DIM, NUM_THREADS>(smem.k[kv_stage][0], g_k + token * params.k.seq,
                                                             params.k.seq, step.num_rows, params.head_dim);
            load_tile<ALIGNED, CHUNK, SLICE, NUM_THREADS>(smem.v[kv_stage][0], g_v + token * params.v.seq, params.v.seq,
                                                          step.num_rows, num_cols);
            if (DECAY == 2) {
                load_tile<ALIGNED, CHUNK, HEAD_DIM, NUM_THREADS>(smem.sums[0], g_decay + token * params.decay.seq,
                                                                 params.decay.seq, step.num_rows, params.head_dim);
            }
        }
        cp_async_commit();
    };
    auto next = [&](Step step) {
        if (++step.head == heads) {
            step.head = 0;
            step.first_token += CHUNK;
        }
        step.num_rows = min(CHUNK, work.end_token - step.first_token);
        return step;
    };
    float decay[CHUNK / 32];  // of the next chunk, in the first warp
    auto load_decay = [&](int first_token) {
        if (DECAY == 1 && warp_idx == 0 && has_keys) {
#pragma unroll
            for (int i = 0; i < CHUNK / 32; i++) {
                const int token = first_token + lane_idx * (CHUNK / 32) + i;
                decay[i] = token < work.end_token ? g_decay[token * params.decay.seq] : 0.0f;
            }
        }
    };
    auto note_largest = [&] {
        if (!NARROW_RANGE<Element> || !has_queries) return;
        const float found = state.largest(lane_idx);
        if (lane_idx == 0) smem.largest[warp_idx] = found;
    };

    const int first_row = warp_idx % WARPS_M * MMA_M;
    const int last_row = first_row + MMA_M - 1;
    const int out_col = warp_idx / WARPS_M * OUT_COLS;
    Step step{work.first_token, 0, min(CHUNK, work.end_token - work.first_token)};
    float state_range = 1.0f;  // what the state in shared memory is multiplied by
    int stage = 0, kv_stage = 0;
    note_largest();
    load_decay(step.first_token);
    if (NUM_STAGES > 1 && step.first_token < work.end_token) load(step, 0, 0);

    while (step.first_token < work.end_token) {
        const Step following = next(step);
        const bool first_head = step.head == 0, last_head = step.head == heads - 1;
        if (NUM_STAGES == 1) {
            // SYNC: every warp is done with the tiles before, whose place these take.
            __syncthreads();
            load(step, 0, 0);
        }
        cp_async_wait<0>();
        // SYNC: the tiles have landed for all; every warp is done with the step before: its tiles, the state in shared
        // memory and the decay; and the largest numbers of the state are known.
        __syncthreads();
        const int next_kv_stage = NUM_STAGES > 1 && last_head ? 1 - kv_stage : kv_stage;
        if (NUM_STAGES > 1 && following.first_token < work.end_token) load(following, 1 - stage, next_kv_stage);
        if (has_queries) map_tile<CHUNK>(smem.q[stage][0], params.feature_map, step.num_rows, params.head_dim);
        if (first_head) {
            if (has_keys) map_tile<CHUNK>(smem.k[kv_stage][0], params.feature_map, step.num_rows, params.head_dim);
            if (DECAY == 2) sum_blocks(smem.sums[0], params.head_dim);
            if (DECAY == 1 && warp_idx == 0 && has_keys) {
                smem.decay.fill(decay, lane_idx);
                load_decay(step.first_token + CHUNK);
            }
            if (has_queries) {
                if (NARROW_RANGE<Element>) {
                    float largest = 0.0f;
#pragma unroll
                    for (int i = 0; i < NUM_WARPS; i++) largest = fmaxf(largest, smem.largest[i]);
                    state_range = half_range_factor(largest);
                }
                state.publish(smem.state[0], state_range, lane_idx);
            }
        }
        // SYNC: the tiles are mapped, the state is rounded, and the decay is summed.
        __syncthreads();
        if (DECAY == 2 && first_head) {
            keep_keys(smem.kept[0], smem.k[kv_stage][0], smem.sums[0]);
            // SYNC: what is left of the keys at the end of their blocks is in shared memory.
            __syncthreads();
        }
        if (has_queries && first_row < step.num_rows) {
            OutputTile tile;
            const unsigned s_q = smem_address(smem.q[stage]) + lane_offset_a<HEAD_DIM>(first_row, lane_idx);
            const unsigned s_k = smem_address(smem.k[kv_stage]) + lane_offset_bt<HEAD_DIM>(lane_idx);
            const unsigned s_state =
                smem_address(smem.state) + lane_offset_b<SLICE>(lane_idx) + out_col * sizeof(Element);
            const unsigned s_z = smem_address(&smem.state[frag_b_trans_k(lane_idx)][SLICE]);
            if (DECAY == 2) {
                tile.multiply_channels(s_q, s_k + first_row * TILE_STRIDE<HEAD_DIM> * sizeof(Element),
                                       smem_address(smem.kept) + lane_offset_bt<HEAD_DIM>(lane_idx), s_state, s_z,
                                       smem.sums[0] + frag_acc_col(lane_idx), first_row, lane_idx);
            } else {
                tile.multiply(s_q, s_k, s_state, s_z, has_keys, last_row);
            }
            float upper = 1.0f, lower = 1.0f;
            if (has_keys) {
                if (DECAY != 2) tile.decay_weights(smem.decay, first_row, lane_idx);
                if (NARROW_RANGE<Element>) tile.weight_range(upper, lower);
            }
            if (DECAY == 1 || NARROW_RANGE<Element>) {
                const int row = first_row + frag_acc_row(lane_idx);
                const bool decays = DECAY == 1 && has_keys;
                tile.scale_rows((decays ? smem.decay.of_state[row] : 1.0f) * upper / state_range,
                                (decays ? smem.decay.of_state[row + 8] : 1.0f) * lower / state_range);
            }
            if (has_keys) {
                const unsigned s_v = smem_address(smem.v[kv_stage]) + lane_offset_b<SLICE>(lane_idx);
                tile.add_values(s_v + out_col * sizeof(Element), upper, lower, last_row, lane_idx);
            }
            Element* g_rows = g_out + (step.first_token + first_row) * params.out.seq + step.head * params.out.head;
            tile.store(g_rows + out_col, params, upper, lower, step.num_rows - first_row,
                       min(OUT_COLS, num_cols - out_col), lane_idx);
        }
        if (has_keys && last_head) {
            if (DECAY == 1) state.scale_rows(lane_idx, [&](int) { return smem.decay.total; });
            state.add<CHUNK>(DECAY == 2 ? smem.kept[0] : smem.k[kv_stage][0], smem.v[kv_stage][0],
                             DECAY == 1 ? smem.decay.to_end : nullptr, lane_idx, [&](int token) {
                                 if (DECAY != 2) return;
                                 const float* s_block = smem.sums[DECAY == 2 ? token + BLOCK - 1 : 0];
                                 state.scale_rows(lane_idx, [&](int row) { return exp2_approx(s_block[row]); });
                             });
            note_largest();
        }
        step = following;
        if (NUM_STAGES > 1) {
            stage = 1 - stage;
            kv_stage = next_kv_stage;
        }
    }

    if (g_s_out == nullptr || !writes_state(params, work)) return;
    // SYNC: every warp has read the z that it began with, which may lie where this one writes.
    __syncthreads();
    const long long place = state_place(params, work, params.states_out) * params.head_dim;
    state.store(g_s_out + place * params.head_dim_v, g_z_out + place, params.head_dim, params.head_dim_v, first_col,
                num_cols, lane_idx);
    if (g_kept != nullptr && work.slice == 0) state.store_kept(g_kept + place, params.head_dim, lane_idx);
}
