// Attention of few queries to many cached keys, on tensor cores (mma.sync, cp.async; sm_80 and newer): 16-bit queries,
// keys and values in 16 bits or in a narrower format (kv_decode.cuh), contiguous or on pages (cached_keys.cuh).
//
//     out = softmax(logits) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// One CTA computes up to BLOCK_M query rows, tokens times the heads of one key/value head, against one split of the
// sequence's keys (decode_block.cuh). It walks over its split in tiles of BLOCK_N keys. With so few rows there is one
// warp's worth of them in a tile, so that WARPS_N warps share the keys of each tile, each with an online softmax of its
// own; their states meet in shared memory after the last tile, always in the same order. (Dao et al., "Flash-Decoding
// for long-context inference", 2023; Kwon et al., "Efficient memory management for large language model serving with
// PagedAttention", 2023.)
//
// Grid: decode_block.cuh.
// Block: WARPS_M * WARPS_N warps; warp w has rows [w / WARPS_N * WARP_M, ...) and, of each tile, keys
// [w % WARPS_N * WARP_KEYS, ...).
//
// Constants: Storage (of keys and values in memory), Element (of q, and on chip), Output (the same, or float); BLOCK_M,
// BLOCK_N, HEAD_DIM and HEAD_DIM_V (buckets), COLUMN_BLOCKS, WARPS_M, WARPS_N, NUM_STAGES, SMEM_BYTES; ALIGNED (bases
// and strides of q, keys and values: multiples of 16 bytes); PAGED, SLOT_SCALES (each cached row has a scale);
// BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI (logits.cuh), ROTATE (RoPE of q, and of keys on request),
// INTERLEAVED, TABLES, Table (rope.cuh).
#include "attention/column_block.cuh"
#include "decode/decode_block.cuh"
#include "rotary/rotate_tile.cuh"
#include "attention/score_tile.cuh"

using Params = DecodeParams<float>;

constexpr int NUM_WARPS = WARPS_M * WARPS_N;
constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int WARP_M = BLOCK_M / WARPS_M;
constexpr int WARP_KEYS = BLOCK_N / WARPS_N;
constexpr int ROW_TILES = WARP_M / MMA_M;
constexpr int PART_STRIDE = HEAD_DIM_V + 4;

#include "decode/tile_stages.cuh"

using Tiles = CachedTiles<Storage, CONVERT>;

// Shared memory of a CTA. The states of the warps take the place of the tiles once the last tile is done.
union Smem {
    struct {
        Element q[BLOCK_M][QK_STRIDE];
        Tiles tiles;
    };
    struct {
        float row_max[WARPS_N][BLOCK_M];
        float row_sum[WARPS_N][BLOCK_M];
        float out[WARPS_N][BLOCK_M][PART_STRIDE];
    } parts;
    __device__ Smem() {}
};

static_assert(ROW_TILES * MMA_M * WARPS_M == BLOCK_M, "every row belongs to one warp, in whole mma tiles");
static_assert(WARP_KEYS % 16 == 0 && WARP_KEYS * WARPS_N == BLOCK_N, "every key belongs to one warp, in k steps");
static_assert(NUM_STAGES >= 2, "the next tile loads while this one is used");
static_assert(CONVERT || !SLOT_SCALES, "elements have no scales");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

using Layout = AccLayout<ROW_TILES, WARP_KEYS>;
using Scores = Layout::Tile;

// What a lane knows of one of the rows that its accumulators belong to: AccLayout.
struct LaneRow {
    int token;                // within the sequence
    KeyBand::RowBounds keys;  // that it sees
    float alibi_slope;
};

struct WarpState {
    AccTiles<ROW_TILES, HEAD_DIM_V> acc_out;
    SoftmaxRow rows[ROW_TILES][2];
};

// Leaves the state of a warp in shared memory: maximum and sum of its rows, and the output that they belong to.
__device__ __forceinline__ void stage_state(WarpState& state, Smem& smem, int part, int first_row, float scale,
                                            float scale_log2, int lane_idx) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + t * MMA_M + half * 8 + frag_acc_row(lane_idx);
            finish_softmax(state.rows[t][half], scale, scale_log2);
            if (lane_idx % 4 == 0) {
                smem.parts.row_max[part][row] = state.rows[t][half].max_logit;
                smem.parts.row_sum[part][row] = state.rows[t][half].sum;
            }
#pragma unroll
            for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
                store_pair(&smem.parts.out[part][row][e * MMA_N + frag_acc_col(lane_idx)],
                           state.acc_out[t][e][2 * half], state.acc_out[t][e][2 * half + 1]);
            }
        }
    }
}

