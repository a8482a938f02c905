// Linear attention on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer), for 16-bit elements and one
// decay a token and state, or none.
//
//     S_t = e^g_t S_{t-1} + k_t (x) v_t        o_t = scale q_t S_t, or scale q_t S_t / (scale q_t z_t + eps)
//
// A CTA has a slice of the columns of a state in the accumulators of its warps (linear_state.cuh), and walks over the
// tokens of a segment in chunks. With G the running sum of g within the chunk (chunk_decay.cuh), for a chunk's rows:
//
//     A = (Q K^T) e^(G_i - G_j), j <= i;    O = A V + e^G_i (Q S);    S <- e^G_last S + (e^(G_last - G_j) K)^T V
//
// A and S are rounded to elements before they are multiplied. z, the sum of keys, is one more column: of V it would be
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
// begin at multiples of 16 bytes); DECAY (0: none, 1: one number a state and token), NORMALIZE.
#include "common/elements.cuh"
#include "hopper/quad_store.cuh"
#include "linear/chunk_decay.cuh"
#include "linear/feature_map.cuh"
#include "linear/linear_state.cuh"
#include "linear/linear_work.cuh"

using Params = LinearParams<float>;

constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int WARPS_M = CHUNK / MMA_M < NUM_WARPS ? CHUNK / MMA_M : NUM_WARPS;
constexpr int OUT_COLS = SLICE / (NUM_WARPS / WARPS_M);
constexpr int OUT_TILES = OUT_COLS / MMA_N;
constexpr int STORED_TILES = (OUT_TILES + 3) / 4 * 4;  // quad_store.cuh takes four at a time
constexpr int CHUNK_TILES = CHUNK / MMA_N;

struct Smem {
    Element q[NUM_STAGES][CHUNK][TILE_STRIDE<HEAD_DIM>];
    Element k[NUM_STAGES][CHUNK][TILE_STRIDE<HEAD_DIM>];
    Element v[NUM_STAGES][CHUNK][TILE_STRIDE<SLICE>];
    Element state[HEAD_DIM][STATE_STRIDE];
    ChunkDecay<CHUNK> decay;
    float largest[NUM_WARPS];  // of each warp's part of the state
};

static_assert(WARPS_M * MMA_M == CHUNK, "a warp has one tile of rows of a chunk");
static_assert(OUT_COLS % 16 == 0 && CHUNK % 32 == 0, "products are in pairs of tiles");
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
        for (int i = threadIdx.x; i < ROWS * RUNS; i += NUM_THREADS) {
            const int row = i / RUNS;
            const int col = i % RUNS * RUN;
            if (row >= num_rows || col >= num_cols) continue;
            Element* s_run = s_tile + row * TILE_STRIDE<HEAD_DIM> + col;
            Run<Element, RUN> run;
            run.load(s_run);
#pragma unroll
            for (int j = 0; j < RUN; j++) {
                if (col + j < num_cols) run.set(j, map(run.get(j)));
            }
            run.store(s_run);
        }
    });
}

// What a warp computes of one output head: its 16 rows.
struct OutputTile {
    AccTiles<1, CHUNK> weights;
    AccTiles<1, OUT_COLS> out;
    float below[1][1][4];  // the denominators, in the columns 0 and 1

    // q S and q K^T. s_q, s_k, s_state: fragment addresses of this lane; s_sums that of the columns of z.
    __device__ __forceinline__ void multiply(unsigned s_q, unsigned s_k, unsigned s_state, unsigned s_sums,
                                             bool has_keys, int last_row) {
        clear(weights);
        clear(out);
        clear(below);
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += MMA_M) {
            unsigned frag_q[4];
            ldmatrix_x4(frag_q, s_q + d * sizeof(Element));
            if (has_keys) {
#pragma unroll
                for (int n = 0; n < CHUNK_TILES; n += 2) {
                    if (n * MMA_N > last_row) continue;
                    unsigned frag_k[4];
                    ldmatrix_x4(frag_k, s_k + (n * MMA_N * TILE_STRIDE<HEAD_DIM> + d) * sizeof(Element));
                    mma(Element(), weights[0][n], frag_q, frag_k[0], frag_k[1]);
                    mma(Element(), weights[0][n + 1], frag_q, frag_k[2], frag_k[3]);
                }
            }
#pragma unroll
            for (int e = 0; e < OUT_TILES; e += 2) {
                unsigned frag_s[4];
                ldmatrix_x4_trans(frag_s, s_state + (d * STATE_STRIDE + e * MMA_N) * sizeof(Element));
                mma(Element(), out[0][e], frag_q, frag_s[0], frag_s[1]);
                mma(Element(), out[0][e + 1], frag_q, frag_s[2], frag_s[3]);
            }
            if (NORMALIZE) {
                unsigned frag_z[4];
                ldmatrix_x4_trans(frag_z, s_sums + d * STATE_STRIDE * sizeof(Element));
                mma(Element(), below[0][0], frag_q, frag_z[0], frag_z[1]);
            }
        }
    }

    // Multiplies what came from the state, of the two rows of this lane.
    __device__ __forceinline__ void scale_rows(float upper, float lower) {
        auto scale = [&](float (&acc)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float factor = i < 2 ? upper : lower;
                acc[i] = factor == 0.0f ? 0.0f : acc[i] * factor;
            }
        };
