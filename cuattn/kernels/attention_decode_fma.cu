// Attention of few queries to many cached keys without tensor cores: float32 and float64 with IEEE fused multiply-adds,
// and 16-bit queries in float; keys and values in any format (kv_decode.cuh), contiguous or on pages (cached_keys.cuh).
//
//     out = softmax(logits) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// One CTA computes BLOCK_M query rows, tokens times the heads of one key/value head, against one split of the
// sequence's keys (decode_block.cuh). Keys and values go straight from global memory to registers, in 16-byte loads,
// and each is used once: there is no shared memory and no barrier between the loads and the sums, so that warps need
// not wait for one another. LANES neighbouring lanes hold a key (decode_lanes.cuh); each such group has an online
// softmax of its own, and works on KEYS keys at a time: that many loads are under way together, and the output is
// rescaled at most once for all of them. The states of the groups are put together by shuffles, those of the warps
// through shared memory, always in the same order. (Dao et al., "Flash-Decoding for long-context inference", 2023;
// Milakov and Gimelshein, 2018.)
//
// Accuracy: sums are in Accumulator; a dot product is at most 16 terms in a lane and then a tree over the lanes. For
// 16-bit queries exp2 and tanh are the approximate ones of the tensor-core kernel, else within 2 ulp.
//
// Grid: decode_block.cuh.
// Block: WARPS_M * WARPS_N warps; warp w has rows [w / WARPS_N * ROWS, ...), and takes turns with the WARPS_N warps of
// those rows in steps of WARP_KEYS keys.
//
// Constants: Storage (of keys and values in memory), Element (float or double, and the same as Accumulator), Query (of
// q), Output (the same, or Element); BLOCK_M, BLOCK_N (keys of a step of all warps), HEAD_DIM and HEAD_DIM_V (buckets),
// COLUMN_BLOCKS, WARPS_M, WARPS_N, SMEM_BYTES; ALIGNED (rows of q, keys and values, and of tables of rotations, are
// whole 16-byte pieces at multiples of 16 bytes; so are the pairs that RoPE turns); PAGED, SLOT_SCALES (each cached row
// has a scale); BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI (logits.cuh), ROTATE (RoPE of q, and of keys on
// request), INTERLEAVED, TABLES, Table (rope.cuh).
#include "decode/cached_keys.cuh"
#include "attention/column_block.cuh"
#include "decode/decode_block.cuh"
#include "decode/lane_softmax.cuh"
#include "common/narrow.cuh"
#include "attention/logits.cuh"

constexpr int NUM_THREADS = WARPS_M * WARPS_N * WARP_SIZE;

using Params = DecodeParams<Real>;
using KeyColumns = LaneColumns<Storage, HEAD_DIM, ROTATE && !INTERLEAVED>;
using KeyRow = Real[KeyColumns::PER_LANE];
using ValueRow = Real[ValueColumns::PER_LANE];
using AllRotations = Rotations<TABLES, Real, Table>;
using Layout = OwnLayout<Real, sizeof(Query) == 2>;

// Shared memory of a CTA: what the warps have found in their keys.
struct Smem {
    Real out[WARPS_N][BLOCK_M][HEAD_DIM_V];
    Real row_max[WARPS_N][BLOCK_M];
    Real row_sum[WARPS_N][BLOCK_M];
};

static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

// The row whose logits a lane computes.
struct LogitRow {
    KeyBand::RowBounds keys;     // that it sees
    Real alibi_slope, position;  // of ALiBi: the key that the query is aligned with
};

// The scale of a cached row; 1 where only keys have scales, or only values.
__device__ __forceinline__ float scale_of(const CachedRows<Storage>& rows, const KeyPlace& place) {
    return place.exists && rows.g_scales != nullptr ? rows.scale(place) : 1.0f;
}

