// Which keys a query may see by its position: causal masks, windows and chunks. This is the one place that knows: the
// tiles that a kernel loads, those that need no mask, and the elements that are hidden in the others all follow from
// Band. A further rule of the kind gives Band another bound on either end, and no kernel changes; both ends must rise
// with the row.
//
// Constants used: BOUND_LEFT, BOUND_RIGHT (which sides are compiled in).
#pragma once
#include "attention/attention_params.cuh"
#include "common/ptx.cuh"

// The columns [begin, end) that a row sees, or that some row of a block sees; begin is 0 without HAS_BEGIN.
template <bool HAS_BEGIN_>
struct Bounds {
    static constexpr bool HAS_BEGIN = HAS_BEGIN_;

    int begin, end;

    __device__ __forceinline__ bool hides(int column) const {
        return column >= end || (HAS_BEGIN && column < begin);
    }
    // Whether any of `count` columns from `first` on is among them.
    __device__ __forceinline__ bool meet(int first, int count) const {
        return first < end && !(HAS_BEGIN && first + count <= begin);
    }
    // Counted from a lane's first column, so that comparisons are with constants.
    __device__ __forceinline__ Bounds from(int first) const { return {begin - first, end - first}; }
};

// Query i sees the keys [begin(i), end(i)): those from i + o - left to i + o + right, where i + o is the key that the
// query is aligned with. Both ends rise with i. A causal mask is a window with right = 0. A side that the kernel is not
// compiled for costs nothing. Chunks bound both sides, in kernels that have both: of the keys cut into pieces of
// `chunk`, query i sees those of the piece of key i + o.
template <bool LEFT, bool RIGHT, bool CHUNKS = LEFT && RIGHT>
struct Band {
    static constexpr bool HAS_BEGIN = LEFT;  // else begin(i) is 0
    static constexpr bool HAS_END = RIGHT;   // else end(i) is seqlen_k
    static constexpr bool HAS_CHUNKS = CHUNKS;
    using RowBounds = Bounds<HAS_BEGIN>;

    int seqlen_k;
    int begin_offset;  // begin(i) = i + begin_offset, brought into [0, seqlen_k]
    int end_offset;    // end(i) = i + end_offset, likewise
    int chunk;         // 0: none
    int row_shift, column_shift;  // row i + row_shift and column j + column_shift are in one piece, or i does not see j

    Band() = default;
    template <typename Real>
    __device__ __forceinline__ Band(const AttentionParams<Real>& params, int seqlen_k, int diagonal_offset)
        : seqlen_k(seqlen_k) {
        const long long diagonal = diagonal_offset;
        const int left = params.window_left, right = params.window_right;
        begin_offset = left == UNBOUNDED ? -UNBOUNDED : to_int(diagonal - left);
        end_offset = right == UNBOUNDED ? UNBOUNDED : to_int(diagonal + right + 1);
        chunk = params.chunk;
        row_shift = diagonal_offset;
        column_shift = 0;
    }
    // sequence: anything with a length and a diagonal.
    template <typename Real, typename Sequence>
    __device__ __forceinline__ Band(const AttentionParams<Real>& params, const Sequence& sequence)
        : Band(params, sequence.seqlen_k, sequence.diagonal_offset) {}

    __device__ __forceinline__ int begin(int query_idx) const {
        return HAS_CHUNKS ? row(query_idx).begin : HAS_BEGIN ? key(query_idx, begin_offset) : 0;
    }
    __device__ __forceinline__ int end(int query_idx) const {
        return HAS_CHUNKS ? row(query_idx).end : HAS_END ? key(query_idx, end_offset) : seqlen_k;
    }
    __device__ __forceinline__ RowBounds row(int query_idx) const {
        RowBounds keys{HAS_BEGIN ? key(query_idx, begin_offset) : 0, HAS_END ? key(query_idx, end_offset) : seqlen_k};
        if (HAS_CHUNKS && chunk != 0) {  // one division for both ends
            const long long first = piece(query_idx);
            keys.begin = max(keys.begin, into_sequence(first));
            keys.end = min(keys.end, into_sequence(first + chunk));
        }
        return keys;
    }
    // Of all rows from `first` to `last` together.
    __device__ __forceinline__ RowBounds rows(int first, int last) const { return {begin(first), end(last)}; }

    // The same band seen from the keys: key j is seen by the queries [begin(j), end(j)) of seqlen_q.
    __device__ __forceinline__ Band<RIGHT, LEFT, CHUNKS> transposed(int seqlen_q) const {
        Band<RIGHT, LEFT, CHUNKS> band;
        band.seqlen_k = seqlen_q;
        band.begin_offset = to_int(1ll - end_offset);
        band.end_offset = to_int(1ll - begin_offset);
        band.chunk = chunk;
        band.row_shift = column_shift;
        band.column_shift = row_shift;
        return band;
    }

   private:
    // An offset beyond the range of int is beyond every sequence too.
    static __device__ __forceinline__ int to_int(long long x) {
        constexpr long long LIMIT = UNBOUNDED;
        return static_cast<int>(max(-LIMIT, min(LIMIT, x)));
    }
    __device__ __forceinline__ int into_sequence(long long key_idx) const {
        return static_cast<int>(max(0ll, min(static_cast<long long>(seqlen_k), key_idx)));
    }
    __device__ __forceinline__ int key(int query_idx, int offset) const {
        return into_sequence(static_cast<long long>(query_idx) + offset);
    }
    // The first key of the piece that a query sees. Below key 0 there are none to see.
    __device__ __forceinline__ long long piece(int query_idx) const {
        const long long aligned = static_cast<long long>(query_idx) + row_shift;
        if (aligned < 0) return -2ll * UNBOUNDED;
        const unsigned place = static_cast<unsigned>(aligned);  // two numbers below 2^31: 32 bits hold their sum
        // The reciprocal that a division begins with would be kept over every loop: the tightest rows spilled.
        const unsigned size = forget_origin(chunk);
        return static_cast<long long>(place - place % size) - column_shift;
    }
};

// What queries see, with all that the kernel is compiled for.
using KeyBand = Band<BOUND_LEFT, BOUND_RIGHT>;
// The same in kernels that are compiled with chunks or without them, whatever their bounds.
template <bool CHUNKS>
using KeyBandWithChunks = Band<BOUND_LEFT, BOUND_RIGHT, CHUNKS>;

// The band of the side whose rows a CTA owns: what queries see or, with OWN_KEYS, what sees the keys.
template <bool OWN_KEYS, typename Real, typename Sequence>
__device__ __forceinline__ auto owned_band(const AttentionParams<Real>& params, const Sequence& sequence) {
    const KeyBand band(params, sequence);
    if constexpr (OWN_KEYS) {
        return band.transposed(sequence.seqlen_q);
    } else {
        return band;
    }
}

// The key tiles that the queries [first_query, last_query] have to visit: [begin, end). Those of [full_begin, full_end)
// are visible to every query in whole and need no mask. (Of a transposed band: query tiles of keys.)
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
