// Attention as the formula says, in three kernels with the whole logit matrix in memory between them. The baseline that
// the fused kernels are compared with: it moves num_heads * seqlen_q * seqlen_k numbers to memory and back, twice.
//
//     cuattn_attention_scores:         scores = scale * q k^T, -inf where a key is not visible
//     cuattn_attention_probabilities:  probabilities = softmax(scores), lse
//     cuattn_attention_output:         out = probabilities v
//
// Grid and block of the two products: a CTA of TILE x TILE threads computes TILE x TILE numbers, one a thread;
// x = (head * row tiles + row tile) * column tiles + column tile, where head = batch_idx * num_heads + head_idx.
// Of the softmax: x = rows / NUM_WARPS, one warp a row. Head h reads key/value head h / heads_per_kv_head.
//
// Constants: Element, Accumulator, TILE, NUM_WARPS, CAUSAL.
#include "mask.cuh"
#include "online_softmax.cuh"

constexpr int WARP_SIZE = 32;

// Two tiles in shared memory; the odd row length keeps a column of `b` in different banks.
struct Smem {
    Accumulator a[TILE][TILE + 1];
    Accumulator b[TILE][TILE + 1];
};

// Where a CTA of a product stands.
struct ProductTile {
    unsigned head;
    int batch_idx, head_idx, kv_head_idx, row, col;  // row and col of this thread

    __device__ __forceinline__ ProductTile(int num_rows, int num_cols, int num_heads, int heads_per_kv_head) {
        const unsigned row_tiles = (static_cast<unsigned>(num_rows) + TILE - 1) / TILE;
        const unsigned col_tiles = (static_cast<unsigned>(num_cols) + TILE - 1) / TILE;
        const unsigned row_tile = blockIdx.x / col_tiles;
        head = row_tile / row_tiles;
        batch_idx = head / num_heads;
        head_idx = head - batch_idx * num_heads;
        kv_head_idx = head_idx / heads_per_kv_head;
        row = (row_tile - head * row_tiles) * TILE + threadIdx.y;
        col = (blockIdx.x - row_tile * col_tiles) * TILE + threadIdx.x;
    }
};

__device__ __forceinline__ Accumulator load_or_zero(const Element* g_element, bool inside) {
    return inside ? static_cast<Accumulator>(*g_element) : Accumulator(0);
}