// Leaves the state of a warp in shared memory; the groups take turns with its rows.
__device__ __forceinline__ void stage_state(const LaneState& state, Smem& smem, int part, int first_row,
                                            const ValueColumns& columns, int group_idx) {
    const OwnPairs own(columns.lane);
    if (group_idx == 0 && columns.lane % LANES_PER_ROW == 0) {
        smem.row_max[part][first_row + own.row] = state.row.max_logit;
        smem.row_sum[part][first_row + own.row] = state.row.sum;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (group_idx != r % GROUPS) continue;
#pragma unroll
        for (int c = 0; c < ValueColumns::CHUNKS; c++) {
            Run<Real, ValueColumns::CHUNK> run;
#pragma unroll
            for (int i = 0; i < ValueColumns::CHUNK; i++) {
                run.element[i] = state.acc_out[r][c * ValueColumns::CHUNK + i];
            }
            run.store(&smem.out[part][first_row + r][columns.at(c)]);
        }
    }
}

// One column of a row of the CTA: the sum over the warps' parts, and the softmax state that it belongs to.
struct RowResult {
    SoftmaxRow row;
    Real value;
};

__device__ __forceinline__ RowResult merge_parts(const Smem& smem, int row, int col, const Real* g_sink) {
    RowResult result;
    result.row.reset();
    result.value = 0;
#pragma unroll
    for (int part = 0; part < WARPS_N; part++) result.row.raise_max(smem.row_max[part][row]);
    const Real reference = result.row.reference();
#pragma unroll
    for (int part = 0; part < WARPS_N; part++) {
        const Real weight = power_of_two(SoftmaxRow::exponent(smem.row_max[part][row] - reference));
        result.row.sum += weight * smem.row_sum[part][row];
        result.value += weight * smem.out[part][row][col];
    }
    if (g_sink != nullptr) {
        Real correction, term;
        result.row.sink_exponents(*g_sink, correction, term);
        correction = power_of_two(correction);
        result.row.sum = result.row.sum * correction + power_of_two(term);
        result.value *= correction;
    }
    result.value *= result.row.inverse_sum();
    return result;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_decode_fma(
    const Query* __restrict__ g_q,           // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Storage* __restrict__ g_k,         // [num_pages, page_size, num_kv_heads, head_dim], or contiguous:
    const Storage* __restrict__ g_v,         // [batch, capacity, ...], head_dim_v
    // From here on, null is what a call does not use.
    Output* __restrict__ g_out,              // [batch, seqlen_q, num_heads, head_dim_v]
    Real* __restrict__ g_lse,                // [batch, num_heads, seqlen_q], contiguous
    Real* __restrict__ g_partial_out,        // [num_partials, num_heads, head_dim_v], contiguous: decode_block.cuh
    Real* __restrict__ g_partial_state,      // [num_partials, num_heads, 2]: maximum and sum, merge.cuh
    const int* __restrict__ g_seqlens_k,     // [batch]
    const int* __restrict__ g_block_tables,  // [batch, max_pages]; entries beyond a sequence's length are not read
    const int* __restrict__ g_cu_seqlens_q,  // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
                                             // [num_heads, tokens]
    const float* __restrict__ g_k_scale,     // [1] or [num_kv_heads]; or, with SLOT_SCALES, like keys without head_dim
    const float* __restrict__ g_v_scale,     // likewise
    const unsigned char* __restrict__ g_k_block_scales,  // like keys, head_dim / block size
    const unsigned char* __restrict__ g_v_block_scales,  // likewise
    const Real* __restrict__ g_alibi_slopes,             // [batch or 1, num_heads]
    const Real* __restrict__ g_sinks,                    // [num_heads]
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
    const int lane = threadIdx.x % LANES;  // of its group
    const int group_idx = threadIdx.x % WARP_SIZE / LANES;
    const int part = warp_idx % WARPS_N;
    const int first_row = warp_idx / WARPS_N * ROWS;  // of this warp

    const ColumnBlock columns(params.head_dim_v);
    const DecodeBlock block =
        decode_block(params, columns.cta_idx, g_seqlens_k, g_cu_seqlens_q, g_work, g_splits);
    if (!block.has_work()) return;
    const bool is_packed = g_cu_seqlens_q != nullptr;
    const KeyBand band(params, block);
    const int last_token = block.first_token + block.num_tokens - 1;
    const SplitTiles split(KeyTiles(band, BLOCK_N, block.first_token, last_token), block);
    const int keys_begin = max(split.begin * BLOCK_N, band.begin(block.first_token));
    const long long split_end = static_cast<long long>(split.end) * BLOCK_N, band_end = band.end(last_token);
    const int keys_end = static_cast<int>(min(split_end, band_end));

    const KeyColumns k_columns{lane, params.num_pairs, params.head_dim};
    const ValueColumns v_columns{lane, 0, columns.count};
    const AllRotations rotations(g_turns, params.num_pairs, g_cos, g_sin, params.tables);
    const CachedKeys<PAGED> keys(params, g_block_tables, block.batch_idx, keys_end);
    const CachedRows<Storage> k_rows(g_k, params.k, SLOT_SCALES ? g_k_scale : nullptr, params.k_scale,
                                     g_k_block_scales, params.k_blocks, block.kv_head_idx);
    const CachedRows<Storage> v_rows(g_v, params.v, SLOT_SCALES ? g_v_scale : nullptr, params.v_scale,
                                     g_v_block_scales, params.v_blocks, block.kv_head_idx, columns.first);

    const OwnPairs own_pairs(lane);
    LogitRow own_row;
    {
        const QueryRow query = query_row(params, block, first_row + own_pairs.row);
        const int token = query.exists ? query.token : block.first_token;
        own_row.keys = band.row(token);
        own_row.keys.end = min(keys_end, own_row.keys.end);
        own_row.alibi_slope = 0;
        if (ALIBI && g_alibi_slopes != nullptr && query.exists) {
            own_row.alibi_slope = g_alibi_slopes[block.batch_idx * params.alibi_batch + query.head];
        }
        own_row.position = alibi_distance<Real>(token, block.diagonal_offset, 0);
    }
    Real scale = params.scale;
    if (!SLOT_SCALES && g_k_scale != nullptr) scale *= g_k_scale[block.kv_head_idx * params.k_scale.head];

    // Rows of q, turned; zeros where there is no row.
    KeyRow q[ROWS];
    g_q += is_packed ? block.q_start * params.q.seq : block.batch_idx * params.q.batch;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const QueryRow query = query_row(params, block, first_row + r);
        const Query* g_row = g_q + query.token * params.q.seq + query.head * params.q.head;
#pragma unroll
        for (int c = 0; c < KeyColumns::CHUNKS; c++) {
            Run<Query, KeyColumns::CHUNK> run;
            run.clear();
            if (query.exists && k_columns.exists(c)) {
                if constexpr (ALIGNED) {
                    run.load(g_row + k_columns.at(c));
                } else {
#pragma unroll
                    for (int i = 0; i < KeyColumns::CHUNK; i++) {
                        if (k_columns.at(c) + i < params.head_dim) run.element[i] = g_row[k_columns.at(c) + i];
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < KeyColumns::CHUNK; i++) q[r][c * KeyColumns::CHUNK + i] = run.get(i);
        }
        if constexpr (ROTATE) {
            const long long position = static_cast<long long>(query.token) + block.seqlen_k - block.seqlen_q;
            rotate_row(q[r], k_columns, rotations, position);
        }
    }

    LaneState state;
    state.row.reset();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < ValueColumns::PER_LANE; c++) state.acc_out[r][c] = 0;
    }

#pragma unroll 1
    for (int step_key = keys_begin + part * WARP_KEYS; step_key < keys_end; step_key += BLOCK_N) {
        // Key u of this group is first_key + u * GROUPS, so that the groups read neighbouring keys.
        const int first_key = step_key + group_idx;
        StoredRow<KeyColumns, Storage> stored_k[KEYS];
        StoredRow<ValueColumns, Storage> stored_v[KEYS];
        // All loads of a step go out first. Those of single numbers would need too many registers for that.
        constexpr bool LOADS_FIRST = ALIGNED;
        auto load_key = [&](int u, const KeyPlace& place) {
            stored_k[u].load(k_columns, k_rows.row(place), k_rows.blocks(place), place.exists);
        };
        auto load_value = [&](int u, const KeyPlace& place) {
            stored_v[u].load(v_columns, v_rows.row(place), v_rows.blocks(place), place.exists);
        };
        if constexpr (LOADS_FIRST) {
#pragma unroll
            for (int u = 0; u < KEYS; u++) {
                const KeyPlace place = keys.find(first_key + u * GROUPS);
                load_key(u, place);
                load_value(u, place);
            }
        }

        Real own[PAIRS];  // dot products, then own logits and probabilities in the first OWN of them
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
            if constexpr (!LOADS_FIRST) load_key(u, keys.find(first_key + u * GROUPS));
            KeyRow k;
            stored_k[u].widen_to(k, k_columns);
            if (ROTATE && params.rotate_keys) rotate_row(k, k_columns, rotations, first_key + u * GROUPS);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                Real dot = 0;
#pragma unroll
                for (int c = 0; c < KeyColumns::PER_LANE; c++) dot = fma(q[r][c], k[c], dot);
                own[r * KEYS + u] = dot;
            }
        }
        sum_over_group(own, lane);

        const int own_key = first_key + own_pairs.first_key * GROUPS;
        Real v_scale[OWN];
        if constexpr (SLOT_SCALES) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const KeyPlace place = keys.find(own_key + i * GROUPS);
                v_scale[i] = scale_of(v_rows, place);
                own[i] *= scale_of(k_rows, place);
            }
        }
        const HeadRows alibi_row([&](int) { return own_row.alibi_slope; },
                                 [&](int) { return own_row.position - static_cast<Real>(own_key); });
        natural_logits<Layout>(own, params, scale, alibi_row);
        hide_by_position<Layout>(own, negative_infinity<Real>(), [&](int) { return own_row.keys.from(own_key); });
        softmax_step(state, own);
        if constexpr (SLOT_SCALES) {
#pragma unroll
            for (int i = 0; i < OWN; i++) own[i] *= v_scale[i];
        }

