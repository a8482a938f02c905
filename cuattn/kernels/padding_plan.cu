// Where the real tokens of a padded batch are: an exclusive prefix sum over its mask.
//
// The mask [batch, seqlen] is numbered slot by slot, slot = batch_idx * seqlen + position, and cut into chunks of
// chunk_slots, one a CTA:
//
//   cuattn_padding_count  the number of tokens of each chunk
//   cuattn_padding_scan   the place of each slot: all tokens first, then all padding slots, each in ascending order
//
// Every CTA of the second launch adds up the counts of the chunks before its own: at most 1024 numbers that lie in L2.
// The end of the first launch is the only synchronisation between CTAs, and whole numbers are added: the same result
// on every run. A single-pass scan would read the mask once instead of twice, but its CTAs wait for each other; a mask
// is a byte a token, where a token is hundreds.
//
// Grid:  x the chunks, exactly.
// Block: NUM_THREADS, one slot a thread at a time.
constexpr int WARP_SIZE = 32;
constexpr int NUM_WARPS = NUM_THREADS / WARP_SIZE;
constexpr unsigned FULL_WARP = 0xffffffffu;
static_assert(NUM_THREADS % WARP_SIZE == 0 && NUM_THREADS <= 1024, "a CTA is whole warps");

// Passed by value.
struct MaskLayout {
    long long batch_stride;  // bytes
    long long seq_stride;
    unsigned item_bytes;  // of an element of the mask: 1, 2, 4 or 8
    unsigned seqlen;
    unsigned num_slots;    // batch * seqlen < 2^31
    unsigned chunk_slots;  // a multiple of NUM_THREADS
};

__device__ __forceinline__ bool is_token(const char* g_mask, const MaskLayout& layout, unsigned slot) {
    const unsigned batch_idx = slot / layout.seqlen;
    const char* g_item =
        g_mask + batch_idx * layout.batch_stride + (slot - batch_idx * layout.seqlen) * layout.seq_stride;
    switch (layout.item_bytes) {
        case 1: return *g_item != 0;
        case 2: return *reinterpret_cast<const short*>(g_item) != 0;
        case 4: return *reinterpret_cast<const int*>(g_item) != 0;
        default: return *reinterpret_cast<const long long*>(g_item) != 0;
    }
}

// This CTA's slots [begin, end).
struct Chunk {
    unsigned begin;
    unsigned end;
};

__device__ __forceinline__ Chunk this_chunk(const MaskLayout& layout) {
    const unsigned begin = blockIdx.x * layout.chunk_slots;
    return {begin, min(begin + layout.chunk_slots, layout.num_slots)};
}

// The sum over all threads of the CTA, for all of them.
__device__ __forceinline__ unsigned cta_sum(unsigned value, unsigned (&s_slots)[NUM_WARPS]) {
    value = __reduce_add_sync(FULL_WARP, value);
    if (threadIdx.x % WARP_SIZE == 0) s_slots[threadIdx.x / WARP_SIZE] = value;
    // SYNC: the sum of every warp is in shared memory before any warp adds them up.
    __syncthreads();
    unsigned sum = 0;
#pragma unroll
    for (int warp_idx = 0; warp_idx < NUM_WARPS; ++warp_idx) sum += s_slots[warp_idx];
    return sum;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_padding_count(const char* g_mask,  // [batch, seqlen], strides in layout; nonzero is a token
                         unsigned* g_counts,  // [num_chunks]
                         const MaskLayout layout) {
    __shared__ unsigned s_slots[NUM_WARPS];
    const Chunk chunk = this_chunk(layout);
    unsigned count = 0;
    for (unsigned slot = chunk.begin + threadIdx.x; slot < chunk.end; slot += NUM_THREADS) {
        count += is_token(g_mask, layout, slot);
    }
    count = cta_sum(count, s_slots);
    if (threadIdx.x == 0) g_counts[blockIdx.x] = count;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_padding_scan(const char* g_mask,        // [batch, seqlen], strides in layout; nonzero is a token
                        const unsigned* g_counts,  // [num_chunks]
                        unsigned* g_order,         // [batch * seqlen]: the tokens, then the padding slots
                        unsigned* g_cu_seqlens,    // [batch + 1]
                        const MaskLayout layout) {
    __shared__ unsigned s_before[NUM_WARPS], s_total[NUM_WARPS], s_tile[2][NUM_WARPS];
    const unsigned warp_idx = threadIdx.x / WARP_SIZE;
    const unsigned lanes_below = (1u << threadIdx.x % WARP_SIZE) - 1;
    const Chunk chunk = this_chunk(layout);

    unsigned before = 0, total = 0;  // tokens of the chunks before this one, and of all chunks
    for (unsigned i = threadIdx.x; i < gridDim.x; i += NUM_THREADS) {
        total += g_counts[i];
        if (i < blockIdx.x) before += g_counts[i];
    }
    before = cta_sum(before, s_before);
    total = cta_sum(total, s_total);

    int buffer = 0;
    for (unsigned tile = chunk.begin; tile < chunk.end; tile += NUM_THREADS, buffer ^= 1) {
        const unsigned slot = tile + threadIdx.x;
        const bool has_slot = slot < chunk.end;
        const bool is_real = has_slot && is_token(g_mask, layout, slot);
        const unsigned ballot = __ballot_sync(FULL_WARP, is_real);
        if (threadIdx.x % WARP_SIZE == 0) s_tile[buffer][warp_idx] = __popc(ballot);
        // SYNC: every warp's count is in shared memory before any warp adds them up. The next tile has the other
        // buffer, so that this barrier also keeps its counts from those that a slow warp still reads.
        __syncthreads();
        unsigned rank = before + __popc(ballot & lanes_below);  // tokens before this slot
#pragma unroll
        for (int i = 0; i < NUM_WARPS; ++i) {
            const unsigned count = s_tile[buffer][i];
            if (i < warp_idx) rank += count;
            before += count;
        }
        if (!has_slot) continue;
        g_order[is_real ? rank : total + (slot - rank)] = slot;
        if (slot % layout.seqlen == 0) g_cu_seqlens[slot / layout.seqlen] = rank;
        if (slot + 1 == layout.num_slots) g_cu_seqlens[layout.num_slots / layout.seqlen] = total;
    }
}
