// How threads share rows, and how they load and store them.
//
// A row is `num_cols` elements along the softmax axis, any stride apart; the other axes number the rows. A row belongs
// to THREADS_PER_ROW threads of one CTA:
//
//   LANES_SPAN_ROWS = false   neighbouring threads hold neighbouring columns: for rows that are contiguous in memory.
//   LANES_SPAN_ROWS = true    the lanes of a warp hold the same column of 32 neighbouring rows, each warp other
//                             columns: for rows that are strided, but adjacent to each other in memory.
//
// They walk along the row in tiles of TILE_COLS columns, PACK elements (16 bytes) a thread. With VECTORIZED a pack is
// one 16-byte access; without, its elements lie THREADS_PER_ROW columns apart: neighbouring threads touch neighbours.
//
// Kernels say __launch_bounds__(NUM_THREADS, 1). Without the 1, ptxas aims at an occupancy of its own choice and spills
// a register or two to get there.
//
// Needs from the constants: Element, NUM_THREADS, THREADS_PER_ROW, LANES_SPAN_ROWS, VECTORIZED.
#pragma once
#include "common/elements.cuh"
#include "softmax/softmax_state.cuh"

constexpr int PACK = 16 / sizeof(Element);
constexpr int TILE_COLS = THREADS_PER_ROW * PACK;
constexpr int NUM_WARPS = NUM_THREADS / WARP_SIZE;
constexpr int ROWS_PER_CTA = NUM_THREADS / THREADS_PER_ROW;
constexpr bool ROW_IN_WARP = !LANES_SPAN_ROWS && THREADS_PER_ROW <= WARP_SIZE;

static_assert(NUM_THREADS % WARP_SIZE == 0 && NUM_THREADS <= 1024, "a CTA is whole warps");
static_assert((THREADS_PER_ROW & (THREADS_PER_ROW - 1)) == 0, "reductions halve the number of threads");
static_assert(LANES_SPAN_ROWS ? THREADS_PER_ROW == NUM_WARPS : ROW_IN_WARP || THREADS_PER_ROW == NUM_THREADS,
              "a row belongs to lanes of one warp, to a whole CTA, or to one lane of every warp");
static_assert(!(LANES_SPAN_ROWS && VECTORIZED), "a pack lies along the row, and there the row is strided");

constexpr int MAX_OUTER_DIMS = 4;

// The two arrays as rows. Row r has the index (i0, i1, i2, i3) over `extent`, last fastest; strides are in elements.
// Passed by value.
struct RowLayout {
    long long num_rows;
    long long extent[MAX_OUTER_DIMS];
    long long x_row_stride[MAX_OUTER_DIMS];
    long long out_row_stride[MAX_OUTER_DIMS];
    long long x_col_stride;
    long long out_col_stride;
    unsigned num_cols;    // < 2^31, so that a column plus a tile stays in 32 bits
    unsigned chunk_cols;  // columns a CTA takes where several share a row; a multiple of 16
};

struct RowOffsets {
    long long x;
    long long out;
};

__device__ __forceinline__ RowOffsets row_offsets(const RowLayout& layout, long long row_idx) {
    RowOffsets offsets = {0, 0};
#pragma unroll
    for (int dim = MAX_OUTER_DIMS - 1; dim >= 0; --dim) {
        long long position = row_idx;
        // Most arrays collapse to one outer axis: no 64-bit division for them.
        if (dim > 0) {
            if (layout.extent[dim] == 1) continue;
            row_idx = position / layout.extent[dim];
            position -= row_idx * layout.extent[dim];
        }
        offsets.x += position * layout.x_row_stride[dim];
        offsets.out += position * layout.out_row_stride[dim];
    }
    return offsets;
}

// Which of the CTA's rows a thread works on, and which of the row's threads it is.
struct Place {
    int row;
    int thread;
};

__device__ __forceinline__ Place thread_place() {
    const int thread_idx = threadIdx.x;
    if constexpr (LANES_SPAN_ROWS) return {thread_idx % WARP_SIZE, thread_idx / WARP_SIZE};
    return {thread_idx / THREADS_PER_ROW, thread_idx % THREADS_PER_ROW};
}

// --- packs -----------------------------------------------------------------------------------------------------------

struct Pack {
    Accumulator value[PACK];
};

union PackBits {
    uint4 bits;
    Element element[PACK];
    __device__ PackBits() {}
};

// Column of element i of a thread's pack in the tile that starts at `tile`.
__device__ __forceinline__ unsigned pack_col(unsigned tile, int thread, int i) {
    return VECTORIZED ? tile + thread * PACK + i : tile + i * THREADS_PER_ROW + thread;
}

