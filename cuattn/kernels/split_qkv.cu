// The output of the fused query/key/value projection, taken apart in one pass: bias added, split into q, k and v, q and
// k turned by their positions, padding put back. Every element is read once and written once.
//
// A row is one token; where a plan puts padding back, the padding slots are rows behind those of the tokens, and are
// filled with zeros. An item is one unit (rotary_units.cuh) of one row, in every num_groups-th of the heads of q, k and
// v, which lie one behind the other in the input.
//
// Grid:  any number of CTAs; CTA c takes the items c * NUM_THREADS + thread, then those gridDim.x CTAs on.
// Block: NUM_THREADS.
//
// Constants: Element, ROTATE, INTERLEAVED, TABLES (rotations are read, not computed), Table (their element type),
// NUM_THREADS.
#include "common/integers.cuh"
#include "rotary/rotary_units.cuh"

using Real = RealOf<Element>::type;

// Passed by value. Strides are in elements.
struct SplitLayout {
    long long num_rows;    // tokens and padding: batch * seqlen of the outputs
    long long num_tokens;
    long long seqlen;      // of the outputs
    long long qkv_stride;  // from token to token
    long long batch_stride[3], seq_stride[3], head_stride[3];  // of q, k, v
    long long positions_stride;
    unsigned num_heads;
    unsigned num_kv_heads;
    int head_dim;
    unsigned num_groups;  // of the num_heads + 2 num_kv_heads heads, each with threads of its own
    int num_pairs;        // rotary_dim / 2; 0 without ROTATE
    int num_units;        // of a head
    int num_sequences;    // cu_seqlens has one element more
    int positions_are_64_bit;
    int vectorized;       // every run of PACK elements starts at a multiple of 16 bytes
    TableLayout tables;  // with TABLES
};

using Source = Rotations<TABLES, Real, Table>;

struct Outputs {
    Element* g_head[3];  // of q, k, v: [batch, seqlen, heads, head_dim]
};

// Where a token goes, and where it is in its sequence.
struct Places {
    const int* g_indices;     // [num_tokens], the slot batch_idx * seqlen + seq_idx of each; null: token t is in slot t
    const int* g_padding;     // [num_rows - num_tokens], the other slots
    const int* g_cu_seqlens;  // [num_sequences + 1], ascending
    const void* g_positions;  // [num_tokens], int or long long; null: they count from the start of a sequence

    __device__ __forceinline__ long long slot(const SplitLayout& layout, long long row_idx) const {
        if (!g_indices) return row_idx;
        return row_idx < layout.num_tokens ? g_indices[row_idx] : g_padding[row_idx - layout.num_tokens];
    }

    // With indices, a sequence is a batch entry. Else it is the last that starts at or before the token: those between
    // are empty.
    __device__ __forceinline__ long long position(const SplitLayout& layout, long long token_idx,
                                                  long long batch_idx) const {
        if (g_positions) {
            return load_integer(g_positions, layout.positions_are_64_bit, token_idx * layout.positions_stride);
        }
        if (g_indices) return token_idx - g_cu_seqlens[batch_idx];
        int first = 0, last = layout.num_sequences - 1;  // the sequence is one of first .. last
        while (first < last) {
            const int middle = first + (last - first + 1) / 2;
            if (g_cu_seqlens[middle] <= token_idx) {
                first = middle;
            } else {
                last = middle - 1;
            }
        }
        return token_idx - g_cu_seqlens[first];
    }
};

// Where a head of the input goes, in one row of the outputs.
struct Row {
    Element* g_q;
    Element* g_k;
    Element* g_v;

    __device__ __forceinline__ Row(const Outputs& outputs, const SplitLayout& layout, long long batch_idx,
                                   long long seq_idx) {
        Element* g_row[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            g_row[i] = outputs.g_head[i] + batch_idx * layout.batch_stride[i] + seq_idx * layout.seq_stride[i];
        }
        g_q = g_row[0], g_k = g_row[1], g_v = g_row[2];
    }

    __device__ __forceinline__ Element* head(const SplitLayout& layout, unsigned head_idx) const {
        if (head_idx < layout.num_heads) return g_q + head_idx * layout.head_stride[0];
        head_idx -= layout.num_heads;
        if (head_idx < layout.num_kv_heads) return g_k + head_idx * layout.head_stride[1];
        return g_v + (head_idx - layout.num_kv_heads) * layout.head_stride[2];
    }
};

