// The walk of attention_forward_hopper.cu over the key tiles that a list names (attention/tile_list.cuh), instead of
// those of a band: what the producer copies, and what consumers hide.
//
// A tile is gathered from pieces: runs of keys that are always together, because blocks of the mask are made of them. A
// piece is a box of the tensor maps of k and v, and lane p of the producing warp copies piece p. It is a multiple of
// eight keys, after which the swizzle begins anew, so that wherever its keys come from, a tile in shared memory looks
// like any other. The tiles of a CTA are [key_begin, key_end) again: numbers of entries of the list.
//
// Constants: those of attention_forward_hopper.cu.
#pragma once
#include "hopper/forward_consumer.cuh"
#include "hopper/forward_producer.cuh"
#include "attention/tile_list.cuh"

using KeyList = TileList<BLOCK_N>;

// Of the rows of a tile.
__device__ __forceinline__ KeyList key_list(const int* g_tile_list, const WorkTile& tile, int pack) {
    return KeyList(g_tile_list, tile.block.batch_idx, tile.block.first_query / (BLOCK_M / pack));
}

// The tiles of a list that some row of a work tile sees by its position, in place of those of the band.
__device__ __forceinline__ void take_listed_tiles(WorkTile& tile, const KeyList& list) {
    int begin = list.begin(tile.block.head_idx), end = list.end(tile.block.head_idx);
    if (TileBand::HAS_BEGIN || TileBand::HAS_END) {
        const int first_query = tile.block.first_query;
        list.narrow(begin, end, tile.band.begin(first_query), tile.band.end(first_query + tile.num_queries - 1));
    }
    tile.key_begin = begin / ListedTile::INTS;
    tile.key_end = end / ListedTile::INTS;
}

// --- the producer ----------------------------------------------------------------------------------------------------

// A lane's piece of a tile: where in the array it begins, and how many of its keys the sequence has. Behind the end of
// the array copies are zeros.
struct Piece {
    int first_row, num_keys;

    __device__ __forceinline__ Piece(const KeyList& list, const ListedTile& entry, const Sequence& sequence, int size,
                                     int lane_idx, int end_of_array)
        : first_row(end_of_array), num_keys(0) {
        if (lane_idx * size >= BLOCK_N) return;
        const int first_key = list.column(entry, lane_idx * (size / GRANULE));
        if (first_key >= sequence.seqlen_k) return;
        first_row = sequence.k_start + first_key;
        num_keys = min(size, sequence.seqlen_k - first_key);
    }
};

// A tile of keys or values, all lanes of the producing warp together.
template <int SPANS>
__device__ __forceinline__ void load_pieces(Element (&s_tile)[SPANS][BLOCK_N][SPAN], const TensorMap& map,
                                            const unsigned long long& barrier, const QueryBlock& block,
                                            const Piece& piece, int size, int lane_idx) {
    const unsigned s_barrier = smem_address(&barrier);
    if (lane_idx == 0) mbarrier_arrive_expect(s_barrier, SPANS * BLOCK_N * SPAN_BYTES);
    // SYNC: the bytes are announced before any of them lands.
    __syncwarp();
    if (lane_idx * size >= BLOCK_N) return;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        tma_load(smem_address(s_tile[span][lane_idx * size]), map, s_barrier, L2_EVICT_LAST, span * SPAN,
                 piece.first_row, block.kv_head_idx, PACKED ? 0 : block.batch_idx);
    }
}

