// Rotary position embedding (Su et al., "RoFormer", 2021): pairs of elements of every head turned by angles that grow
// with the position of the token.
//
// An item is one unit (rotary_units.cuh) of one token, in every num_groups-th head: neighbouring threads hold
// neighbouring units, then neighbouring heads, so that a warp reads and writes whole heads.
//
// Grid:  any number of CTAs; CTA c takes the items c * NUM_THREADS + thread, then those gridDim.x CTAs on.
// Block: NUM_THREADS.
//
// Every thread reads both elements of a pair before it writes them, and no other thread touches them: out may be x.
//
// Constants: Element, INTERLEAVED, TABLES (rotations are read, not computed), Table (their element type), NUM_THREADS.
#include "common/integers.cuh"
#include "rotary/rotary_units.cuh"

using Real = RealOf<Element>::type;

// Passed by value. Strides are in elements.
struct RopeLayout {
    long long num_tokens;  // batch * seqlen
    long long seqlen;
    long long x_batch_stride, x_seq_stride, x_head_stride;
    long long out_batch_stride, out_seq_stride, out_head_stride;
    long long positions_batch_stride, positions_seq_stride;
    unsigned num_heads;   // unsigned, as it is stepped beyond by num_groups
    unsigned num_groups;  // of heads, each with threads of its own
    int num_pairs;        // rotary_dim / 2
    int num_units;        // of a head; without copy units where out is x
    int positions_are_64_bit;
    int inverse;
    int vectorized;  // every run of PACK elements starts at a multiple of 16 bytes
    TableLayout tables;  // with TABLES
};

using Source = Rotations<TABLES, Real, Table>;

template <bool VECTORIZED>
__device__ __forceinline__ void rotate_tokens(const Element* g_x, Element* g_out, const void* g_positions,
                                              const Source& source, const RopeLayout& layout) {
    using Unit = RotaryUnit<Element, VECTORIZED, INTERLEAVED>;
    const unsigned items_per_token = layout.num_groups * layout.num_units;
    const int num_rotary_units = layout.num_pairs / Unit::NUM_PAIRS;

    for (long long item = static_cast<long long>(blockIdx.x) * NUM_THREADS + threadIdx.x;
         item < layout.num_tokens * items_per_token; item += static_cast<long long>(gridDim.x) * NUM_THREADS) {
        const long long token_idx = item / items_per_token;
        const unsigned item_of_token = item - token_idx * items_per_token;
        const unsigned first_head = item_of_token / layout.num_units;
        const int unit_idx = item_of_token - first_head * layout.num_units;
        const long long batch_idx = token_idx / layout.seqlen;
        const long long seq_idx = token_idx - batch_idx * layout.seqlen;
        const Element* g_token = g_x + batch_idx * layout.x_batch_stride + seq_idx * layout.x_seq_stride;
        Element* g_result = g_out + batch_idx * layout.out_batch_stride + seq_idx * layout.out_seq_stride;

        if (unit_idx < num_rotary_units) {
            Unit unit(unit_idx, layout.num_pairs);
            const long long position =
                load_integer(g_positions, layout.positions_are_64_bit,
                             batch_idx * layout.positions_batch_stride + seq_idx * layout.positions_seq_stride);
            Rotation<Real> rotations[Unit::NUM_PAIRS];
            source.at(rotations, position, unit.first_pair);
            if (layout.inverse) {
#pragma unroll
                for (int i = 0; i < Unit::NUM_PAIRS; ++i) rotations[i].sin = -rotations[i].sin;
            }
#pragma unroll 1
            for (unsigned head_idx = first_head; head_idx < layout.num_heads; head_idx += layout.num_groups) {
                unit.load(g_token + head_idx * layout.x_head_stride);
                unit.rotate(rotations);
                unit.store(g_result + head_idx * layout.out_head_stride);
            }
        } else {
            const int offset = copy_offset<Element, VECTORIZED, INTERLEAVED>(unit_idx, layout.num_pairs);
#pragma unroll 1
            for (unsigned head_idx = first_head; head_idx < layout.num_heads; head_idx += layout.num_groups) {
                Run<Element, Unit::PACK> run;
                run.load(g_token + head_idx * layout.x_head_stride + offset);
                run.store(g_result + head_idx * layout.out_head_stride + offset);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_rope(const Element* g_x,                 // [batch, seqlen, num_heads, head_dim], last axis contiguous
                Element* g_out,                     // the same; may be g_x
                const void* g_positions,            // [batch, seqlen], int or long long
                const unsigned long long* g_turns,  // see Rotations; null with TABLES
                const Table* g_cos,                 // [num_positions, num_pairs], last axis contiguous; else null
                const Table* g_sin,                 // the same
                const RopeLayout layout) {
    const Source source(g_turns, layout.num_pairs, g_cos, g_sin, layout.tables);
    if (layout.vectorized) {
        rotate_tokens<true>(g_x, g_out, g_positions, source, layout);
    } else {
        rotate_tokens<false>(g_x, g_out, g_positions, source, layout);
    }
}