template <bool VECTORIZED>
__device__ __forceinline__ void split_rows(const Element* g_qkv, const Element* g_bias, const Outputs& outputs,
                                           const Places& places, const Source& source, const SplitLayout& layout) {
    using Unit = RotaryUnit<Element, VECTORIZED, INTERLEAVED>;
    const unsigned items_per_row = layout.num_groups * layout.num_units;
    const int num_rotary_units = layout.num_pairs / Unit::NUM_PAIRS;
    const unsigned num_rotated_heads = layout.num_heads + layout.num_kv_heads;
    const unsigned num_all_heads = num_rotated_heads + layout.num_kv_heads;

    for (long long item = static_cast<long long>(blockIdx.x) * NUM_THREADS + threadIdx.x;
         item < layout.num_rows * items_per_row; item += static_cast<long long>(gridDim.x) * NUM_THREADS) {
        const long long row_idx = item / items_per_row;
        const unsigned item_of_row = item - row_idx * items_per_row;
        const unsigned first_head = item_of_row / layout.num_units;
        const int unit_idx = item_of_row - first_head * layout.num_units;
        const long long slot = places.slot(layout, row_idx);
        if (slot < 0 || slot >= layout.num_rows) continue;  // a plan of another batch writes nothing elsewhere
        const long long batch_idx = slot / layout.seqlen;
        const Row row(outputs, layout, batch_idx, slot - batch_idx * layout.seqlen);
        const bool has_token = row_idx < layout.num_tokens;
        const Element* g_token = g_qkv + row_idx * layout.qkv_stride;

        if (ROTATE && unit_idx < num_rotary_units) {
            Unit unit(unit_idx, layout.num_pairs);
            Rotation<Real> rotations[Unit::NUM_PAIRS] = {};
            if (has_token) source.at(rotations, places.position(layout, row_idx, batch_idx), unit.first_pair);
#pragma unroll 1
            for (unsigned head_idx = first_head; head_idx < num_all_heads; head_idx += layout.num_groups) {
                const long long offset = static_cast<long long>(head_idx) * layout.head_dim;
                unit.clear();
                if (has_token) {
                    unit.load(g_token + offset);
                    if (g_bias) {
                        Unit bias(unit_idx, layout.num_pairs);
                        bias.load(g_bias + offset);
                        unit.add(bias);
                    }
                    if (head_idx < num_rotated_heads) unit.rotate(rotations);
                }
                unit.store(row.head(layout, head_idx));
            }
        } else {
            const int element_idx = copy_offset<Element, VECTORIZED, INTERLEAVED>(unit_idx, layout.num_pairs);
#pragma unroll 1
            for (unsigned head_idx = first_head; head_idx < num_all_heads; head_idx += layout.num_groups) {
                const long long offset = static_cast<long long>(head_idx) * layout.head_dim + element_idx;
                Run<Element, Unit::PACK> run;
                run.clear();
                if (has_token) {
                    run.load(g_token + offset);
                    if (g_bias) {
                        Run<Element, Unit::PACK> bias;
                        bias.load(g_bias + offset);
#pragma unroll
                        for (int i = 0; i < Unit::PACK; ++i) run.set(i, run.get(i) + bias.get(i));
                    }
                }
                run.store(row.head(layout, head_idx) + element_idx);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_split_qkv(const Element* __restrict__ g_qkv,     // [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]
                     const Element* __restrict__ g_bias,    // [(num_heads + 2 num_kv_heads) * head_dim]; null: none
                     Element* __restrict__ g_q,             // [batch, seqlen, num_heads, head_dim]
                     Element* __restrict__ g_k,             // [batch, seqlen, num_kv_heads, head_dim]
                     Element* __restrict__ g_v,             // the same
                     const int* __restrict__ g_indices,     // see Places
                     const int* __restrict__ g_padding, const int* __restrict__ g_cu_seqlens,
                     const void* __restrict__ g_positions,
                     const unsigned long long* __restrict__ g_turns,  // see Rotations; null with TABLES
                     const Table* __restrict__ g_cos,  // [num_positions, num_pairs]; null without TABLES
                     const Table* __restrict__ g_sin,  // the same
                     const SplitLayout layout) {
    const Source source(g_turns, layout.num_pairs, g_cos, g_sin, layout.tables);
    const Outputs outputs = {g_q, g_k, g_v};
    const Places places = {g_indices, g_padding, g_cu_seqlens, g_positions};
    if (layout.vectorized) {
        split_rows<true>(g_qkv, g_bias, outputs, places, source, layout);
    } else {
        split_rows<false>(g_qkv, g_bias, outputs, places, source, layout);
    }
}
