// The walk of a backward kernel over the tiles that a list names (attention/tile_list.cuh), instead of those of a band:
// of the rows that the CTA owns, and for every query head that the walk goes through. Tiles of a head in their order.
//
// Constants used: OWN_KEYS, BLOCK_OWN, BLOCK_OTHER; the options (attention/logits.cuh).
#pragma once
#include "attention/query_block.cuh"
#include "attention/tile_list.cuh"

template <typename Layout, typename Band>
struct OwnedListWalk {
    static constexpr bool BOUNDED = Band::HAS_BEGIN || Band::HAS_END;
    using Position = ListedPosition<OWN_KEYS, BLOCK_OTHER>;
    using Place = TilePosition<OWN_KEYS>;
    using Slice = typename Layout::Slice;

    const OwnedBlock& block;
    const Band& band;
    TileList<BLOCK_OTHER> list;
    RowWords<Layout> words;
    int first_head, num_heads, last_row, num_own;

    // A tile, and what the list says of it.
    struct Cursor {
        int head, at, end;
        ListedTile entry;
    };

    // lane_row: the lane's first row. The query heads from first_head on are walked through.
    __device__ __forceinline__ OwnedListWalk(const OwnedBlock& block, const Band& band, const int* g_tile_list,
                                             int first_head, int num_heads, int last_row, int num_own, int lane_row)
        : block(block),
          band(band),
          list(g_tile_list, block.batch_idx, block.first_row / BLOCK_OWN),
          words(block.first_row, lane_row, num_own, list.rows_per_word),
          first_head(first_head),
          num_heads(num_heads),
          last_row(last_row),
          num_own(num_own) {}

    __device__ __forceinline__ Cursor before_first() const { return {-1, 0, 0, {}}; }
    // To the next tile; head == num_heads when there is none.
    __device__ __forceinline__ void advance(Cursor& at) const {
        at.at += 2;
        while (at.at >= at.end) {
            if (++at.head == num_heads) return;
            at.at = list.begin(first_head + at.head);
            at.end = list.end(first_head + at.head);
            if (BOUNDED) list.narrow(at.at, at.end, band.begin(block.first_row), band.end(last_row));
        }
        at.entry = list.tile(at.at);
    }

    // Whether the rows of the warp, which see columns of `bounds`, see any of a tile.
    __device__ __forceinline__ bool concerns(const typename Band::RowBounds& bounds, const ListedTile& tile) const {
        return bounds.meet(tile.first(), list.reach(tile)) && list.any_visible(tile, words);
    }
    // Where the lane's part of a tile is; `lane` as if its columns followed each other.
    __device__ __forceinline__ Position place(const Cursor& at, const Place& lane) const {
        return {list, at.entry, lane.own, lane.other - at.entry.first()};
    }

    // f(slice, place) for the parts of a tile that lie in one granule.
    template <typename F>
    __device__ __forceinline__ void each(typename Layout::Tile& tile, const Position& lane, const F& f) const {
        each_slice<Layout>(tile, lane, f);
    }

    // `hidden` where a row does not see a column: by the mask of blocks, or by its position.
    template <typename Real>
    __device__ __forceinline__ void hide(typename Layout::Tile& tile, Real hidden, const Position& lane) const {
        list.hide<Layout>(tile, hidden, lane.tile, words, lane.lane_column);
        if (BOUNDED && !list.inside(lane.tile, band.begin(last_row), band.end(block.first_row))) {
            each(tile, lane, [&](typename Slice::Tile& slice, const Place& place) {
                hide_by_position<Slice>(slice, hidden, band, place, num_own);
            });
        }
    }

    // Scores become natural logits, and slopes what the softcap leaves of their derivatives.
    template <typename Real>
    __device__ __forceinline__ void logits(typename Layout::Tile& scores, typename Layout::Tile& slopes,
                                           const AttentionParams<Real>& params, const ScoreOptions<Real>& options,
                                           const Position& lane, int num_other) const {
        if (ALIBI || TILE_CLASSES) {
            each(scores, lane, [&](typename Slice::Tile& slice, const Place& place) {
                typename Slice::Tile slice_slopes{slopes, slice.index};
                const TileRows<Slice, OWN_KEYS, Real> rows(place, block.diagonal_offset, options.slope);
                scale_logits<Slice>(slice, slice_slopes, params, rows);
                add_bias_and_mask<Slice>(slice, params, options, place, num_own, num_other);
            });
        } else {
            const TileRows<Layout, OWN_KEYS, Real> rows({lane.own, 0}, 0, Real(0));
            scale_logits<Layout>(scores, slopes, params, rows);
        }
    }

   private:
    // On tensor cores products q k^T are exponentiated as they are, where nothing else is asked for.
    template <typename Part, typename Real, typename Rows>
    static __device__ __forceinline__ void scale_logits(typename Part::Tile& scores, typename Part::Tile& slopes,
                                                        const AttentionParams<Real>& params, const Rows& rows) {
        if (NATURAL_LOGITS || !Layout::APPROXIMATE) natural_logits<Part>(scores, slopes, params, params.scale, rows);
    }
};

// The walk, where there is one: a kernel that goes over the tiles of a band needs nothing but them.
template <bool LISTED, typename Layout, typename Band>
__device__ __forceinline__ auto owned_walk(const OwnedBlock& block, const Band& band, const KeyTiles& tiles,
                                           const int* g_tile_list, int first_head, int num_heads, int last_row,
                                           int num_own, int lane_row) {
    if constexpr (LISTED) {
        return OwnedListWalk<Layout, Band>(block, band, g_tile_list, first_head, num_heads, last_row, num_own,
                                           lane_row);
    } else {
        return tiles;
    }
}