__device__ __forceinline__ void produce_listed(Smem& smem, const TensorMap& map_q, const TensorMap& map_k,
                                               const TensorMap& map_v, const WorkTile& tile, const Params& params,
                                               const HopperSchedule& schedule, const KeyList& list,
                                               RingPositions& rings, unsigned& tail_parity) {
    const QueryBlock& block = tile.block;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int size = list.piece();
    if (tile.key_begin == tile.key_end) return;
    if (lane_idx == 0) load_queries(smem, map_q, block, schedule, rings);
    rings.q.advance();
#pragma unroll 1
    for (int key_tile = tile.key_end - 1; key_tile >= tile.key_begin; key_tile--) {
        const ListedTile entry = list.tile(key_tile * ListedTile::INTS);
        const Piece piece(list, entry, block, size, lane_idx, params.seqlen_k);
        rings.k.wait_empty(smem.k_ring);
        load_pieces(smem.k[rings.k.stage], map_k, smem.k_ring.full[rings.k.stage], block, piece, size, lane_idx);
        // At most one piece holds the end of a packed sequence: what lies behind it, in its box, is the next one's.
        const bool holds_end = 0 < piece.num_keys && piece.num_keys < size;
        const unsigned cut = PACKED ? __ballot_sync(0xffffffff, holds_end) : 0;
        rings.v.wait_empty(smem.v_ring);
        load_pieces(smem.values.rows[rings.v.stage], map_v, cut ? smem.v_tail : smem.v_ring.full[rings.v.stage], block,
                    piece, size, lane_idx);
        if (cut) {
            const int slot = __ffs(cut) - 1;
            const int num_keys = slot * size + __shfl_sync(0xffffffff, piece.num_keys, slot);
            clear_tail(smem, smem.v_ring, rings, num_keys, lane_idx, tail_parity);
        }
        rings.k.advance();
        rings.v.advance();
    }
}

// --- consumers -------------------------------------------------------------------------------------------------------

// The walk of a consumer: see BandWalk.
struct ListWalk {
    static constexpr bool LISTED = true;
    static constexpr bool BOUNDED = TileBand::HAS_BEGIN || TileBand::HAS_END;

    KeyList list;
    RowWords<Layout> words;
    int full_begin, full_end;  // keys that every row of the warpgroup sees by its position
    int lane_column;

    __device__ __forceinline__ ListWalk(const KeyList& list, const WorkTile& tile, int pack, int consumer_idx,
                                        int first_row, int lane_idx)
        : list(list),
          words(tile.block.first_query, list.rows_per_word,
                [&](int r) {
                    const Row row(tile, pack, first_row + Layout::row(r));
                    return row.in_range ? row.query : NO_ROW;
                }),
          lane_column(frag_acc_col(lane_idx)) {
        const ConsumerQueries queries(tile, pack, consumer_idx);
        full_begin = tile.band.begin(queries.last);
        full_end = tile.band.end(queries.first);
    }

    __device__ __forceinline__ ListedTile entry(int key_tile) const { return list.tile(key_tile * ListedTile::INTS); }

    // Scores become logits, and those that a row does not see -inf.
    __device__ __forceinline__ void logits(Scores& scores, const ListedTile& entry, const Params& params,
                                           const TileScales& scales, const RowOptions& options) const {
        using Slice = Layout::Slice;
        const ListedPosition<false, BLOCK_N> place{list, entry, 0, 0};
        if (ALIBI) {
            each_slice<Layout>(scores, place, [&](Slice::Tile& slice, const TilePosition<false>& keys) {
                const HeadRows rows([&](int r) { return options.slope[r]; },
                                    [&](int r) { return options.distance(r, keys.other); });
                softmax_logits<Slice>(slice, params, scales.scale, scales.scale_log2, rows);
            });
        } else {
            const HeadRows rows([](int) { return 0.0f; }, [](int) { return 0.0f; });
            softmax_logits<Layout>(scores, params, scales.scale, scales.scale_log2, rows);
        }
        list.hide<Layout>(scores, negative_infinity<float>(), entry, words, lane_column);
        if (BOUNDED && !list.inside(entry, full_begin, full_end)) {
            each_slice<Layout>(scores, place, [&](Slice::Tile& slice, const TilePosition<false>& keys) {
                hide_by_position<Slice>(slice, negative_infinity<float>(),
                                        [&](int r) { return options.keys.from(r, keys.other); });
            });
        }
    }
};