#pragma unroll
        for (int e = 0; e < OUT_TILES; e++) scale(out[0][e]);
        if (NORMALIZE) scale(below[0][0]);
    }

    // Hides later keys, and lets weights decay.
    __device__ __forceinline__ void decay_weights(const ChunkDecay<CHUNK>& decay, int first_row, int lane_idx) {
        TokenDecay rows[2];
        if (DECAY) {
            rows[0].load(decay, first_row + frag_acc_row(lane_idx));
            rows[1].load(decay, first_row + frag_acc_row(lane_idx) + 8);
        }
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n++) {
            if (n * MMA_N > first_row + MMA_M - 1) continue;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int column = n * MMA_N + frag_acc_col(lane_idx) + j;
                TokenDecay key;
                if (DECAY) key.load(decay, column);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& weight = weights[0][n][2 * half + j];
                    const bool seen = column <= first_row + half * 8 + frag_acc_row(lane_idx);
                    const float factor = DECAY ? rows[half].since(key) : 1.0f;
                    weight = seen && factor != 0.0f ? weight * factor : 0.0f;
                }
            }
        }
    }

    // Factors that bring the weights of this lane's two rows into the range of a __half.
    __device__ __forceinline__ void weight_range(float& upper, float& lower) const {
        float largest[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) largest[i / 2] = fmaxf(largest[i / 2], fabsf(weights[0][n][i]));
        }
        upper = half_range_factor(quad_max(largest[0]));
        lower = half_range_factor(quad_max(largest[1]));
    }

    // Adds the weights times v, and their sums. s_v: fragment address of this lane.
    __device__ __forceinline__ void add_values(unsigned s_v, float upper, float lower, int last_row, int lane_idx) {
        const unsigned ones = ones_fragment(lane_idx);
#pragma unroll
        for (int n = 0; n < CHUNK_TILES; n += 2) {
            if (n * MMA_N > last_row) continue;
            if (NARROW_RANGE<Element>) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    weights[0][n][i] *= i < 2 ? upper : lower;
                    weights[0][n + 1][i] *= i < 2 ? upper : lower;
                }
            }
            unsigned frag[4];
            frag_a_from_acc<Element>(frag, weights[0][n], weights[0][n + 1]);
#pragma unroll
            for (int e = 0; e < OUT_TILES; e += 2) {
                unsigned frag_v[4];
                ldmatrix_x4_trans(frag_v, s_v + (n * TILE_STRIDE<SLICE> + e) * MMA_N * sizeof(Element));
                mma(Element(), out[0][e], frag, frag_v[0], frag_v[1]);
                mma(Element(), out[0][e + 1], frag, frag_v[2], frag_v[3]);
            }
            if (NORMALIZE) mma(Element(), below[0][0], frag, ones, ones);
        }
    }

    // Writes this warp's rows; g_rows at its first row and column.
    __device__ __forceinline__ void store(Element* g_rows, const Params& params, float upper, float lower, int num_rows,
                                          int num_cols, int lane_idx) {
        const unsigned long long places = reinterpret_cast<unsigned long long>(g_rows) | params.out.seq * sizeof(Element);
        const bool vectors = num_cols % 8 == 0 && places % 16 == 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = half * 8 + frag_acc_row(lane_idx);
            const float range = half == 0 ? upper : lower;
            float factor = params.scale / range;
            if (NORMALIZE) {
                const float sums = (below[0][0][2 * half] + below[0][0][2 * half + 1]) / range;
                const float denominator =
                    fmaf(params.scale, __shfl_sync(0xffffffff, sums, lane_idx & ~3), params.eps);
                factor = denominator == 0.0f ? 0.0f : params.scale / denominator / range;
            }
            unsigned pairs[STORED_TILES];
#pragma unroll
            for (int e = 0; e < STORED_TILES; e++) {
                pairs[e] = 0;
                if (e < OUT_TILES && factor != 0.0f) {
                    pairs[e] = pack_pair(Element(), out[0][e][2 * half] * factor, out[0][e][2 * half + 1] * factor);
                }
            }
            store_quad_row(g_rows + row * params.out.seq, pairs, num_cols, vectors, row < num_rows, lane_idx);
        }
    }
};

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
        if (!DECAY || warp_idx != 0 || !has_keys) return;
#pragma unroll
        for (int i = 0; i < CHUNK / 32; i++) {
            const int token = first_token + lane_idx * (CHUNK / 32) + i;
            decay[i] = token < work.end_token ? g_decay[token * params.decay.seq] : 0.0f;
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
            if (DECAY && warp_idx == 0 && has_keys) {
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
        if (has_queries && first_row < step.num_rows) {
            OutputTile tile;
            tile.multiply(smem_address(smem.q[stage]) + lane_offset_a<HEAD_DIM>(first_row, lane_idx),
                          smem_address(smem.k[kv_stage]) + lane_offset_bt<HEAD_DIM>(lane_idx),
                          smem_address(smem.state) + lane_offset_b<SLICE>(lane_idx) + out_col * sizeof(Element),
                          smem_address(&smem.state[frag_b_trans_k(lane_idx)][SLICE]), has_keys, last_row);
            float upper = 1.0f, lower = 1.0f;
            if (has_keys) {
                tile.decay_weights(smem.decay, first_row, lane_idx);
                if (NARROW_RANGE<Element>) tile.weight_range(upper, lower);
            }
            if (DECAY || NARROW_RANGE<Element>) {
                const int row = first_row + frag_acc_row(lane_idx);
                const bool decays = DECAY && has_keys;
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
            if (DECAY) state.scale(smem.decay.total);
            state.add<CHUNK>(smem.k[kv_stage][0], smem.v[kv_stage][0], DECAY ? smem.decay.to_end : nullptr, lane_idx);
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
}
