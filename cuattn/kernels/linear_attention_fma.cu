// Linear attention by its recurrence, token after token, with IEEE fused multiply-adds: float32 and float64, and 16-bit
// elements where there are few tokens (decoding) or a decay for each channel of a key.
//
//     S = diag(e^decay) S + k (x) v        o = scale q S, or scale q S / (scale q z + eps)        z: S of ones
//
// A CTA walks over the tokens of a segment of a sequence with one slice of the columns of a state in registers. A warp
// owns WARP_COLS columns; LANES_D lanes share a column, each with ROWS of its rows. So a token takes no barrier: the
// products with q are summed over the lanes of a warp. Nothing but factors e^decay of single tokens is ever computed,
// so that no decay is too strong: -inf clears the state.
//
// A long sum of small terms is kept in two parts, `base` and what came since (`delta`): base is decayed by one running
// factor and gets delta added after every FOLD tokens. An error then grows with N / FOLD, not with N.
//
// A call without keys reads the state that it is given for every query; one without queries makes a state.
//
// Grid: linear_work.cuh. Block: NUM_WARPS warps.
//
// Constants: Element; HEAD_DIM (a bucket: the head dims proper are arguments), NUM_WARPS, TOKENS, SMEM_BYTES; DECAY
// (0: none, 1: one number a state, 2: one for each channel), NORMALIZE.
#include "common/elements.cuh"
#include "linear/decay.cuh"
#include "linear/feature_map.cuh"
#include "linear/linear_work.cuh"

using Real = RealOf<Element>::type;
using Params = LinearParams<Real>;

constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int LANES_D = sizeof(Real) == 8 ? (HEAD_DIM > 128 ? 32 : HEAD_DIM > 64 ? 16 : 8) : (HEAD_DIM > 128 ? 16 : 8);
constexpr int ROWS = HEAD_DIM / LANES_D;
constexpr int COLS = 8 / sizeof(Real);
constexpr int WARP_COLS = 32 / LANES_D * COLS;
constexpr int SLICE = NUM_WARPS * WARP_COLS;
constexpr int WIDTH = COLS + NORMALIZE;       // z rides as one more column, of values 1
constexpr int CHUNK = 16 / sizeof(Real);      // neighbouring rows of a lane: one access to shared memory
constexpr int DECAY_WIDTH = DECAY == 2 ? HEAD_DIM : CHUNK;
constexpr int FOLD = 64;

// A tile of tokens: as many as have their outputs fit into TOKENS rows.
struct Smem {
    alignas(16) Real k[TOKENS][HEAD_DIM];
    Real q[TOKENS][HEAD_DIM];  // row t * heads + h
    Real steps[DECAY == 0 ? 1 : TOKENS][DECAY_WIDTH];
    Real v[TOKENS][SLICE];
    Real out[TOKENS][SLICE];
};

static_assert(ROWS % CHUNK == 0, "a lane's rows are whole chunks");
static_assert(sizeof(Smem) == SMEM_BYTES, "launch.py and this file agree on the shared-memory plan");

struct alignas(16) Chunk {
    Real x[CHUNK];
};

// A lane's part of the state: rows row(r), columns of a lane, and z last.
struct LaneState {
    Real base[ROWS][WIDTH], delta[ROWS][WIDTH];
    Real factor[DECAY == 2 ? ROWS : 1];  // what base is to be multiplied by

    __device__ __forceinline__ Real at(int r, int c) const {
        return DECAY == 0 ? base[r][c] + delta[r][c] : fma(factor[DECAY == 2 ? r : 0], base[r][c], delta[r][c]);
    }

    __device__ __forceinline__ void fold() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < WIDTH; c++) {
                base[r][c] = at(r, c);
                delta[r][c] = 0;
            }
        }
#pragma unroll
        for (Real& x : factor) x = 1;
    }

    // Forgets row r.
    __device__ __forceinline__ void reset(int r) {
#pragma unroll
        for (int c = 0; c < WIDTH; c++) base[r][c] = delta[r][c] = 0;
    }
};

__device__ __forceinline__ int row_of(int r, int lane_d) {
    return r / CHUNK * LANES_D * CHUNK + lane_d * CHUNK + r % CHUNK;
}

__device__ __forceinline__ Chunk load_chunk(const Real* s_row, int r, int lane_d) {
    return *reinterpret_cast<const Chunk*>(s_row + row_of(r, lane_d));
}

