// New keys and values scattered into the slots of a cache: keys turned by their positions, and both quantized, on the
// way.
//
// A row is one head of one token, of k or of v; the rows of a token are its key heads, then its value heads. A warp
// takes one row: loads it into shared memory as it is, turns it there (rounded to Element, as cuattn_rope rounds it),
// finds the largest magnitude if the format wants a scale of the row or of its blocks, and stores the codes.
//
// Grid:  any number of CTAs; warp w of CTA c takes row c * NUM_WARPS + w, then those gridDim.x * NUM_WARPS rows on.
// Block: NUM_WARPS * 32.
//
// Slots may be device data that nobody has checked: one that is negative or does not exist is skipped. Two tokens with
// one slot leave the numbers of either.
//
// Constants: Element (of k and v), Storage (of an item of the cache), ROTATE, INTERLEAVED, TABLES (rotations are read,
// not computed), Table (their element type), MAX_HEAD_DIM, NUM_WARPS.
#include "common/integers.cuh"
#include "kv/kv_encode.cuh"
#include "rotary/rotary_units.cuh"

using Real = RealOf<Element>::type;
using Source = Rotations<TABLES, Real, Table>;

constexpr int MIN_CTAS = 8;  // of an SM: left alone, the compiler keeps all strides in registers, and few warps fit
constexpr int PACK = 16 / sizeof(Element);
constexpr int PER_ITEM = KvFormat<Storage>::PER_ITEM;
constexpr int BLOCK = KvFormat<Storage>::BLOCK;

struct Smem {
    alignas(16) Element row[NUM_WARPS][MAX_HEAD_DIM];
};

// Where heads lie; strides in elements, of the cache in items.
struct Strides {
    long long page, slot, head;
};

// Of k, or of v. Passed by value with AppendLayout.
struct Side {
    long long token_stride, head_stride;  // of what is appended
    Strides cache;
    long long item_stride;
    Strides scales;  // 0 where several share one
    Strides blocks;
    long long block_stride;
    float scale;  // where there is no array of them
    int head_dim;
    int wide_loads;   // every 16 bytes of a head lie at a multiple of 16
    int wide_stores;  // the same of the cache, or for codes every 4 bytes at a multiple of 4
    int slot_scales;  // scales are made here, one a slot and head, not read
};

struct AppendLayout {
    Side k, v;
    long long num_tokens, num_slots, page_size;
    long long slots_stride, positions_stride;
    int num_heads;
    int num_pairs;  // rotary_dim / 2
    int slots_are_64_bit, positions_are_64_bit;
    TableLayout tables;  // with TABLES
};

// --- load ------------------------------------------------------------------------------------------------------------

// What the last codes of a word stand for beyond the head is zero.
__device__ __forceinline__ void load_row(Element* s_row, const Element* g_row, const Side& side, int lane_idx) {
    if (side.wide_loads) {
        for (int i = lane_idx * PACK; i < side.head_dim; i += 32 * PACK) {
            Run<Element, PACK> run;
            run.load(g_row + i);
            run.store(s_row + i);
        }
    } else {
        for (int i = lane_idx; i < side.head_dim; i += 32) s_row[i] = g_row[i];
    }
    if (lane_idx < -side.head_dim % 8u) from_real(Real(0), s_row[side.head_dim + lane_idx]);
}

// --- turn ------------------------------------------------------------------------------------------------------------

// One pair a lane: all lanes have work, and neighbors share no bank.
__device__ __forceinline__ void turn_row(Element* s_row, const Source& source, long long position, int num_pairs,
                                         int lane_idx) {
    for (int pair_idx = lane_idx; pair_idx < num_pairs; pair_idx += 32) {
        RotaryUnit<Element, false, INTERLEAVED> unit(pair_idx, num_pairs);
        Rotation<Real> rotation[1];
        source.at(rotation, position, pair_idx);
        unit.load(s_row);
        unit.rotate(rotation);
        unit.store(s_row);
    }
}

// --- store -----------------------------------------------------------------------------------------------------------

