// Which part of the gradient of a bias a CTA computes, and in which order it sums.
//
// The gradient has the shape of the bias: dS, summed over the axes along which the bias is broadcast. Its tiles are
// those of the logits, BLOCK_M x BLOCK_N, where it has queries and keys; a summed axis of it is one tile. Into one tile
// go the tiles of dS of all batch entries, heads, query tiles and key tiles of the summed axes: its terms, numbered in
// this order, key tiles fastest. They are cut into `num_parts` runs of about the same number, one a CTA. With one part
// the CTA writes the gradient itself; with several, each writes its sums to a workspace, and
// attention_backward_bias_sum.cu adds them up. Neither the order nor the cuts depend on what else runs: the same
// problem gives the same bits.
//
// Grid: x = tile of the gradient * num_parts + part; tiles in the order of the gradient's axes.
//
// Constants used: BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, ALIGNED, BOUND_LEFT, BOUND_RIGHT, BiasElement; NUM_THREADS of
// the including kernel.
#pragma once
#include "backward/attention_backward_params.cuh"
#include "attention/mask.cuh"
#include "common/narrow.cuh"
#include "attention/query_block.cuh"
#include "common/tiles.cuh"

// Passed by value.
struct BiasSums {
    LogitStrides strides;    // of the gradient; 0: the axis is summed
    long long num_elements;  // of the gradient; parts lie so far apart in the workspace
    int num_batch, num_heads, seqlen_q, seqlen_k;  // of the logits (of the longest sequences, when packed)
    int num_parts;
};

// The columns of a tile in shared memory, as a type.
template <int COLS>
struct Width {
    static constexpr int value = COLS;
};

// One term: a tile of dS.
struct BiasTerm {
    int batch_idx, head_idx, q_tile, k_tile;
};

// The range of terms of a CTA, and where in it the CTA is. Terms that no query sees a key of are passed over.
class BiasWalk {
   public:
    BiasTerm term;         // the present one
    Sequence sequence;     // that it belongs to
    long long terms_left;  // this one included; 0 or less: there is none

    template <typename Params>
    __device__ __forceinline__ BiasWalk(const BiasSums& sums, const Params& params, const int* g_cu_seqlens_q,
                                        const int* g_cu_seqlens_k, const int* g_diagonal_offsets)
        : sums(sums), g_cu_seqlens_q(g_cu_seqlens_q), g_cu_seqlens_k(g_cu_seqlens_k),
          g_diagonal_offsets(g_diagonal_offsets) {
        q_tiles = tiles(sums.seqlen_q, BLOCK_M);
        k_tiles = tiles(sums.seqlen_k, BLOCK_N);
        // The tile of the gradient ...
        unsigned tile = blockIdx.x / sums.num_parts;
        const unsigned part = blockIdx.x - tile * sums.num_parts;
        term.k_tile = sums.strides.key != 0 ? take_digit(tile, k_tiles) : 0;
        term.q_tile = sums.strides.query != 0 ? take_digit(tile, q_tiles) : 0;
        term.head_idx = sums.strides.head != 0 ? take_digit(tile, sums.num_heads) : 0;
        term.batch_idx = tile;
        // ... and its terms of this part.
        const long long num_terms = (sums.strides.batch != 0 ? 1ll : sums.num_batch) *
                                    (sums.strides.head != 0 ? 1 : sums.num_heads) * row_terms() * col_terms();
        const long long first =
            num_terms / sums.num_parts * part + min(static_cast<long long>(part), num_terms % sums.num_parts);
        terms_left = num_terms / sums.num_parts + (part < num_terms % sums.num_parts);
        if (terms_left > 0) {
            move(first);
            find_visible(params);
        }
    }

    template <typename Params>
    __device__ __forceinline__ void next(const Params& params) {
        skip(1);
        find_visible(params);
    }

   private:
    const BiasSums& sums;
    const int *g_cu_seqlens_q, *g_cu_seqlens_k, *g_diagonal_offsets;
    int q_tiles, k_tiles;