// The states of a row's parts, put together.
struct MergedRow {
    SoftmaxRow total;
    float weights[WARPS_N];  // of the parts' outputs
};

__device__ __forceinline__ MergedRow merge_parts(const Smem& smem, int row, const float* g_sink) {
    MergedRow merged;
    merged.total.reset();
#pragma unroll
    for (int part = 0; part < WARPS_N; part++) merged.total.raise_max(smem.parts.row_max[part][row]);
#pragma unroll
    for (int part = 0; part < WARPS_N; part++) {
        const float difference = smem.parts.row_max[part][row] - merged.total.reference();
        merged.weights[part] = exp2_approx(SoftmaxRow::exponent(difference));
        merged.total.sum += merged.weights[part] * smem.parts.row_sum[part][row];
    }
    float correction = 1.0f;
    if (g_sink != nullptr) {
        float term;
        merged.total.sink_exponents(*g_sink, correction, term);
        correction = exp2_approx(correction);
        merged.total.sum = merged.total.sum * correction + exp2_approx(term);
    }
    correction *= merged.total.inverse_sum();
#pragma unroll
    for (int part = 0; part < WARPS_N; part++) merged.weights[part] *= correction;
    return merged;
}

// One warp writes a row of the result, or of a partial one. `pairs`: its address is a multiple of two elements.
template <typename Result>
__device__ __forceinline__ void store_row(Result* g_row, const Smem& smem, const MergedRow& merged, int row,
                                          float factor, int num_cols, bool pairs, int lane_idx) {
#pragma unroll
    for (int col = 2 * lane_idx; col < HEAD_DIM_V; col += 2 * WARP_SIZE) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int part = 0; part < WARPS_N; part++) {
            const float2 x = *reinterpret_cast<const float2*>(&smem.parts.out[part][row][col]);
            sum.x += merged.weights[part] * x.x;
            sum.y += merged.weights[part] * x.y;
        }
        Run<Result, 2> result;
        result.set(0, sum.x * factor);
        result.set(1, sum.y * factor);
        if (pairs && col + 2 <= num_cols) {
            result.store(g_row + col);
        } else {
            if (col < num_cols) g_row[col] = result.element[0];
            if (col + 1 < num_cols) g_row[col + 1] = result.element[1];
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_decode(
    const Element* __restrict__ g_q,         // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Storage* __restrict__ g_k,         // [num_pages, page_size, num_kv_heads, head_dim], or contiguous:
    const Storage* __restrict__ g_v,         // [batch, capacity, ...], head_dim_v
    // From here on, null is what a call does not use.
    Output* __restrict__ g_out,              // [batch, seqlen_q, num_heads, head_dim_v]
    float* __restrict__ g_lse,               // [batch, num_heads, seqlen_q], contiguous
    float* __restrict__ g_partial_out,       // [num_partials, num_heads, head_dim_v], contiguous: decode_block.cuh
    float* __restrict__ g_partial_state,     // [num_partials, num_heads, 2]: maximum and sum, merge.cuh
    const int* __restrict__ g_seqlens_k,     // [batch]
    const int* __restrict__ g_block_tables,  // [batch, max_pages]; entries beyond a sequence's length are not read
    const int* __restrict__ g_cu_seqlens_q,  // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
                                             // [num_heads, tokens]
    const float* __restrict__ g_k_scale,     // [1] or [num_kv_heads]; or, with SLOT_SCALES, like keys without head_dim
    const float* __restrict__ g_v_scale,     // likewise
    const unsigned char* __restrict__ g_k_block_scales,  // like keys, head_dim / block size
    const unsigned char* __restrict__ g_v_block_scales,  // likewise
    const float* __restrict__ g_alibi_slopes,            // [batch or 1, num_heads]
    const float* __restrict__ g_sinks,                   // [num_heads]
    const unsigned long long* __restrict__ g_turns,      // of RoPE: rope.cuh
    const Table* __restrict__ g_cos,
    const Table* __restrict__ g_sin,
    const int* __restrict__ g_work,                      // [num_work, 2 or 3]: decode_block.cuh
    const int* __restrict__ g_splits,                    // [batch, 2]: likewise
    const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int part = warp_idx % WARPS_N;
    const int first_row = warp_idx / WARPS_N * WARP_M;  // of this warp

    const ColumnBlock columns(params.head_dim_v);
    const DecodeBlock block =
        decode_block(params, columns.cta_idx, g_seqlens_k, g_cu_seqlens_q, g_work, g_splits);
    if (!block.has_work()) return;
    const int last_token = block.first_token + block.num_tokens - 1;
    const KeyBand band(params, block);
    const KeyTiles tiles(band, BLOCK_N, block.first_token, last_token);
    const SplitTiles split(tiles, block);

    // Keys behind the last one that a query of the block sees are not read, whatever they hold.
    const CachedKeys<PAGED> keys(params, g_block_tables, block.batch_idx, band.end(last_token));
    const CachedRows<Storage> k_rows(g_k, params.k, SLOT_SCALES ? g_k_scale : nullptr, params.k_scale,
                                     g_k_block_scales, params.k_blocks, block.kv_head_idx);
    const CachedRows<Storage> v_rows(g_v, params.v, SLOT_SCALES ? g_v_scale : nullptr, params.v_scale,
                                     g_v_block_scales, params.v_blocks, block.kv_head_idx, columns.first);
    float scale = params.scale, scale_log2 = params.scale_log2, out_factor = INVERSE_P_FACTOR;
    if (!SLOT_SCALES && g_k_scale != nullptr) {
        const float k_scale = g_k_scale[block.kv_head_idx * params.k_scale.head];
        scale *= k_scale;
        scale_log2 *= k_scale;
    }
    if (!SLOT_SCALES && g_v_scale != nullptr) out_factor *= g_v_scale[block.kv_head_idx * params.v_scale.head];

    const bool packed = g_cu_seqlens_q != nullptr;
    g_q += packed ? block.q_start * params.q.seq : block.batch_idx * params.q.batch;
    g_out += (packed ? block.q_start * params.out.seq : block.batch_idx * params.out.batch) + columns.first;
    auto load_queries = [&]() {
        gather_rows<ALIGNED, sizeof(Element), BLOCK_M, HEAD_DIM * sizeof(Element), QK_STRIDE * sizeof(Element),
                    NUM_THREADS>(reinterpret_cast<unsigned char*>(smem.q), params.head_dim * sizeof(Element), g_q,
                                 [&](int row) {
                                     const QueryRow query = query_row(params, block, row);
                                     return query.exists ? g_q + query.token * params.q.seq +
                                                               query.head * params.q.head
                                                         : nullptr;
                                 });
    };
    auto load_keys = [&](int tile_idx, int stage) {
        const auto place_of = [&](int row) { return keys.find(tile_idx * BLOCK_N + row); };
        gather_keys<ALIGNED, BLOCK_N, HEAD_DIM, HEAD_DIM_V, Tiles::K_LANDING_STRIDE, Tiles::V_LANDING_STRIDE,
                    NUM_THREADS>(smem.tiles.k_landing(stage), smem.tiles.v_landing(stage), k_rows, v_rows,
                                 params.head_dim, columns.count, place_of);
        smem.tiles.load_scales(stage, k_rows, v_rows, params.head_dim, columns.count, place_of);
    };

    LaneRow rows[Layout::ROWS];
    WarpState state;
    clear(state.acc_out);
#pragma unroll
    for (int r = 0; r < Layout::ROWS; r++) {
        const QueryRow query = query_row(params, block, first_row + Layout::row(r) + frag_acc_row(lane_idx));
        LaneRow& row = rows[r];
        row.token = query.token;
        row.keys = query.exists ? band.row(query.token) : KeyBand::RowBounds{0, 0};
        row.alibi_slope = 0.0f;
        if (ALIBI && g_alibi_slopes != nullptr && query.exists) {
            row.alibi_slope = g_alibi_slopes[block.batch_idx * params.alibi_batch + query.head];
        }
        state.rows[r / 2][r % 2].reset();
    }
    KeyBand::RowBounds warp_keys{UNBOUNDED, 0};  // that this warp's rows see
    {
        const QueryRow first = query_row(params, block, first_row);
        if (first.exists) {
            const QueryRow last = query_row(params, block, first_row + WARP_M - 1);
            warp_keys = band.rows(first.token, min(last.token, last_token));
        }
    }

    int load_idx = split.begin;
    if (split.begin < split.end) load_queries();
#pragma unroll
    for (int stage = 0; stage < NUM_STAGES - 1; stage++) {
        if (load_idx < split.end) load_keys(load_idx++, stage);
        cp_async_commit();
    }
    const TileRotations rotations(g_turns, params.num_pairs, g_cos, g_sin, params.tables);

    for (int tile_idx = split.begin, stage = 0; tile_idx < split.end; tile_idx++, stage = (stage + 1) % NUM_STAGES) {
        cp_async_wait<NUM_STAGES - 2>();
        // SYNC: every thread's part of this tile (and of q) has landed; and every warp is done with the tile before,
        // whose stage the next load overwrites.
        __syncthreads();
        if (load_idx < split.end) load_keys(load_idx++, (stage + NUM_STAGES - 1) % NUM_STAGES);
        cp_async_commit();  // an empty group at the end keeps the count that cp_async_wait relies on
        const int first_key = tile_idx * BLOCK_N;
        if constexpr (CONVERT) {
            smem.tiles.convert(stage);
            // SYNC: the tile is in elements before it is turned, or multiplied.
            __syncthreads();
        }
        if constexpr (ROTATE) {
            if (tile_idx == split.begin) {
                rotate_tile<HEAD_DIM, NUM_THREADS>(smem.q[0], BLOCK_M, rotations, params.num_pairs,
                                                   params.rotary_vectors, [&](int row) {
                                                       const QueryRow query = query_row(params, block, row);
                                                       return static_cast<long long>(query.token) +
                                                              block.seqlen_k - block.seqlen_q;
                                                   });
            }
            if (params.rotate_keys) {
                rotate_tile<HEAD_DIM, NUM_THREADS>(smem.tiles.k_tile(stage), min(BLOCK_N, block.seqlen_k - first_key),
                                                   rotations, params.num_pairs, params.rotary_vectors,
                                                   [&](int row) { return static_cast<long long>(first_key) + row; });
            }
            // SYNC: queries and keys are turned before any warp multiplies them.
            __syncthreads();
        }
        const int warp_key = first_key + part * WARP_KEYS;
        // Nothing that this warp's queries may see?
        if (!warp_keys.meet(warp_key, WARP_KEYS)) continue;

        const int lane_key = warp_key + frag_acc_col(lane_idx);
        const unsigned s_q = smem_address(smem.q) + lane_offset_a<HEAD_DIM>(first_row, lane_idx);
        const unsigned s_k = smem_address(smem.tiles.k_tile(stage) + part * WARP_KEYS * QK_STRIDE) +
                             lane_offset_bt<HEAD_DIM>(lane_idx);
        const unsigned s_v = smem_address(smem.tiles.v_tile(stage) + part * WARP_KEYS * V_STRIDE) +
                             lane_offset_b<HEAD_DIM_V>(lane_idx);
        Scores scores;
        multiply_abt<HEAD_DIM>(scores, s_q, s_k);
        const HeadRows alibi_rows(
            [&](int r) { return rows[r].alibi_slope; },
            [&](int r) { return alibi_distance<float>(rows[r].token, block.diagonal_offset, lane_key); });
        softmax_logits<Layout>(scores, params, scale, scale_log2, alibi_rows);
        if (!tiles.in_full(tile_idx)) {
            hide_by_position<Layout>(scores, negative_infinity<float>(),
                                     [&](int r) { return rows[r].keys.from(lane_key); });
        }
        softmax_step(state.acc_out, state.rows, scores, positive_scale_log2(scale_log2));
        multiply_add(Element(), state.acc_out, scores, s_v);
    }

    // SYNC: every warp is done with q, keys and values, whose place the states take.
    __syncthreads();
    stage_state(state, smem, part, first_row, scale, scale_log2, lane_idx);
    // SYNC: the states of all warps are in shared memory before rows are put together.
    __syncthreads();
    const bool pairs = ((reinterpret_cast<unsigned long long>(g_out) | params.out.seq * sizeof(Output) |
                         params.out.head * sizeof(Output)) & (2 * sizeof(Output) - 1)) == 0;
    for (int row = warp_idx; row < BLOCK_M; row += NUM_WARPS) {
        const QueryRow query = query_row(params, block, row);
        if (!query.exists) continue;
        if (block.is_whole()) {
            const MergedRow merged = merge_parts(smem, row, g_sinks == nullptr ? nullptr : g_sinks + query.head);
            store_row(g_out + query.token * params.out.seq + query.head * params.out.head, smem, merged, row,
                      out_factor, columns.count, pairs, lane_idx);
            if (g_lse != nullptr && columns.is_first() && lane_idx == 0) {
                g_lse[block.batch_idx * params.lse_batch + query.head * params.lse_head +
                      (packed ? block.q_start : 0) + query.token] = merged.total.lse();
            }
        } else {
            const MergedRow merged = merge_parts(smem, row, nullptr);
            const long long partial = block.partial_row(query.token) * params.num_heads + query.head;
            store_row(g_partial_out + partial * params.head_dim_v + columns.first, smem, merged, row, out_factor,
                      columns.count, params.head_dim_v % 2 == 0, lane_idx);
            if (columns.is_first() && lane_idx == 0) {
                g_partial_state[2 * partial] = merged.total.max_logit;
                g_partial_state[2 * partial + 1] = merged.total.sum;
            }
        }
    }
}
