// Which keys a query may see by its position: causal masks and windows.
#pragma once
#include "attention/attention_params.cuh"

// Query i sees the keys [begin(i), end(i)): those from i + o - left to i + o + right, where i + o is the key that the
// query is aligned with. Both ends rise with i. A causal mask is a window with right = 0. A side that the kernel is not
// compiled for costs nothing.
template <bool BOUND_LEFT, bool BOUND_RIGHT>
struct Band {
    static constexpr bool HAS_BEGIN = BOUND_LEFT;  // else begin(i) is 0

    int seqlen_k;
    int begin_offset;  // begin(i) = i + begin_offset, brought into [0, seqlen_k]
    int end_offset;    // end(i) = i + end_offset, likewise

    Band() = default;
    __device__ __forceinline__ Band(int seqlen_k, int diagonal_offset, int left, int right) : seqlen_k(seqlen_k) {
        const long long diagonal = diagonal_offset;
        begin_offset = left == UNBOUNDED ? -UNBOUNDED : to_int(diagonal - left);
        end_offset = right == UNBOUNDED ? UNBOUNDED : to_int(diagonal + right + 1);
    }
    __device__ __forceinline__ int begin(int query_idx) const { return BOUND_LEFT ? key(query_idx, begin_offset) : 0; }
    __device__ __forceinline__ int end(int query_idx) const {
        return BOUND_RIGHT ? key(query_idx, end_offset) : seqlen_k;
    }

    // The same band seen from the keys: key j is seen by the queries [begin(j), end(j)) of seqlen_q.
    __device__ __forceinline__ Band<BOUND_RIGHT, BOUND_LEFT> transposed(int seqlen_q) const {
        Band<BOUND_RIGHT, BOUND_LEFT> band;
        band.seqlen_k = seqlen_q;
        band.begin_offset = to_int(1ll - end_offset);
        band.end_offset = to_int(1ll - begin_offset);
        return band;
    }

   private:
    // An offset beyond the range of int is beyond every sequence too.
    static __device__ __forceinline__ int to_int(long long x) {
        constexpr long long LIMIT = UNBOUNDED;
        return static_cast<int>(max(-LIMIT, min(LIMIT, x)));
    }
    __device__ __forceinline__ int key(int query_idx, int offset) const {
        return static_cast<int>(
            max(0ll, min(static_cast<long long>(seqlen_k), static_cast<long long>(query_idx) + offset)));
    }
};

// The key tiles that the queries [first_query, last_query] have to visit: [begin, end). Those of [full_begin, full_end)
// are visible to every query in whole and need no mask.
struct KeyTiles {
    int begin, end, full_begin, full_end;

    template <typename Band>
    __device__ __forceinline__ KeyTiles(const Band& band, int block_n, int first_query, int last_query) {
        begin = band.begin(first_query) / block_n;
        end = ceil_div(band.end(last_query), block_n);
        full_begin = ceil_div(band.begin(last_query), block_n);
        full_end = band.end(first_query) / block_n;
    }
    __device__ __forceinline__ bool in_full(int tile_idx) const {
        return tile_idx >= full_begin && tile_idx < full_end;
    }

   private:
    static __device__ __forceinline__ int ceil_div(unsigned x, int block_n) { return (x + block_n - 1) / block_n; }
};
