// What a bias and a mask do to each tile of the logits, so that attention_forward.cu can pass over the tiles in which
// they hide every key, and treat those in which they change nothing as if there were none.
//
// One warp looks at one tile, row by row, and stops as soon as the answer is known: for most tiles of a bias after one
// row. Where there is only a mask and its rows can be read in 16-byte pieces, a warp reads several rows at once. Along
// an axis on which both are broadcast, the extent is 1 and the answer serves every tile of that axis.
//
// Grid: x = groups of NUM_WARPS tiles, in the order of g_tile_class. Block: NUM_WARPS warps.
//
// Constants: BiasElement, NUM_WARPS; SOFTCAP, ALIBI, BIAS, MASK (all true, of score_options.cuh).
#include "attention/attention_params.cuh"
#include "attention/online_softmax.cuh"
#include "attention/score_options.cuh"

constexpr int WARP_SIZE = 32;
constexpr int PIECE = 16;  // elements of a mask that a lane reads at once

// What has been found in a tile so far, one bit for each kind of element.
constexpr unsigned HIDDEN = 1, UNCHANGED = 2, CHANGED = 4;

__device__ __forceinline__ bool is_mixed(unsigned found) {
    return (found & CHANGED) != 0 || found == (HIDDEN | UNCHANGED);
}

// The kind of one element. g_bias, g_mask: may be null.
template <typename Bias>
__device__ __forceinline__ unsigned element_kind(const Bias* g_bias, const unsigned char* g_mask) {
    if (g_mask != nullptr && *g_mask == 0) return HIDDEN;
    if (g_bias == nullptr) return UNCHANGED;
    const Bias bias = *g_bias;
    const float value = static_cast<float>(bias);
    if (value == 0.0f && bias == static_cast<Bias>(0.0f)) return UNCHANGED;
    // A finite double below the range of float hides nothing, though its value here is -inf.
    const bool hides = value == negative_infinity<float>() && bias == static_cast<Bias>(value);
    return hides ? HIDDEN : CHANGED;
}

// The kinds of four elements of a mask: a zero byte hides, any other does not.
__device__ __forceinline__ unsigned word_kinds(unsigned word) {
    const unsigned zero_bytes = (word - 0x01010101u) & ~word & 0x80808080u;  // not 0 if and only if there is one
    const unsigned hidden = zero_bytes != 0 ? HIDDEN : 0;
    return hidden | (word != 0 ? UNCHANGED : 0);
}

// The tile of one warp: rows and columns of the logits, [first, end).
struct Tile {
    int first_query, end_query, first_key, end_key;
};

// Called by whole warps. Lanes share a row, 32 elements at a time.
__device__ __forceinline__ unsigned look_at_elements(const BiasElement* g_bias, const unsigned char* g_mask,
                                                     const LogitStrides& bias, const LogitStrides& mask,
                                                     const Tile& tile, int lane_idx) {
    unsigned found = 0;
    for (int query_idx = tile.first_query; query_idx < tile.end_query && !is_mixed(found); query_idx++) {
        for (int key_idx = tile.first_key + lane_idx; key_idx < tile.end_key; key_idx += WARP_SIZE) {
            found |= element_kind(g_bias == nullptr ? g_bias : g_bias + query_idx * bias.query + key_idx * bias.key,
                                  g_mask == nullptr ? g_mask : g_mask + query_idx * mask.query + key_idx * mask.key);
        }
        found = __reduce_or_sync(0xffffffff, found);
    }
    return found;
}

// The same for a mask alone, whose rows are contiguous and whose pieces of 16 bytes are aligned and whole.
__device__ __forceinline__ unsigned look_at_pieces(const unsigned char* g_mask, long long query_stride,
                                                   const Tile& tile, int lane_idx) {
    const int pieces_per_row = (tile.end_key - tile.first_key) / PIECE;
    const int num_pieces = pieces_per_row * (tile.end_query - tile.first_query);
    unsigned found = 0;
    for (int first = 0; first < num_pieces && !is_mixed(found); first += WARP_SIZE) {
        const int piece = first + lane_idx;
        if (piece < num_pieces) {
            const int row = piece / pieces_per_row;
            const int key_idx = tile.first_key + (piece - row * pieces_per_row) * PIECE;
            const uint4 words =
                *reinterpret_cast<const uint4*>(g_mask + (tile.first_query + row) * query_stride + key_idx);
            found |= word_kinds(words.x) | word_kinds(words.y) | word_kinds(words.z) | word_kinds(words.w);
        }
        found = __reduce_or_sync(0xffffffff, found);
    }
    return found;
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_mask_tiles(
    const BiasElement* __restrict__ g_bias,    // [batch, heads, seqlen_q, seqlen_k], or null
    const unsigned char* __restrict__ g_mask,  // likewise
    unsigned char* __restrict__ g_tile_class,  // [batch, heads, query tiles, key tiles], contiguous
    const LogitStrides bias, const LogitStrides mask,
    int num_batch, int num_heads, int seqlen_q, int seqlen_k,  // 1 along an axis on which both are broadcast
    int block_m, int block_n)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const long long num_q_tiles = (static_cast<unsigned>(seqlen_q) + block_m - 1) / block_m;
    const long long num_k_tiles = (static_cast<unsigned>(seqlen_k) + block_n - 1) / block_n;
    const long long tile_idx = static_cast<long long>(blockIdx.x) * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (tile_idx >= num_batch * num_heads * num_q_tiles * num_k_tiles) return;
    Tile tile;
    tile.first_key = tile_idx % num_k_tiles * block_n;
    tile.end_key = tile.first_key + min(block_n, seqlen_k - tile.first_key);
    tile.first_query = tile_idx / num_k_tiles % num_q_tiles * block_m;
    tile.end_query = tile.first_query + min(block_m, seqlen_q - tile.first_query);
    const long long head = tile_idx / num_k_tiles / num_q_tiles;
    const int head_idx = head % num_heads;
    const int batch_idx = head / num_heads;

    if (g_bias != nullptr) g_bias += bias.offset(batch_idx, head_idx, 0, 0);
    if (g_mask != nullptr) g_mask += mask.offset(batch_idx, head_idx, 0, 0);
    const unsigned long long alignment =
        reinterpret_cast<unsigned long long>(g_mask) | mask.query | (tile.end_key - tile.first_key) | tile.first_key;
    const bool in_pieces = g_bias == nullptr && mask.key == 1 && alignment % PIECE == 0;
    const unsigned found = in_pieces ? look_at_pieces(g_mask, mask.query, tile, lane_idx)
                                     : look_at_elements(g_bias, g_mask, bias, mask, tile, lane_idx);
    if (lane_idx == 0) {
        g_tile_class[tile_idx] = is_mixed(found) ? TILE_MIXED : found == HIDDEN ? TILE_HIDDEN : TILE_OPEN;
    }
}
