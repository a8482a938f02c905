// From what each segment of a sequence makes of nothing to the state that each segment begins with:
//
//     first_0 = initial,    first_{i+1} = kept_i first_i + made_i,    and of the last i: the state at the end
//
// A thread has one number of a state, or of a z, of one (sequence, state head), and walks over the segments. What a
// segment made gives its place to the state that it begins with. What the last one made is read only if the state after
// it is asked for.
//
// Grid: x = pair * blocks + block, where a pair is a (sequence, state head) and `blocks` CTAs share its numbers.
//
// Constants: NUM_THREADS.
struct ScanParams {
    int num_segments, head_dim, head_dim_v, blocks;
};

// One number, of `width` for each of the head_dim rows. g_made [num_segments][head_dim][width], g_kept: of the first
// segment. g_last [head_dim][width], or null: the state after the last segment.
__device__ __forceinline__ void scan_number(float* g_made, float* g_last, const float* g_kept, float running,
                                            int number, int width, const ScanParams& params) {
    const float* g_row_kept = g_kept + number / width;
    float* g_number = g_made + number;
    for (int segment = 0; segment < params.num_segments; segment++) {
        const bool made_something = segment < params.num_segments - 1 || g_last != nullptr;
        const float made = made_something ? *g_number : 0.0f;
        const float kept = made_something ? g_row_kept[segment * params.head_dim] : 0.0f;
        *g_number = running;
        running = (kept == 0.0f ? 0.0f : kept * running) + made;
        g_number += params.head_dim * width;
    }
    if (g_last != nullptr) g_last[number] = running;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_linear_attention_scan(
    const float* g_s_in,               // [pairs, head_dim, head_dim_v]; null: zeros
    const float* g_z_in,               // [pairs, head_dim]; null without z, or with zeros
    const float* __restrict__ g_kept,  // [pairs, num_segments, head_dim]: e to the sum of a segment's decays
    float* __restrict__ g_s,           // [pairs, num_segments, head_dim, head_dim_v]
    float* __restrict__ g_z,           // [pairs, num_segments, head_dim]; null without z
    float* g_s_last,                   // [pairs, head_dim, head_dim_v]; null if it is not asked for. It may be g_s_in
    float* g_z_last,                   // [pairs, head_dim]
    const ScanParams params)
{
    const unsigned pair = blockIdx.x / params.blocks;
    const int number = (blockIdx.x - pair * params.blocks) * NUM_THREADS + threadIdx.x;
    const long long first_row = static_cast<long long>(pair) * params.head_dim;
    const long long first_segment_row = first_row * params.num_segments;
    const int of_state = params.head_dim * params.head_dim_v;
    const float* g_pair_kept = g_kept + first_segment_row;
    if (number < of_state) {
        const float initial = g_s_in == nullptr ? 0.0f : g_s_in[first_row * params.head_dim_v + number];
        float* g_last = g_s_last == nullptr ? nullptr : g_s_last + first_row * params.head_dim_v;
        scan_number(g_s + first_segment_row * params.head_dim_v, g_last, g_pair_kept, initial, number,
                    params.head_dim_v, params);
    } else if (g_z != nullptr && number < of_state + params.head_dim) {
        const int row = number - of_state;
        const float initial = g_z_in == nullptr ? 0.0f : g_z_in[first_row + row];
        float* g_last = g_z_last == nullptr ? nullptr : g_z_last + first_row;
        scan_number(g_z + first_segment_row, g_last, g_pair_kept, initial, row, 1, params);
    }
}
