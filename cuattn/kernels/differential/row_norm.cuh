// What a row is multiplied with to have a mean square of 1: 1 / sqrt(mean(x^2) + eps).
//
// A square overflows long before the row does, and vanishes long before. Where the mean is beyond what is sure, it is
// found anew from the row times a power of two, which the result is multiplied with as well.
#pragma once

template <typename Real>
struct RowNorm {
    static constexpr bool WIDE = sizeof(Real) == 8;
    static constexpr Real LOW = WIDE ? Real(0x1p-600) : Real(0x1p-70), HIGH = WIDE ? Real(0x1p+900) : Real(0x1p+110);
    static constexpr Real UP = WIDE ? Real(0x1p+600) : Real(0x1p+80), DOWN = WIDE ? Real(0x1p-600) : Real(0x1p-80);

    Real factor, inverse;

    // sum_of_squares(factor): of the row times the factor, for all lanes that share it. For whole warps.
    template <typename SumOfSquares>
    __device__ __forceinline__ RowNorm(const SumOfSquares& sum_of_squares, int num_cols, Real eps) : factor(1) {
        Real square = sum_of_squares(factor) / num_cols + eps;
        const bool ordinary = square >= LOW && square <= HIGH;
        if (!__all_sync(0xffffffff, ordinary)) {
            if (!ordinary) factor = square < LOW ? UP : DOWN;
            square = sum_of_squares(factor) / num_cols + eps * factor * factor;
        }
        inverse = square == 0 ? Real(0) : 1 / sqrt(square);  // a row of zeros stays one
    }
};
