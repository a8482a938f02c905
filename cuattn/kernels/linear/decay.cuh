// Decay of a state, step by step: e^decay as a factor that neither overflows nor loses what is small beside 1.
#pragma once

// What a state is multiplied by, as `decayed` takes it: e^g - 1, which is negative, for a mild decay, else e^g.
//
// A factor near 1 that is rounded to e^g is wrong by up to half a unit of 1, the same way for every token of a constant
// decay; e^g - 1 is wrong by half a unit of itself.
template <typename Real>
__device__ __forceinline__ Real decay_step(Real log_decay) {
    return log_decay < 0 && log_decay > Real(-0.5) ? expm1(log_decay) : exp(log_decay);
}

// e^g x. A factor of 0 stands for a reset and is the caller's to see: 0 times infinity would be NaN.
template <typename Real>
__device__ __forceinline__ Real decayed(Real x, Real step) {
    return fma(x, step, step < 0 ? x : Real(0));
}