// Elements at or beyond `end` read as -inf, which adds nothing to a row.
__device__ __forceinline__ Pack load_pack(const Element* row, long long col_stride, unsigned tile, int thread,
                                          unsigned end) {
    Pack pack;
    if constexpr (VECTORIZED) {
        col_stride = 1;
        if (pack_col(tile, thread, PACK) <= end) {
            PackBits bits;
            bits.bits = *reinterpret_cast<const uint4*>(row + pack_col(tile, thread, 0));
#pragma unroll
            for (int i = 0; i < PACK; ++i) pack.value[i] = to_real(bits.element[i]);
            return pack;
        }
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        const unsigned col = pack_col(tile, thread, i);
        pack.value[i] = col < end ? to_real(row[col * col_stride]) : -infinity();
    }
    return pack;
}

__device__ __forceinline__ void store_pack(Element* row, long long col_stride, unsigned tile, int thread, unsigned end,
                                           const Pack& pack) {
    PackBits bits;
#pragma unroll
    for (int i = 0; i < PACK; ++i) from_real(pack.value[i], bits.element[i]);
    if constexpr (VECTORIZED) {
        col_stride = 1;
        if (pack_col(tile, thread, PACK) <= end) {
            *reinterpret_cast<uint4*>(row + pack_col(tile, thread, 0)) = bits.bits;
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        const unsigned col = pack_col(tile, thread, i);
        if (col < end) row[col * col_stride] = bits.element[i];
    }
}

// --- reductions over the threads of a row ----------------------------------------------------------------------------

struct Maximum {
    __device__ static Accumulator combine(Accumulator a, Accumulator b) { return maximum(a, b); }
};
struct Sum {
    __device__ static Accumulator combine(Accumulator a, Accumulator b) { return a + b; }
};

// One slot a thread of the row and row of the CTA; a warp that lies inside a row needs only one slot.
constexpr int NUM_SLOTS = ROW_IN_WARP ? 1 : LANES_SPAN_ROWS ? NUM_THREADS : NUM_WARPS;

// Maximum and sum have slots of their own: the barrier inside the sum's reduction then also keeps the next maximum from
// overwriting slots that a slow warp still reads.
struct Smem {
    Accumulator row_max[NUM_SLOTS];
    Accumulator row_sum[NUM_SLOTS];
};

template <typename Op, int NUM_LANES>
__device__ __forceinline__ Accumulator reduce_lanes(Accumulator value) {
#pragma unroll
    for (int distance = NUM_LANES / 2; distance > 0; distance /= 2) {
        value = Op::combine(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    return value;
}

// Every thread of the row gets the same bits: a butterfly of a commutative operation. The slots may be written again
// only behind another barrier. Called by all threads of the CTA.
template <typename Op>
__device__ __forceinline__ Accumulator reduce_row(Accumulator value, Accumulator* s_slots) {
    if constexpr (ROW_IN_WARP) {
        return reduce_lanes<Op, THREADS_PER_ROW>(value);
    } else if constexpr (LANES_SPAN_ROWS) {
        s_slots[threadIdx.x] = value;
        // SYNC: every warp's values are in shared memory before any warp combines them.
        __syncthreads();
        value = s_slots[threadIdx.x % WARP_SIZE];
#pragma unroll
        for (int warp_idx = 1; warp_idx < NUM_WARPS; ++warp_idx) {
            value = Op::combine(value, s_slots[warp_idx * WARP_SIZE + threadIdx.x % WARP_SIZE]);
        }
        return value;
    } else {
        value = reduce_lanes<Op, WARP_SIZE>(value);
        if (threadIdx.x % WARP_SIZE == 0) s_slots[threadIdx.x / WARP_SIZE] = value;
        // SYNC: the value of every warp, not only of the first, is in shared memory before any warp combines them.
        __syncthreads();
        // The slots repeat over the lanes, so that each group of NUM_WARPS lanes reduces all of them.
        return reduce_lanes<Op, NUM_WARPS>(s_slots[threadIdx.x % NUM_WARPS]);
    }
}

// The state of the row from the states of its threads.
__device__ __forceinline__ RowState reduce_state(RowState state, Smem& smem) {
    const Accumulator row_max = reduce_row<Maximum>(state.row_max, smem.row_max);
    return {row_max, reduce_row<Sum>(rescaled_sum(state, row_max), smem.row_sum)};
}

// For rows that end after a single reduction (the naive algorithm). After a maximum and a sum nothing needs it: see
// Smem.
__device__ __forceinline__ void end_of_row() {
    if constexpr (!ROW_IN_WARP) {
        // SYNC: every warp has read the slots of this row before any warp writes those of the next.
        __syncthreads();
    }
}
