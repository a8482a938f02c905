// Rows between a padded batch and its packed tokens, both ways. Bytes are copied, of whatever type.
//
//   cuattn_remove_padding   packed[i] = padded[tokens[i]]
//   cuattn_restore_padding  padded[tokens[i]] = packed[i], padded[padding[i]] = 0: every byte is written exactly once
//
// A row is num_segments stretches of bytes that are contiguous on both sides (one, or one a head), moved in units of
// unit_bytes: 16, or the largest power of two that every address is a multiple of.
//
// One CTA moves one segment of blockDim.y rows at a time.
// Grid:  x the groups of blockDim.y rows, exactly; y any number: CTA (c, y) takes the segments y, y + gridDim.y, ...
// Block: x neighbouring units of a row, y rows; at most NUM_THREADS in all.

// Passed by value. Strides are in bytes.
struct RowsLayout {
    long long batch_stride;  // of the padded array, [batch, seqlen, row]
    long long seq_stride;
    long long padded_segment_stride;
    long long token_stride;  // of the packed array, [num_tokens, row]
    long long packed_segment_stride;
    long long num_segments;
    long long segment_units;
    unsigned unit_bytes;
    unsigned seqlen;
    unsigned num_slots;  // batch * seqlen < 2^31
    unsigned num_tokens;
};

// `to` becomes what is at `from`, or zero where that is null.
template <typename Unit>
__device__ __forceinline__ void copy_units(char* __restrict__ to, const char* __restrict__ from, long long num_units) {
    for (long long unit = threadIdx.x; unit < num_units; unit += blockDim.x) {
        Unit value{};
        if (from != nullptr) value = reinterpret_cast<const Unit*>(from)[unit];
        reinterpret_cast<Unit*>(to)[unit] = value;
    }
}

__device__ __forceinline__ void copy_row(char* to, const char* from, long long to_segment_stride,
                                         long long from_segment_stride, const RowsLayout& layout) {
    for (long long segment = blockIdx.y; segment < layout.num_segments; segment += gridDim.y) {
        char* to_segment = to + segment * to_segment_stride;
        const char* from_segment = from == nullptr ? nullptr : from + segment * from_segment_stride;
        switch (layout.unit_bytes) {
            case 16: copy_units<uint4>(to_segment, from_segment, layout.segment_units); break;
            case 8: copy_units<uint2>(to_segment, from_segment, layout.segment_units); break;
            case 4: copy_units<unsigned>(to_segment, from_segment, layout.segment_units); break;
            case 2: copy_units<unsigned short>(to_segment, from_segment, layout.segment_units); break;
            default: copy_units<unsigned char>(to_segment, from_segment, layout.segment_units); break;
        }
    }
}

__device__ __forceinline__ long long slot_offset(const RowsLayout& layout, unsigned slot) {
    const unsigned batch_idx = slot / layout.seqlen;
    return batch_idx * layout.batch_stride + (slot - batch_idx * layout.seqlen) * layout.seq_stride;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_remove_padding(const char* __restrict__ g_padded,      // [batch, seqlen, row]
                          const unsigned* __restrict__ g_tokens,  // [num_tokens]: slots
                          char* __restrict__ g_packed,            // [num_tokens, row]
                          const RowsLayout layout) {
    const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= layout.num_tokens) return;
    const unsigned slot = g_tokens[row];
    // A damaged plan may name any slot; one that is not there reads as zeros.
    const char* from = slot < layout.num_slots ? g_padded + slot_offset(layout, slot) : nullptr;
    copy_row(g_packed + row * layout.token_stride, from, layout.packed_segment_stride, layout.padded_segment_stride,
             layout);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_restore_padding(const char* __restrict__ g_packed,       // [num_tokens, row]
                           const unsigned* __restrict__ g_tokens,   // [num_tokens]: slots
                           const unsigned* __restrict__ g_padding,  // [num_slots - num_tokens]: the other slots
                           char* __restrict__ g_padded,             // [batch, seqlen, row]
                           const RowsLayout layout) {
    const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= layout.num_slots) return;
    const bool is_real = row < layout.num_tokens;
    const unsigned slot = is_real ? g_tokens[row] : g_padding[row - layout.num_tokens];
    if (slot >= layout.num_slots) return;  // a damaged plan
    const char* from = is_real ? g_packed + row * layout.token_stride : nullptr;
    copy_row(g_padded + slot_offset(layout, slot), from, layout.padded_segment_stride, layout.packed_segment_stride,
             layout);
}
