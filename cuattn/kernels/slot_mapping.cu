// Where new tokens go in a paged cache: each thread finds the sequence of its token, and the token's page in its table.
//
// Grid:  any number of CTAs; thread t of CTA c takes token c * NUM_THREADS + t, then those of gridDim.x CTAs on.
// Block: NUM_THREADS.
//
// Lengths and tables may be device data that nobody has checked: a token for which the table has no entry, or one that
// is no page, gets slot -1, which cuattn_append_kv skips.
//
// Constants: NUM_THREADS.
#include "common/integers.cuh"

// Passed by value. Strides are in elements.
struct SlotsLayout {
    long long num_tokens, max_pages, page_size;
    long long last_page;  // the slots of those behind it would be beyond 64 bits
    long long table_stride, entry_stride, lengths_stride;
    int num_sequences;
    int tables_are_64_bit, lengths_are_64_bit;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_slot_mapping(const void* __restrict__ g_block_tables,  // [num_sequences, max_pages], int or long long
                        const void* __restrict__ g_lengths,       // [num_sequences], int or long long
                        const long long* __restrict__ g_starts,   // [num_sequences + 1]: first new token of each
                        long long* __restrict__ g_slots,          // [num_tokens]
                        const SlotsLayout layout) {
    for (long long token_idx = static_cast<long long>(blockIdx.x) * NUM_THREADS + threadIdx.x;
         token_idx < layout.num_tokens; token_idx += static_cast<long long>(gridDim.x) * NUM_THREADS) {
        // The last sequence that starts at or before the token: those between are without new tokens.
        int first = 0, last = layout.num_sequences - 1;
        while (first < last) {
            const int middle = first + (last - first + 1) / 2;
            if (g_starts[middle] <= token_idx) {
                first = middle;
            } else {
                last = middle - 1;
            }
        }
        const long long position = load_integer(g_lengths, layout.lengths_are_64_bit, first * layout.lengths_stride) +
                                   token_idx - g_starts[first];
        const long long entry = position / layout.page_size;
        long long slot = -1;
        if (position >= 0 && entry < layout.max_pages) {
            const long long page = load_integer(g_block_tables, layout.tables_are_64_bit,
                                                first * layout.table_stride + entry * layout.entry_stride);
            if (page >= 0 && page <= layout.last_page) {
                slot = page * layout.page_size + position - entry * layout.page_size;
            }
        }
        g_slots[token_idx] = slot;
    }
}
