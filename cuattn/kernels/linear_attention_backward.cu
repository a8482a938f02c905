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
                  sizeof(GradientSmem) == DQ_SMEM_BYTES && sizeof(KeysSmem) == DK_SMEM_BYTES &&
                  sizeof(ValuesSmem) == DV_SMEM_BYTES,
              "ops/linear/backward_config.py and this file agree on the shared-memory plans");

// The walks' entries; the others stand beside what they compute. Arrays that all share: dout [batch, seqlen_q,
// num_outputs, head_dim_v]; q [batch, seqlen_q, num_heads, head_dim] and k [batch, seqlen_k, num_k_heads, head_dim],
// mapped; v [batch, seqlen_k, num_v_heads, head_dim_v]; decay null, or [batch, seqlen_k, num_states] with any
// strides, and with CHANNELS one more axis, head_dim, contiguous; kept states s, z and peaks as backward_states.cuh
// says; r and delta [batch, num_outputs, seqlen_q], null without normalisation.

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