// Rows of num_cols elements, mapped, to rows of COLUMNS; zeros behind them. row_at: where a row begins.
template <int COLUMNS, typename RowAt, typename Map>
__device__ __forceinline__ void load_rows(Real* s_rows, int num_rows, int num_cols, RowAt row_at, Map map) {
    for (int i = threadIdx.x; i < num_rows * COLUMNS; i += NUM_THREADS) {
        const int row = i / COLUMNS;
        const int col = i % COLUMNS;
        s_rows[i] = col < num_cols ? map(to_real(row_at(row)[col])) : Real(0);
    }
}

// The state after one more token.
__device__ __forceinline__ void advance(LaneState& state, const Real* s_k, const Real* s_steps, const Real* s_v,
                                        int lane_d) {
    Real v[WIDTH];
#pragma unroll
    for (int c = 0; c < WIDTH; c++) v[c] = c < COLS ? s_v[c] : Real(1);
    const Real step = DECAY == 1 ? s_steps[0] : Real(1);
    if (DECAY == 1) {
        if (step == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) state.reset(r);
        }
        state.factor[0] = decayed(state.factor[0], step);
    }
#pragma unroll
    for (int first = 0; first < ROWS; first += CHUNK) {
        const Chunk k = load_chunk(s_k, first, lane_d);
        Chunk steps;
        if (DECAY == 2) steps = load_chunk(s_steps, first, lane_d);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int r = first + i;
            const Real of_row = DECAY == 2 ? steps.x[i] : step;
            if (DECAY == 2) {
                if (of_row == 0) state.reset(r);
                state.factor[r] = decayed(state.factor[r], of_row);
            }
#pragma unroll
            for (int c = 0; c < WIDTH; c++) {
                const Real kept = DECAY == 0 ? state.delta[r][c] : decayed(state.delta[r][c], of_row);
                state.delta[r][c] = fma(k.x[i], v[c], kept);
            }
        }
    }
}

// The products of a query with this warp's columns of the state, for each lane of a column.
__device__ __forceinline__ void read_state(Real (&sums)[WIDTH], const LaneState& state, const Real* s_q, int lane_d) {
#pragma unroll
    for (Real& sum : sums) sum = 0;
#pragma unroll
    for (int first = 0; first < ROWS; first += CHUNK) {
        const Chunk q = load_chunk(s_q, first, lane_d);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
#pragma unroll
            for (int c = 0; c < WIDTH; c++) sums[c] = fma(q.x[i], state.at(first + i, c), sums[c]);
        }
    }
#pragma unroll
    for (int step = 1; step < LANES_D; step *= 2) {
#pragma unroll
        for (Real& sum : sums) sum += __shfl_xor_sync(0xffffffff, sum, step);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_attention_fma(
    const Element* __restrict__ g_q,      // [batch, seqlen_q, num_heads, head_dim]; null: no outputs
    const Element* __restrict__ g_k,      // [batch, seqlen_k, num_k_heads, head_dim]; null: the state is only read
    const Element* __restrict__ g_v,      // [batch, seqlen_k, num_v_heads, head_dim_v]
    const Real* __restrict__ g_decay,     // [batch, seqlen_k, num_states(, head_dim)], last axis contiguous
    const Real* g_s_in,                   // [batch, num_states, states_in, head_dim, head_dim_v]; null: zeros
    const Real* g_z_in,                   // [batch, num_states, states_in, head_dim]
    Element* __restrict__ g_out,          // [batch, seqlen_q, num_outputs, head_dim_v]
    Real* g_s_out,                        // like g_s_in, states_out; or null. It may be g_s_in
    Real* g_z_out,                        // like g_z_in
    const int* __restrict__ g_cu_seqlens, // [batch + 1]: q, k, v, decay and out are packed, without a batch axis
    const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / 32;
    const int lane_d = threadIdx.x % LANES_D;
    const int lane_col = warp_idx * WARP_COLS + threadIdx.x % 32 / LANES_D * COLS;  // within the slice

    const bool has_keys = g_k != nullptr;
    const LinearWork work = linear_work(params, g_cu_seqlens, has_keys ? params.seqlen_k : params.seqlen_q);
    const int heads = g_q != nullptr ? work.num_outputs : 0;
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

    LaneState state;
    const long long place_in = state_place(params, work, params.states_in);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = row_of(r, lane_d);
        const bool exists = g_s_in != nullptr && row < params.head_dim;
        const long long s_row = (place_in * params.head_dim + row) * params.head_dim_v + first_col;
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            state.delta[r][c] = 0;
            if (c < COLS) {
                state.base[r][c] = exists && lane_col + c < num_cols ? g_s_in[s_row + lane_col + c] : Real(0);
            } else {
                state.base[r][c] = exists ? g_z_in[place_in * params.head_dim + row] : Real(0);
            }
        }
    }
