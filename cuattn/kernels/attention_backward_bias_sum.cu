// Adds up the parts of the gradient of a bias that attention_backward_bias.cu left in the workspace, in their order:
//
//     dbias[e] = sum over parts of partial[part, e]
//
// Grid: x = groups of NUM_THREADS elements of the gradient.
//
// Constants: Real (float or double, of the parts), BiasElement, NUM_THREADS.
#include "common/narrow.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_attention_backward_bias_sum(
    const Real* __restrict__ g_partial,   // [num_parts, num_elements]
    BiasElement* __restrict__ g_dbias,    // [num_elements]
    const long long num_elements, const int num_parts)
{
    const long long element = static_cast<long long>(blockIdx.x) * NUM_THREADS + threadIdx.x;
    if (element >= num_elements) return;
    double sum = 0;  // of few numbers: the time is that of reading them
    for (int part = 0; part < num_parts; part++) sum += g_partial[part * num_elements + element];
    narrow(sum, g_dbias[element]);
}