// Numbers that are stored as they are.
__device__ __forceinline__ void store_row(Element* g_row, const Element* s_row, const Side& side, int lane_idx) {
    if (side.wide_stores) {
        for (int i = lane_idx * PACK; i < side.head_dim; i += 32 * PACK) {
            Run<Element, PACK> run;
            run.load(s_row + i);
            run.store(g_row + i);
        }
    } else {
        for (int i = lane_idx; i < side.head_dim; i += 32) g_row[i * side.item_stride] = s_row[i];
    }
}

// Numbers that become codes, a word of them a lane.
template <typename Format>
struct Codes {
    static constexpr int PER_WORD = 32 / KvCode<Format>::BITS;
    static constexpr int LANES_PER_BLOCK = BLOCK / PER_WORD;

    float x[PER_WORD];

    __device__ __forceinline__ void load(const Element* s_row, int first, int head_dim) {
        Run<Element, PER_WORD> run;
        run.clear();
        if (first < head_dim) run.load(s_row + first);
#pragma unroll
        for (int i = 0; i < PER_WORD; ++i) x[i] = run.get(i);
    }

    // See kv_encode.cuh. A NaN that has a code of its own does not count.
    __device__ __forceinline__ unsigned largest_bits() const {
        unsigned largest = 0;
#pragma unroll
        for (int i = 0; i < PER_WORD; ++i) {
            const unsigned bits = magnitude_bits(x[i]);
            largest = max(largest, KvCode<Format>::HAS_NAN && bits > INFINITY_BITS ? 0u : bits);
        }
        return largest;
    }

    __device__ __forceinline__ void store(Storage* g_row, int first, float scale, const Side& side) const {
        unsigned word = 0;
#pragma unroll
        for (int i = 0; i < PER_WORD; ++i) {
            word |= KvCode<Format>::of(unscaled(x[i], scale)) << (i * KvCode<Format>::BITS);
        }
        if (side.wide_stores && first + PER_WORD <= side.head_dim) {
            *reinterpret_cast<unsigned*>(g_row + first / PER_ITEM) = word;
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int item_idx = first / PER_ITEM + i;
            if (item_idx * PER_ITEM < side.head_dim) {
                *reinterpret_cast<unsigned char*>(g_row + item_idx * side.item_stride) = word >> (8 * i) & 0xffu;
            }
        }
    }
};

template <typename Format>
__device__ __forceinline__ float scale_of_row(const Element* s_row, float* g_scale, const Side& side, int lane_idx) {
    if (!side.slot_scales) return g_scale == nullptr ? side.scale : *g_scale;
    unsigned largest = 0;
    for (int first = 0; first < side.head_dim; first += 32 * Codes<Format>::PER_WORD) {
        Codes<Format> codes;
        codes.load(s_row, first + lane_idx * Codes<Format>::PER_WORD, side.head_dim);
        largest = max(largest, codes.largest_bits());
    }
    const float scale = __fdiv_rn(scaled_magnitude(__reduce_max_sync(~0u, largest)), KvCode<Format>::MAX);
    if (lane_idx == 0) *g_scale = scale;
    return scale;
}

template <typename Format>
__device__ __forceinline__ void store_codes(Format* g_row, float* g_scale, unsigned char* g_blocks,
                                            const Element* s_row, const Side& side, int lane_idx) {
    using Word = Codes<Format>;
    float scale = scale_of_row<Format>(s_row, g_scale, side, lane_idx);
    for (int begin = 0; begin < side.head_dim; begin += 32 * Word::PER_WORD) {
        const int first = begin + lane_idx * Word::PER_WORD;
        Word codes;
        codes.load(s_row, first, side.head_dim);
        float factor = scale;
        if constexpr (BLOCK > 0) {
            unsigned largest = codes.largest_bits();
#pragma unroll
            for (int distance = 1; distance < Word::LANES_PER_BLOCK; distance *= 2) {
                largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
            }
            const unsigned char stored = make_block_scale(Format(), largest, scale);
            factor = block_scale(Format(), stored) * scale;
            if (first < side.head_dim && lane_idx % Word::LANES_PER_BLOCK == 0) {
                g_blocks[first / BLOCK * side.block_stride] = stored;
            }
        }
        codes.store(g_row, first, factor, side);
    }
}

// What is stored as it is, and has no scale.
__device__ __forceinline__ void store_codes(Element* g_row, float*, unsigned char*, const Element* s_row,
                                            const Side& side, int lane_idx) {
    store_row(g_row, s_row, side, lane_idx);
}