#pragma unroll
    for (Real& x : state.factor) x = 1;

    const int tile_tokens = heads > 1 ? TOKENS / heads : TOKENS;
    int since_fold = 0;
    for (int first = work.first_token; first < work.end_token; first += tile_tokens) {
        const int num_tokens = min(tile_tokens, work.end_token - first);
        with_feature_map<Real>(params.feature_map, [&](auto map) {
            if (has_keys) {
                load_rows<HEAD_DIM>(smem.k[0], num_tokens, params.head_dim, [&](int t) {
                    return g_k + (first + t) * params.k.seq;
                }, map);
            }
            load_rows<HEAD_DIM>(smem.q[0], num_tokens * heads, params.head_dim, [&](int row) {
                const int t = row / heads;
                const int head = (work.first_output + row - t * heads) / params.outputs_per_q_head;
                return g_q + (first + t) * params.q.seq + head * params.q.head;
            }, map);
        });
        if (has_keys) {
            load_rows<SLICE>(smem.v[0], num_tokens, num_cols, [&](int t) { return g_v + (first + t) * params.v.seq; },
                             [](Real x) { return x; });
            if (DECAY != 0) {
                load_rows<DECAY_WIDTH>(smem.steps[0], num_tokens, DECAY == 2 ? params.head_dim : 1, [&](int t) {
                    return g_decay + (first + t) * params.decay.seq;
                }, [](Real x) { return decay_step(x); });
            }
        }
        // SYNC: the tile is in shared memory; and the outputs of the tile before have been stored.
        __syncthreads();
        for (int t = 0; t < num_tokens; t++) {
            if (has_keys) advance(state, smem.k[t], smem.steps[DECAY == 0 ? 0 : t], smem.v[t] + lane_col, lane_d);
            for (int h = 0; h < heads; h++) {
                const int row = t * heads + h;
                Real sums[WIDTH];
                read_state(sums, state, smem.q[row], lane_d);
                if (lane_d == 0) {
                    const Real below = NORMALIZE ? fma(params.scale, sums[WIDTH - 1], params.eps) : Real(1);
#pragma unroll
                    for (int c = 0; c < COLS; c++) {
                        smem.out[row][lane_col + c] = below == 0 ? Real(0) : params.scale * sums[c] / below;
                    }
                }
            }
        }
        since_fold += num_tokens;
        if (since_fold >= FOLD) {
            state.fold();
            since_fold = 0;
        }
        // SYNC: the outputs are in shared memory, and every warp is done with the tile.
        __syncthreads();
        for (int i = threadIdx.x; i < num_tokens * heads * SLICE; i += NUM_THREADS) {
            const int row = i / SLICE;
            const int col = i % SLICE;
            const int t = row / heads;
            if (col < num_cols) {
                Element* g_row = g_out + (first + t) * params.out.seq + (row - t * heads) * params.out.head;
                from_real(smem.out[row][col], g_row[col]);
            }
        }
    }

    if (g_s_out == nullptr || !writes_state(params, work)) return;
    // SYNC: every warp has read the z that it began with, which may lie where this one writes.
    __syncthreads();
    const long long place_out = state_place(params, work, params.states_out);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = row_of(r, lane_d);
        if (row >= params.head_dim) continue;
        const long long s_row = (place_out * params.head_dim + row) * params.head_dim_v + first_col;
#pragma unroll
        for (int c = 0; c < COLS; c++) {
            if (lane_col + c < num_cols) g_s_out[s_row + lane_col + c] = state.at(r, c);
        }
        if (NORMALIZE && work.slice == 0 && lane_col == 0) {
            g_z_out[place_out * params.head_dim + row] = state.at(r, WIDTH - 1);
        }
    }
}
