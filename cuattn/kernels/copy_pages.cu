// Pages of a cache copied onto others, bytes as they are.
//
// A page is `num_runs` runs of neighboring units, numbered over at most NUM_AXES axes. A CTA copies a part of one pair
// of pages: UNITS_PER_THREAD * blockDim.x units of each of blockDim.y runs.
//
// Grid:  pairs x parts of a run x groups of runs, the last two strided.
// Block: (x over the units of a run, y over runs), 256 threads at most.
//
// Pages may be device data that nobody has checked: a pair with a page that does not exist is skipped.
//
// Constants: Unit (what a thread moves at once), NUM_THREADS.
#include "common/integers.cuh"

constexpr int NUM_AXES = 4;
constexpr int UNITS_PER_THREAD = 4;

// Passed by value. Strides are in units.
struct PagesLayout {
    long long num_pages;
    long long page_stride;
    long long strides[NUM_AXES];  // of runs
    unsigned extents[NUM_AXES];
    long long num_runs;
    long long run_units;
    long long src_stride, dst_stride;  // of the lists, in their elements
    int src_is_64_bit, dst_is_64_bit;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_copy_pages(Unit* g_pages,      // pages at any strides
                      const void* g_src,  // [num_pairs], int or long long
                      const void* g_dst,  // the same
                      const PagesLayout layout) {
    const long long src = load_integer(g_src, layout.src_is_64_bit, blockIdx.x * layout.src_stride);
    const long long dst = load_integer(g_dst, layout.dst_is_64_bit, blockIdx.x * layout.dst_stride);
    if (src < 0 || dst < 0 || src >= layout.num_pages || dst >= layout.num_pages) return;
    const Unit* g_from = g_pages + src * layout.page_stride;
    Unit* g_to = g_pages + dst * layout.page_stride;
    const long long part_units = UNITS_PER_THREAD * blockDim.x;

    for (long long run = static_cast<long long>(blockIdx.z) * blockDim.y + threadIdx.y; run < layout.num_runs;
         run += static_cast<long long>(gridDim.z) * blockDim.y) {
        long long rest = run, offset = 0;
#pragma unroll
        for (int axis = NUM_AXES - 1; axis > 0; --axis) {
            const long long next = rest / layout.extents[axis];
            offset += (rest - next * layout.extents[axis]) * layout.strides[axis];
            rest = next;
        }
        offset += rest * layout.strides[0];

        for (long long first = blockIdx.y * part_units + threadIdx.x; first < layout.run_units;
             first += gridDim.y * part_units) {
            Unit units[UNITS_PER_THREAD];  // all loads of a thread are under way before the first store
#pragma unroll
            for (int i = 0; i < UNITS_PER_THREAD; ++i) {
                const long long unit_idx = first + i * blockDim.x;
                if (unit_idx < layout.run_units) units[i] = g_from[offset + unit_idx];
            }
#pragma unroll
            for (int i = 0; i < UNITS_PER_THREAD; ++i) {
                const long long unit_idx = first + i * blockDim.x;
                if (unit_idx < layout.run_units) g_to[offset + unit_idx] = units[i];
            }
        }
    }
}
