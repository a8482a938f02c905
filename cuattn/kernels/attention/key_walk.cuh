// The walk of a forward kernel over the tiles that a list names (tile_list.cuh), instead of those of a band. They are
// taken from the last to the first as well.
//
// Constants used: BLOCK_M, BLOCK_N; the options (logits.cuh).
#pragma once
#include "attention/query_block.cuh"
#include "attention/tile_list.cuh"

template <typename Layout, typename Real>
struct ListWalk {
    static constexpr bool BOUNDED = KeyBand::HAS_BEGIN || KeyBand::HAS_END;

    const AttentionParams<Real>& params;
    const ScoreOptions<Real>& options;
    const QueryBlock& block;
    const KeyBand& band;
    TileList<BLOCK_N> list;
    RowWords<Layout> words;
    int begin, end;
    int full_begin, full_end;  // keys that every query of the CTA sees by its position

    // A tile, and what the list says of it: fetched when the cursor moves there, which is a tile before it is loaded.
    struct Cursor {
        int at;
        ListedTile entry;
    };
    using Position = ListedPosition<false, BLOCK_N>;

    // lane_query: of the lane's first row.
    __device__ __forceinline__ ListWalk(const AttentionParams<Real>& params, const ScoreOptions<Real>& options,
                                        const QueryBlock& block, const KeyBand& band, const int* g_tile_list,
                                        int num_queries, int lane_query)
        : params(params),
          options(options),
          block(block),
          band(band),
          list(g_tile_list, block.batch_idx, block.first_query / BLOCK_M),
          words(block.first_query, lane_query, block.seqlen_q, list.rows_per_word) {
        const int last_query = block.first_query + num_queries - 1;
        begin = list.begin(block.head_idx);
        end = list.end(block.head_idx);
        if (BOUNDED) list.narrow(begin, end, band.begin(block.first_query), band.end(last_query));
        full_begin = band.begin(last_query);
        full_end = band.end(block.first_query);
    }

    __device__ __forceinline__ Cursor before(int behind) const { return before(Cursor{behind, {}}); }
    __device__ __forceinline__ Cursor before(Cursor at) const {
        at.at -= 2;
        if (has(at)) at.entry = list.tile(at.at);
        return at;
    }
    __device__ __forceinline__ bool has(const Cursor& at) const { return at.at >= begin; }

    // Whether the rows of the warp, which see keys of `bounds`, see any of a tile.
    __device__ __forceinline__ bool sees(const KeyBand::RowBounds& bounds, const Cursor& at) const {
        return bounds.meet(at.entry.first(), list.reach(at.entry)) && list.any_visible(at.entry, words);
    }
    // Where the lane's part of a tile is; `lane` as if its columns followed each other.
    __device__ __forceinline__ Position place(const Cursor& at, const TilePosition<false>& lane) const {
        return {list, at.entry, lane.own, lane.other - at.entry.first()};
    }

    // Scores become logits. score(layout, part, rows): what happens to them before bias and masks.
    template <typename Score>
    __device__ __forceinline__ void logits(typename Layout::Tile& scores, const Position& lane,
                                           const Score& score) const {
        using Slice = typename Layout::Slice;
        if (ALIBI || TILE_CLASSES) {
            each_slice<Layout>(scores, lane, [&](typename Slice::Tile& slice, const TilePosition<false>& place) {
                score(Slice(), slice, TileRows<Slice, false, Real>(place, block.diagonal_offset, options.slope));
                add_bias_and_mask<Slice>(slice, params, options, place, block.seqlen_q, block.seqlen_k);
            });
        } else {
            score(Layout(), scores, TileRows<Layout, false, Real>({lane.own, 0}, 0, Real(0)));
        }
        list.hide<Layout>(scores, negative_infinity<Real>(), lane.tile, words, lane.lane_column);
        if (BOUNDED && !list.inside(lane.tile, full_begin, full_end)) {
            each_slice<Layout>(scores, lane, [&](typename Slice::Tile& slice, const TilePosition<false>& place) {
                hide_by_position<Slice>(slice, negative_infinity<Real>(), band, place);
            });
        }
    }
};

// The walk, where there is one: a kernel that goes over the tiles of a band needs nothing but them.
template <bool LISTED, typename Layout, typename Real>
__device__ __forceinline__ auto key_walk(const AttentionParams<Real>& params, const ScoreOptions<Real>& options,
                                         const QueryBlock& block, const KeyBand& band, const KeyTiles& tiles,
                                         const int* g_tile_list, int num_queries, int lane_query) {
    if constexpr (LISTED) {
        return ListWalk<Layout, Real>(params, options, block, band, g_tile_list, num_queries, lane_query);
    } else {
        return tiles;
    }
}
