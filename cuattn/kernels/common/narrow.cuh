// Sums rounded to the type of a result, once.
#pragma once
#include "common/elements.cuh"

__device__ __forceinline__ void narrow(float x, double& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(double x, float& to) { to = static_cast<float>(x); }
template <typename Element>
__device__ __forceinline__ void narrow(float x, Element& to) {
    from_real(x, to);
}

// From double to 16 bits by way of float. Rounded to odd there (toward zero, and what is lost sets the last bit), a
// number keeps the side of every tie that it is on, so that the second rounding is that of the double.
template <typename Element>
__device__ __forceinline__ void narrow(double x, Element& to) {
    const float nearest = static_cast<float>(x);
    unsigned bits = __float_as_uint(nearest);
    if (x == x && static_cast<double>(nearest) != x) {
        if (fabs(static_cast<double>(nearest)) > fabs(x)) bits--;
        bits |= 1;
    }
    from_real(__uint_as_float(bits), to);
}