#pragma unroll
        for (int u = 0; u < KEYS; u++) {
            if constexpr (!LOADS_FIRST) load_value(u, keys.find(first_key + u * GROUPS));
            ValueRow v;
            stored_v[u].widen_to(v, v_columns);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Real probability = from_owner(own, r * KEYS + u);
#pragma unroll
                for (int c = 0; c < ValueColumns::PER_LANE; c++) {
                    state.acc_out[r][c] = fma(probability, v[c], state.acc_out[r][c]);
                }
            }
        }
    }

    merge_groups(state);
    stage_state(state, smem, part, first_row, v_columns, group_idx);
    // SYNC: the states of all warps are in shared memory before rows are put together.
    __syncthreads();
    Real out_factor = 1;
    if (!SLOT_SCALES && g_v_scale != nullptr) out_factor = g_v_scale[block.kv_head_idx * params.v_scale.head];
    g_out += (is_packed ? block.q_start * params.out.seq : block.batch_idx * params.out.batch) + columns.first;
    for (int i = threadIdx.x; i < BLOCK_M * HEAD_DIM_V; i += NUM_THREADS) {
        const int row = i / HEAD_DIM_V, col = i % HEAD_DIM_V;
        const QueryRow query = query_row(params, block, row);
        if (!query.exists || col >= columns.count) continue;
        const Real* g_sink = g_sinks == nullptr || !block.is_whole() ? nullptr : g_sinks + query.head;
        const RowResult result = merge_parts(smem, row, col, g_sink);
        if (block.is_whole()) {
            narrow(result.value * out_factor, g_out[query.token * params.out.seq + query.head * params.out.head + col]);
            if (g_lse != nullptr && columns.is_first() && col == 0) {
                g_lse[block.batch_idx * params.lse_batch + query.head * params.lse_head +
                      (is_packed ? block.q_start : 0) + query.token] = result.row.lse();
            }
        } else {
            const long long partial = block.partial_row(query.token) * params.num_heads + query.head;
            g_partial_out[partial * params.head_dim_v + columns.first + col] = result.value * out_factor;
            if (columns.is_first() && col == 0) {
                g_partial_state[2 * partial] = result.row.max_logit;
                g_partial_state[2 * partial + 1] = result.row.sum;
            }
        }
    }
}