// --- a row -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ long long offset(const Strides& strides, long long page_idx, long long slot_idx,
                                            int head_idx) {
    return page_idx * strides.page + slot_idx * strides.slot + head_idx * strides.head;
}

template <bool TURN>
__device__ __forceinline__ void append_row(Element* s_row, const Element* g_new, Storage* g_cache, float* g_scales,
                                           unsigned char* g_blocks, const Side& side, long long token_idx, int head_idx,
                                           long long page_idx, long long slot_idx, const Source& source,
                                           const void* g_positions, const AppendLayout& layout, int lane_idx) {
    load_row(s_row, g_new + token_idx * side.token_stride + head_idx * side.head_stride, side, lane_idx);
    // SYNC: the row is in shared memory; each lane goes on with other elements than it loaded.
    __syncwarp();
    if constexpr (TURN) {
        const long long position =
            load_integer(g_positions, layout.positions_are_64_bit, token_idx * layout.positions_stride);
        turn_row(s_row, source, position, layout.num_pairs, lane_idx);
        // SYNC: the same of the pairs that have been turned.
        __syncwarp();
    }
    float* g_scale = g_scales == nullptr ? nullptr : g_scales + offset(side.scales, page_idx, slot_idx, head_idx);
    store_codes(g_cache + offset(side.cache, page_idx, slot_idx, head_idx), g_scale,
                g_blocks + offset(side.blocks, page_idx, slot_idx, head_idx), s_row, side, lane_idx);
    // SYNC: the row has been read; the next one may take its place.
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_CTAS)
    cuattn_append_kv(const Element* __restrict__ g_k,         // [num_tokens, num_heads, head_dim]
                     const Element* __restrict__ g_v,         // [num_tokens, num_heads, head_dim_v]
                     Storage* __restrict__ g_k_cache,         // [num_pages, page_size, num_heads, items]
                     Storage* __restrict__ g_v_cache,         // the same
                     const void* __restrict__ g_slots,        // [num_tokens], int or long long
                     float* __restrict__ g_k_scales,          // [num_pages, page_size, num_heads], or fewer axes
                     float* __restrict__ g_v_scales,          // the same; null: see Side
                     unsigned char* __restrict__ g_k_blocks,  // [num_pages, page_size, num_heads, blocks]
                     unsigned char* __restrict__ g_v_blocks,  // the same; null without block scales
                     const void* __restrict__ g_positions,    // [num_tokens], int or long long; with ROTATE
                     const unsigned long long* __restrict__ g_turns,  // see Rotations; null with TABLES
                     const Table* __restrict__ g_cos,                 // [num_positions, num_pairs]; with TABLES
                     const Table* __restrict__ g_sin,                 // the same
                     const AppendLayout layout) {
    __shared__ Smem smem;
    const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
    Element* s_row = smem.row[warp_idx];
    const Source source(g_turns, layout.num_pairs, g_cos, g_sin, layout.tables);
    const unsigned rows_per_token = 2u * layout.num_heads;

    for (long long row_idx = static_cast<long long>(blockIdx.x) * NUM_WARPS + warp_idx;
         row_idx < layout.num_tokens * rows_per_token; row_idx += static_cast<long long>(gridDim.x) * NUM_WARPS) {
        const long long token_idx = row_idx / rows_per_token;
        const int row_of_token = static_cast<int>(row_idx - token_idx * rows_per_token);
        const long long slot = load_integer(g_slots, layout.slots_are_64_bit, token_idx * layout.slots_stride);
        if (slot < 0 || slot >= layout.num_slots) continue;
        const long long page_idx = slot / layout.page_size;
        const long long slot_idx = slot - page_idx * layout.page_size;
        if (row_of_token < layout.num_heads) {
            append_row<ROTATE>(s_row, g_k, g_k_cache, g_k_scales, g_k_blocks, layout.k, token_idx, row_of_token,
                               page_idx, slot_idx, source, g_positions, layout, lane_idx);
        } else {
            append_row<false>(s_row, g_v, g_v_cache, g_v_scales, g_v_blocks, layout.v, token_idx,
                              row_of_token - layout.num_heads, page_idx, slot_idx, source, g_positions, layout,
                              lane_idx);
        }
    }
}
