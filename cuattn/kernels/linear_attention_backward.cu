// Gradients of linear attention, chunk by chunk. With S the state before a chunk and dS the gradient of the one behind
// it, all of a chunk depends on nothing else: kernels of which only the walks go through chunks one by one.
//
//     cuattn_linear_map             q and k through the feature map, once            (backward_map.cuh)
//     cuattn_linear_states          S before each chunk                              (backward_states.cuh)
//     cuattn_linear_rows            denominators and the like; decays from queries   (backward_rows.cuh)
//     cuattn_linear_dq              dq                                               (backward_queries.cuh)
//     cuattn_linear_state_gradients dS behind each chunk, in the place of S          (backward_states.cuh)
//     cuattn_linear_dk              dk; decays of channels                           (backward_keys.cuh)
//     cuattn_linear_dv              dv                                               (backward_values.cuh)
//     cuattn_linear_ddecay, _sum    decays of whole states                           (backward_decay.cuh)
//
// Products are of blocks of BLOCK x BLOCK elements, on tensor cores for 16-bit elements and by fused multiply-adds for
// float and double (block_products.cuh). Head dims are runtime values, taken in blocks. Every sum has a fixed order.
//
// Block: NUM_WARPS warps. Constants: Element, Real (float, or double for double), BLOCK (tokens of a chunk, and columns
// of a block), NUM_WARPS, ALIGNED (bases and strides of q, k, v, dout: multiples of 16 bytes), CHANNELS (a decay for
// each channel of a key), and the bytes of the shared-memory plans.
#include "linear/backward_decay.cuh"
#include "linear/backward_keys.cuh"
#include "linear/backward_map.cuh"
#include "linear/backward_queries.cuh"
#include "linear/backward_rows.cuh"
#include "linear/backward_states.cuh"
#include "linear/backward_values.cuh"

static_assert(sizeof(WalkSmem) == WALK_SMEM_BYTES && sizeof(RowsSmem) == ROWS_SMEM_BYTES &&
                  sizeof(QueriesSmem) == DQ_SMEM_BYTES && sizeof(KeysSmem) == DK_SMEM_BYTES &&
                  sizeof(ValuesSmem) == DV_SMEM_BYTES,
              "ops/linear/backward_config.py and this file agree on the shared-memory plans");

template <typename Smem>
__device__ __forceinline__ Smem& shared_memory() {
    extern __shared__ __align__(16) unsigned char s_bytes[];
    return *reinterpret_cast<Smem*>(s_bytes);
}