extern "C" __global__ void __launch_bounds__(TILE * TILE) cuattn_attention_scores(
    const Element* __restrict__ g_q,         // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,         // [batch, seqlen_k, num_kv_heads, head_dim]
    Accumulator* __restrict__ g_scores,      // [batch, num_heads, seqlen_q, seqlen_k], contiguous
    long long q_batch_stride, long long q_seq_stride, long long q_head_stride,  // strides are in elements
    long long k_batch_stride, long long k_seq_stride, long long k_head_stride,
    int num_heads, int heads_per_kv_head, int seqlen_q, int seqlen_k, int head_dim,
    int diagonal_offset,  // query i is aligned with key i + diagonal_offset; only with CAUSAL
    Accumulator scale)
{
    __shared__ Smem smem;
    const ProductTile tile(seqlen_q, seqlen_k, num_heads, heads_per_kv_head);
    const int key_row = tile.col - threadIdx.x + threadIdx.y;  // the key that this thread loads
    g_q += tile.batch_idx * q_batch_stride + tile.row * q_seq_stride + tile.head_idx * q_head_stride;
    g_k += tile.batch_idx * k_batch_stride + key_row * k_seq_stride + tile.kv_head_idx * k_head_stride;

    Accumulator sum = 0;
    for (int first = 0; first < head_dim; first += TILE) {
        const int d = first + threadIdx.x;
        smem.a[threadIdx.y][threadIdx.x] = load_or_zero(g_q + d, tile.row < seqlen_q && d < head_dim);
        smem.b[threadIdx.y][threadIdx.x] = load_or_zero(g_k + d, key_row < seqlen_k && d < head_dim);
        // SYNC: both tiles are complete.
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += smem.a[threadIdx.y][i] * smem.b[threadIdx.x][i];
        // SYNC: everyone is done with the tiles, which the next pass overwrites.
        __syncthreads();
    }
    if (tile.row < seqlen_q && tile.col < seqlen_k) {
        const bool visible = tile.col < key_end<CAUSAL>(tile.row, seqlen_k, diagonal_offset);
        g_scores[(static_cast<long long>(tile.head) * seqlen_q + tile.row) * seqlen_k + tile.col] =
            visible ? scale * sum : negative_infinity<Accumulator>();
    }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_probabilities(
    const Accumulator* __restrict__ g_scores,  // [num_rows, seqlen_k]
    Element* __restrict__ g_probabilities,     // [num_rows, seqlen_k]
    Accumulator* __restrict__ g_lse,           // [num_rows]
    long long num_rows, int seqlen_k)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const long long row_idx = static_cast<long long>(blockIdx.x) * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (row_idx >= num_rows) return;
    g_scores += row_idx * seqlen_k;
    g_probabilities += row_idx * seqlen_k;

    Accumulator row_max = negative_infinity<Accumulator>();
    for (int i = lane_idx; i < seqlen_k; i += WARP_SIZE) row_max = fmax(row_max, g_scores[i]);
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
        row_max = fmax(row_max, __shfl_xor_sync(0xffffffff, row_max, lane_mask));
    }
    // A row without a visible key subtracts 0: -inf - (-inf) would be NaN.
    const Accumulator reference = row_max == negative_infinity<Accumulator>() ? Accumulator(0) : row_max;

    Accumulator sum = 0;
    for (int i = lane_idx; i < seqlen_k; i += WARP_SIZE) sum += exp(g_scores[i] - reference);
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);

    const Accumulator inverse_sum = sum == Accumulator(0) ? Accumulator(0) : Accumulator(1) / sum;
    for (int i = lane_idx; i < seqlen_k; i += WARP_SIZE) {
        g_probabilities[i] = static_cast<Element>(exp(g_scores[i] - reference) * inverse_sum);
    }
    if (lane_idx == 0) g_lse[row_idx] = reference + log(sum);
}

extern "C" __global__ void __launch_bounds__(TILE * TILE) cuattn_attention_output(
    const Element* __restrict__ g_probabilities,  // [batch, num_heads, seqlen_q, seqlen_k], contiguous
    const Element* __restrict__ g_v,              // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,                  // [batch, seqlen_q, num_heads, head_dim_v]
    long long v_batch_stride, long long v_seq_stride, long long v_head_stride,
    long long out_batch_stride, long long out_seq_stride, long long out_head_stride,
    int num_heads, int heads_per_kv_head, int seqlen_q, int seqlen_k, int head_dim_v)
{
    __shared__ Smem smem;
    const ProductTile tile(seqlen_q, head_dim_v, num_heads, heads_per_kv_head);
    g_probabilities += (static_cast<long long>(tile.head) * seqlen_q + tile.row) * seqlen_k;
    g_v += tile.batch_idx * v_batch_stride + tile.kv_head_idx * v_head_stride + tile.col;

    Accumulator sum = 0;
    for (int first = 0; first < seqlen_k; first += TILE) {
        const int key_col = first + threadIdx.x;
        const int key_row = first + threadIdx.y;
        smem.a[threadIdx.y][threadIdx.x] =
            load_or_zero(g_probabilities + key_col, tile.row < seqlen_q && key_col < seqlen_k);
        smem.b[threadIdx.y][threadIdx.x] =
            load_or_zero(g_v + key_row * v_seq_stride, key_row < seqlen_k && tile.col < head_dim_v);
        // SYNC: both tiles are complete.
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += smem.a[threadIdx.y][i] * smem.b[i][threadIdx.x];
        // SYNC: everyone is done with the tiles, which the next pass overwrites.
        __syncthreads();
    }
    if (tile.row < seqlen_q && tile.col < head_dim_v) {
        g_out += tile.batch_idx * out_batch_stride + tile.row * out_seq_stride + tile.head_idx * out_head_stride;
        g_out[tile.col] = static_cast<Element>(sum);
    }
}
