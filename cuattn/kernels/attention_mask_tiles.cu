// What a bias and a mask do to each tile of the logits, so that attention_forward.cu can pass over the tiles in which
// they hide every key, and treat those in which they change nothing as if there were none.
//
// One warp looks at one tile, row by row, and stops as soon as the answer is known: for most tiles of a bias after 32
// numbers. Along an axis on which both are broadcast, the extent is 1 and the answer serves every tile of that axis.
//
// Grid: x = groups of NUM_WARPS tiles, in the order of g_tile_class. Block: NUM_WARPS warps.
//
// Constants: BiasElement, NUM_WARPS; SOFTCAP, ALIBI, BIAS, MASK (all true, of score_options.cuh).
#include "score_options.cuh"

constexpr int WARP_SIZE = 32;

// Hidden, unchanged or changed: what a bias and a mask do to one logit.
template <typename Bias>
__device__ __forceinline__ TileClass element_class(const Bias* g_bias, const unsigned char* g_mask) {
    if (g_mask != nullptr && *g_mask == 0) return TILE_HIDDEN;
    if (g_bias == nullptr) return TILE_OPEN;
    // A double below the range of float is -inf in the attention kernels, but not in those of float64: changed, then.
    const Bias bias = *g_bias;
    const float value = static_cast<float>(bias);
    if (value == 0.0f && bias == static_cast<Bias>(0.0f)) return TILE_OPEN;
    const bool hides = value == negative_infinity<float>() && bias == static_cast<Bias>(value);
    return hides ? TILE_HIDDEN : TILE_MIXED;
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_mask_tiles(
    const BiasElement* __restrict__ g_bias,     // [batch, heads, seqlen_q, seqlen_k], or null
    const unsigned char* __restrict__ g_mask,   // likewise
    unsigned char* __restrict__ g_tile_class,   // [batch, heads, query tiles, key tiles], contiguous
    long long bias_batch_stride, long long bias_head_stride, long long bias_query_stride, long long bias_key_stride,
    long long mask_batch_stride, long long mask_head_stride, long long mask_query_stride, long long mask_key_stride,
    int num_batch, int num_heads, int seqlen_q, int seqlen_k,  // 1 along an axis on which both are broadcast
    int block_m, int block_n)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const long long num_q_tiles = (static_cast<unsigned>(seqlen_q) + block_m - 1) / block_m;
    const long long num_k_tiles = (static_cast<unsigned>(seqlen_k) + block_n - 1) / block_n;
    const long long tile = static_cast<long long>(blockIdx.x) * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (tile >= num_batch * num_heads * num_q_tiles * num_k_tiles) return;
    const int first_key = tile % num_k_tiles * block_n;
    const int first_query = tile / num_k_tiles % num_q_tiles * block_m;
    const long long head = tile / num_k_tiles / num_q_tiles;
    const int head_idx = head % num_heads;
    const int batch_idx = head / num_heads;
    const int last_query = min(seqlen_q - 1, first_query + block_m - 1);
    const int last_key = min(seqlen_k - 1, first_key + block_n - 1);

    if (g_bias != nullptr) g_bias += batch_idx * bias_batch_stride + head_idx * bias_head_stride;
    if (g_mask != nullptr) g_mask += batch_idx * mask_batch_stride + head_idx * mask_head_stride;
    bool any_hidden = false, any_open = false, any_mixed = false;
    for (int query_idx = first_query; query_idx <= last_query; query_idx++) {
        for (int key = first_key; key <= last_key; key += WARP_SIZE) {
            const int key_idx = min(key + lane_idx, last_key);  // the lanes beyond the end repeat the last key
            const BiasElement* g_bias_element = g_bias;
            const unsigned char* g_mask_element = g_mask;
            if (g_bias != nullptr) g_bias_element += query_idx * bias_query_stride + key_idx * bias_key_stride;
            if (g_mask != nullptr) g_mask_element += query_idx * mask_query_stride + key_idx * mask_key_stride;
            const TileClass found = element_class(g_bias_element, g_mask_element);
            any_hidden |= __any_sync(0xffffffff, found == TILE_HIDDEN) != 0;
            any_open |= __any_sync(0xffffffff, found == TILE_OPEN) != 0;
            any_mixed |= __any_sync(0xffffffff, found == TILE_MIXED) != 0;
        }
        if (any_mixed || (any_hidden && any_open)) break;
    }
    const bool mixed = any_mixed || (any_hidden && any_open);
    if (lane_idx == 0) g_tile_class[tile] = mixed ? TILE_MIXED : any_hidden ? TILE_HIDDEN : TILE_OPEN;
}