// The arrays that entries share: dout [batch, seqlen_q, num_outputs, head_dim_v]; q [batch, seqlen_q, num_heads,
// head_dim] and k [batch, seqlen_k, num_k_heads, head_dim], mapped; v [batch, seqlen_k, num_v_heads, head_dim_v]; decay
// null, or [batch, seqlen_k, num_states] with any strides, and with CHANNELS one more axis, head_dim, contiguous; kept
// states s, z and peaks as backward_states.cuh says; r and delta [batch, num_outputs, seqlen_q], null without
// normalisation.

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_map(
    const Element* __restrict__ g_x,  // [batch, seqlen, num_heads, head_dim], last axis contiguous
    Element* __restrict__ g_mapped,   // the same, contiguous
    const RowStrides x,
    const long long num_rows,  // of a token and a head: grid: x = rows / MAP_ROWS, rounded up
    const int seqlen,
    const int num_heads,
    const int head_dim,
    const int vectors,  // whether all rows, of both, lie at multiples of 16 bytes
    const int feature_map)
{
    map_rows(g_x, g_mapped, x, num_rows, seqlen, num_heads, head_dim, vectors, feature_map);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_states(
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_first_s,  // [batch, num_states, head_dim, head_dim_v]; null: zeros
    const Real* __restrict__ g_first_z,  // [batch, num_states, head_dim]
    Real* __restrict__ g_s,
    Real* __restrict__ g_z,
    Real* __restrict__ g_peaks,
    const Params params)
{
    const WalkArrays arrays{g_k, g_v, g_decay, nullptr, nullptr, g_first_s, g_first_z, nullptr, nullptr,
                            g_s, g_z, g_peaks, nullptr};
    walk_states<false>(arrays, params, shared_memory<WalkSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_state_gradients(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    const Real* __restrict__ g_dlast_s,  // the gradient of the last state; null: zeros
    const Real* __restrict__ g_dlast_z,
    Real* __restrict__ g_dfirst_s,       // that of the initial state; null if there is none
    Real* __restrict__ g_dfirst_z,
    Real* g_s,
    Real* g_z,
    Real* __restrict__ g_peaks,
    Real* __restrict__ g_through,        // null without decay
    const Params params)
{
    const WalkArrays arrays{g_q, g_dout, g_decay, g_r, g_delta, g_dlast_s, g_dlast_z, g_dfirst_s, g_dfirst_z,
                            g_s, g_z, g_peaks, g_through};
    walk_states<true>(arrays, params, shared_memory<WalkSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_rows(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,
    const Real* __restrict__ g_z,
    const Real* __restrict__ g_peaks,
    Real* __restrict__ g_r,
    Real* __restrict__ g_delta,
    Real* __restrict__ g_of_queries,  // [batch, num_outputs, seqlen_q]; null unless whole states decay
    const Params params)
{
    const RowsArrays arrays{g_dout, g_q, g_k, g_v, g_decay, g_s, g_z, g_peaks, g_r, g_delta, g_of_queries};
    query_rows(arrays, params, shared_memory<RowsSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_dq(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,
    const Real* __restrict__ g_z,
    const Real* __restrict__ g_peaks,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    const Element* __restrict__ g_raw_q,
    Element* __restrict__ g_dq,
    Real* __restrict__ g_of_queries,  // [batch, num_outputs, seqlen_q, head_dim]; null unless channels decay
    const Params params)
{
    const QueriesArrays arrays{g_dout, g_q, g_k, g_v, g_raw_q, g_decay, g_s, g_z, g_peaks, g_r, g_delta, g_dq,
                               g_of_queries};
    gradient_of_queries(arrays, params, shared_memory<QueriesSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_dk(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Element* __restrict__ g_v,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,
    const Real* __restrict__ g_z,
    const Real* __restrict__ g_peaks,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    const Real* __restrict__ g_through,
    const Real* __restrict__ g_of_queries,
    const Element* __restrict__ g_raw_k,
    Element* __restrict__ g_dk,
    Real* __restrict__ g_of_keys,  // [blocks of channels, batch, num_states, seqlen_k]; null unless whole states decay
    Real* __restrict__ g_ddecay,   // [batch, seqlen_k, num_states, head_dim]; null unless channels decay
    const int batch,
    const Params params)
{
    const KeysArrays arrays{g_dout, g_q, g_k, g_v, g_raw_k, g_decay, g_s, g_z, g_peaks, g_r, g_delta, g_through,
                            g_of_queries, g_dk, g_of_keys, g_ddecay};
    gradient_of_keys(arrays, params, batch, shared_memory<KeysSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_linear_dv(
    const Element* __restrict__ g_dout,
    const Element* __restrict__ g_q,
    const Element* __restrict__ g_k,
    const Real* __restrict__ g_decay,
    const Real* __restrict__ g_s,
    const Real* __restrict__ g_peaks,
    const Real* __restrict__ g_r,
    const Real* __restrict__ g_delta,
    Element* __restrict__ g_dv,
    const Params params)
{
    const ValuesArrays arrays{g_dout, g_q, g_k, g_decay, g_s, g_peaks, g_r, g_delta, g_dv};
    gradient_of_values(arrays, params, shared_memory<ValuesSmem>());
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_ddecay(
    const Real* __restrict__ g_of_queries,
    const Real* __restrict__ g_of_keys,
    const Real* __restrict__ g_through,
    Real* __restrict__ g_ddecay,  // [batch, seqlen_k, num_states]
    const int batch,
    const Params params)
{
    __shared__ Real s_sums[NUM_THREADS];
    decays_of_tokens(g_of_queries, g_of_keys, g_through, g_ddecay, params, batch, s_sums);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_ddecay_sum(
    const Real* __restrict__ g_of_tokens,  // [tokens of all batch entries, num_states]
    Real* __restrict__ g_ddecay,           // [num_states]
    const long long num_tokens,
    const int num_states)
{
    __shared__ Real s_sums[NUM_THREADS];
    sum_over_tokens(g_of_tokens, g_ddecay, num_tokens, num_states, s_sums);
}