    static __device__ __forceinline__ int tiles(int seqlen, int block) {
        return (static_cast<unsigned>(seqlen) + block - 1) / block;
    }
    static __device__ __forceinline__ int take_digit(unsigned& number, int base) {
        const unsigned quotient = number / base;
        const int digit = number - quotient * base;
        number = quotient;
        return digit;
    }
    // Terms along an axis.
    __device__ __forceinline__ int row_terms() const { return sums.strides.query != 0 ? 1 : q_tiles; }
    __device__ __forceinline__ int col_terms() const { return sums.strides.key != 0 ? 1 : k_tiles; }

    // Moves `count` terms on. Most moves stay in the row of tiles.
    __device__ __forceinline__ void move(long long count) {
        if (sums.strides.key == 0) {
            count += term.k_tile;
            if (count < k_tiles) {
                term.k_tile = count;
                return;
            }
            term.k_tile = count % k_tiles;
            count /= k_tiles;
        }
        if (sums.strides.query == 0) {
            count += term.q_tile;
            if (count < q_tiles) {
                term.q_tile = count;
                return;
            }
            term.q_tile = count % q_tiles;
            count /= q_tiles;
        }
        if (sums.strides.head == 0) {
            count += term.head_idx;
            if (count < sums.num_heads) {
                term.head_idx = count;
                return;
            }
            term.head_idx = count % sums.num_heads;
            count /= sums.num_heads;
        }
        if (sums.strides.batch == 0) term.batch_idx += count;
    }
    __device__ __forceinline__ void skip(int count) {
        terms_left -= count;
        if (terms_left > 0) move(count);
    }

    // Goes to the next term, beginning with the present one, in which a query sees a key. Along the innermost summed
    // axis the visible tiles are neighbours: what is before and behind them is passed over at once.
    template <typename Params>
    __device__ __forceinline__ void find_visible(const Params& params) {
        while (terms_left > 0) {
            sequence.find(params, term.batch_idx, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
            const KeyBand band(params, sequence);
            const bool along_queries = sums.strides.query == 0 && sums.strides.key != 0;
            const bool along_keys = sums.strides.key == 0;
            const int position = along_queries ? term.q_tile : term.k_tile;
            int begin = 0, end = 0;  // tiles along which the position moves
            if (along_queries) {
                const int first_key = term.k_tile * BLOCK_N;
                if (first_key < sequence.seqlen_k) {
                    const KeyTiles range(band.transposed(sequence.seqlen_q), BLOCK_M, first_key,
                                         min(first_key + BLOCK_N, sequence.seqlen_k) - 1);
                    begin = range.begin;
                    end = range.end;
                }
            } else {
                const int first_query = term.q_tile * BLOCK_M;
                if (first_query < sequence.seqlen_q) {
                    const KeyTiles range(band, BLOCK_N, first_query,
                                         min(first_query + BLOCK_M, sequence.seqlen_q) - 1);
                    begin = range.begin;
                    end = range.end;
                }
            }
            if (position >= begin && position < end) return;
            if (!along_queries && !along_keys) {
                skip(1);  // to the next head or batch entry
            } else {
                skip(position < begin && begin < end ? begin - position
                                                     : (along_keys ? k_tiles : q_tiles) - position);
            }
        }
    }
};

// Where a CTA's sums go: an element of the gradient in its own type or, with several parts, of the workspace.
template <typename Real>
struct BiasTarget {
    BiasElement* g_dbias;
    Real* g_partial;  // null: there is one part
    LogitStrides strides;
    int num_queries, num_keys;  // from the tile's first ones on

    __device__ __forceinline__ BiasTarget(const BiasSums& sums, const BiasTerm& term, BiasElement* dbias,
                                          Real* partial)
        : g_dbias(dbias), g_partial(partial), strides(sums.strides) {
        const int first_query = strides.query != 0 ? term.q_tile * BLOCK_M : 0;
        const int first_key = strides.key != 0 ? term.k_tile * BLOCK_N : 0;
        num_queries = strides.query != 0 ? sums.seqlen_q - first_query : 1;
        num_keys = strides.key != 0 ? sums.seqlen_k - first_key : 1;
        const long long offset = strides.offset(term.batch_idx, term.head_idx, first_query, first_key);
        g_dbias += offset;
        if (g_partial != nullptr) g_partial += offset + blockIdx.x % sums.num_parts * sums.num_elements;
    }

