// The feature maps of linear attention.
#pragma once
#include "common/ptx.cuh"

// In the order of FEATURE_MAPS in cuattn/ops/linear/options.py.
enum FeatureMap { MAP_NONE, MAP_ELU1, MAP_RELU, MAP_SQUARE };

constexpr float LOG2_OF_E = 1.4426950408889634f;

// Calls `body` with the feature map as a function: one branch for a whole tile instead of one for each element.
// APPROXIMATE: e^x to a few units of float, for results that are rounded to 16 bits.
template <typename Real, bool APPROXIMATE = false, typename Body>
__device__ __forceinline__ void with_feature_map(int feature_map, Body body) {
    if (feature_map == MAP_ELU1) {
        body([](Real x) {
            const Real power = APPROXIMATE ? Real(exp2_approx(x * LOG2_OF_E)) : exp(x);
            return x > 0 ? x + 1 : power;
        });
    } else if (feature_map == MAP_RELU) {
        body([](Real x) { return x < 0 ? Real(0) : x; });  // NaN stays NaN
    } else if (feature_map == MAP_SQUARE) {
        body([](Real x) { return x * x; });
    } else {
        body([](Real x) { return x; });
    }
}