    // `query` and `key` count from the tile's first ones; 0 along a summed axis.
    __device__ __forceinline__ void store(int query, int key, Real sum) const {
        if (query >= num_queries || key >= num_keys) return;
        const long long offset = strides.offset(0, 0, query, key);
        if (g_partial != nullptr) {
            g_partial[offset] = sum;
        } else {
            narrow(sum, g_dbias[offset]);
        }
    }
};

// The arrays of a problem whose tiles go through shared memory.
template <typename Element>
struct BiasOperands {
    const Element* __restrict__ g_dout;  // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_q;     // [batch, seqlen_q, num_heads, head_dim]
    const Element* __restrict__ g_k;     // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v;     // [batch, seqlen_k, num_kv_heads, head_dim_v]
};

// Walks over the terms of a CTA. For each, use_qk() is called while q and k are in shared memory, then use_dout_v()
// while dout and v are; either pair of tiles loads while the other one is used, and a tile that the term before had too
// is not loaded again. `smem` has tiles q, k, v, dout. There is no barrier after the last call.
template <typename Smem, typename Element, typename Params, typename UseQK, typename UseDoutV>
__device__ __forceinline__ void walk_over_terms(BiasWalk& walk, Smem& smem, const BiasOperands<Element>& operands,
                                                const Params& params, const UseQK& use_qk,
                                                const UseDoutV& use_dout_v) {
    bool new_queries = true, new_keys = true;  // since the term before
    auto load_queries = [&](auto* s_tile, const Element* g_rows, const RowStrides& strides, auto width, int num_cols) {
        const int first_query = walk.term.q_tile * BLOCK_M;
        load_tile<ALIGNED, BLOCK_M, decltype(width)::value, NUM_THREADS>(
            s_tile, g_rows + walk.term.batch_idx * strides.batch + walk.term.head_idx * strides.head +
                        (static_cast<long long>(walk.sequence.q_start) + first_query) * strides.seq,
            strides.seq, walk.sequence.seqlen_q - first_query, num_cols);
    };
    auto load_keys = [&](auto* s_tile, const Element* g_rows, const RowStrides& strides, auto width, int num_cols) {
        const int first_key = walk.term.k_tile * BLOCK_N;
        load_tile<ALIGNED, BLOCK_N, decltype(width)::value, NUM_THREADS>(
            s_tile, g_rows + walk.term.batch_idx * strides.batch +
                        walk.term.head_idx / params.heads_per_kv_head * strides.head +
                        (static_cast<long long>(walk.sequence.k_start) + first_key) * strides.seq,
            strides.seq, walk.sequence.seqlen_k - first_key, num_cols);
    };
    auto load_qk = [&] {
        if (new_queries) load_queries(smem.q[0], operands.g_q, params.q, Width<HEAD_DIM>(), params.head_dim);
        if (new_keys) load_keys(smem.k[0], operands.g_k, params.k, Width<HEAD_DIM>(), params.head_dim);
        cp_async_commit();
    };
    if (walk.terms_left > 0) load_qk();
    while (walk.terms_left > 0) {
        cp_async_wait<0>();
        // SYNC: q and k of this term have landed; every warp is done with dout and v of the term before.
        __syncthreads();
        if (new_queries) {
            load_queries(smem.dout[0], operands.g_dout, params.dout, Width<HEAD_DIM_V>(), params.head_dim_v);
        }
        if (new_keys) load_keys(smem.v[0], operands.g_v, params.v, Width<HEAD_DIM_V>(), params.head_dim_v);
        cp_async_commit();
        use_qk();
        const BiasTerm before = walk.term;
        walk.next(params);
        const bool same_batch = walk.term.batch_idx == before.batch_idx;
        new_queries = !same_batch || walk.term.head_idx != before.head_idx || walk.term.q_tile != before.q_tile;
        new_keys = !same_batch || walk.term.k_tile != before.k_tile ||
                   walk.term.head_idx / params.heads_per_kv_head != before.head_idx / params.heads_per_kv_head;
        cp_async_wait<0>();
        // SYNC: dout and v have landed; every warp is done with q and k.
        __syncthreads();
        if (walk.terms_left > 0) load_qk();
        use_dout_v();
    }
}
