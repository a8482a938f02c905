// The steps from a score q k^T to a logit, and their derivatives: scale, softcap, ALiBi, bias, mask, bounds by
// position, in this order. Every kernel of attention takes them from here. Which lane holds which element is another
// matter, and is told by a layout.
//
// A layout is a lane's part of a tile of logits: Layout::Tile has ROWS rows of COLUMNS elements; at(tile, r, c) is one
// of them, and row(r) and column(c) say how far it lies from the lane's first one. All are constants once the loops are
// unrolled. Where the lane's part begins, and what belongs to a row (its query, its slope, what it sees), is given to
// each step apart. Layouts stand beside the products that leave tiles so: AccLayout (warp_products.cuh; mma.sync and
// wgmma), LaneLayout (lane_products.cuh), OwnLayout (decode/decode_lanes.cuh), and OneLogit below.
//
// Steps go row by row, then column by column: what a row has in common (a pointer, how many columns are left, the ends
// of a band) is computed once for it, and then compared with constants (docs/kernels/logits.md has the measurements).
//
// An option that a kernel is not compiled for (SOFTCAP, ALIBI, BIAS, MASK) costs nothing; one that it is compiled for
// may still be absent from a call: softcap 0, a null pointer.
#pragma once
#include "attention/mask.cuh"
#include "attention/online_softmax.cuh"
#include "attention/score_options.cuh"
#include "common/ptx.cuh"

// Logits are natural, not base 2, wherever something is added to them or they are capped: see online_softmax.cuh.
constexpr bool NATURAL_LOGITS = SOFTCAP || ALIBI || BIAS;
// Whether a gradient, on its way from a logit to its score, is multiplied with more than the scale.
constexpr bool SLOPED_LOGITS = SOFTCAP;

// A thread has one logit.
template <typename Real>
struct OneLogit {
    using Tile = Real;
    static constexpr int ROWS = 1, COLUMNS = 1;
    static constexpr bool APPROXIMATE = false;
    static __device__ __forceinline__ int row(int) { return 0; }
    static __device__ __forceinline__ int column(int) { return 0; }
    static __device__ __forceinline__ Real& at(Tile& logit, int, int) { return logit; }
};

// --- walking ---------------------------------------------------------------------------------------------------------

// f(r) for every row.
template <typename Layout, typename F>
__device__ __forceinline__ void each_row(const F& f) {
#pragma unroll
    for (int r = 0; r < Layout::ROWS; r++) f(r);
}

// f(element, column) for every element of row r.
template <typename Layout, typename F>
__device__ __forceinline__ void each_column(typename Layout::Tile& tile, int r, const F& f) {
#pragma unroll
    for (int c = 0; c < Layout::COLUMNS; c++) f(Layout::at(tile, r, c), Layout::column(c));
}

// f(element) for every element.
template <typename Layout, typename F>
__device__ __forceinline__ void each_logit(typename Layout::Tile& tile, const F& f) {
    each_row<Layout>([&](int r) { each_column<Layout>(tile, r, [&](auto& element, int) { f(element); }); });
}

// --- where a lane's part lies ----------------------------------------------------------------------------------------

// Where a lane's part of a tile begins. Rows are queries and columns keys or, with OWN_KEYS, the other way round.
template <bool OWN_KEYS>
struct TilePosition {
    int own, other;  // first row, first column

    __device__ __forceinline__ int query() const { return OWN_KEYS ? other : own; }
    __device__ __forceinline__ int key() const { return OWN_KEYS ? own : other; }

    // In an array with these strides: of the first element of the row `row` from here, and from column to column.
    __device__ __forceinline__ long long row_offset(const LogitStrides& strides, int row) const {
        return strides.offset(0, 0, query() + (OWN_KEYS ? 0 : row), key() + (OWN_KEYS ? row : 0));
    }
    static __device__ __forceinline__ long long column_stride(const LogitStrides& strides) {
        return OWN_KEYS ? strides.query : strides.key;
    }
};

// How far a query is from a key along the diagonal: an integer, and exact in float up to 2^24.
template <typename Real>
__device__ __forceinline__ Real alibi_distance(int query, int diagonal_offset, int key) {
    return static_cast<Real>(static_cast<long long>(query) + diagonal_offset - key);
}

// What ALiBi knows of the rows of a lane: slopes and distances, of which only that of the lane's first element is
// converted. Here rows follow each other, and are of one head, ...
template <typename Layout, bool OWN_KEYS, typename Real>
struct TileRows {
    Real first_distance, alibi_slope;

    __device__ __forceinline__ TileRows(const TilePosition<OWN_KEYS>& lane, int diagonal_offset, Real alibi_slope)
        : first_distance(alibi_distance<Real>(lane.query(), diagonal_offset, lane.key())), alibi_slope(alibi_slope) {}
    // Without tensor cores ALiBi is a small part of a tile, and the branch costs registers (float64 spilled with it).
    __device__ __forceinline__ bool has_slope() const { return !Layout::APPROXIMATE || alibi_slope != Real(0); }
    __device__ __forceinline__ Real slope(int) const { return alibi_slope; }
    __device__ __forceinline__ Real distance(int r, int column) const {
        return first_distance + static_cast<Real>(OWN_KEYS ? column - Layout::row(r) : Layout::row(r) - column);
    }
};

// ... and here each has a query and a head of its own: slope_of(r), and distance_of(r) from its first element.
template <typename SlopeOf, typename DistanceOf>
struct HeadRows {
    SlopeOf slope_of;
    DistanceOf distance_of;

    __device__ __forceinline__ HeadRows(SlopeOf slope_of, DistanceOf distance_of)
        : slope_of(slope_of), distance_of(distance_of) {}
    static __device__ __forceinline__ bool has_slope() { return true; }
    __device__ __forceinline__ auto slope(int r) const { return slope_of(r); }
    __device__ __forceinline__ auto distance(int r, int column) const {
        const auto first = distance_of(r);
        return first - static_cast<decltype(first)>(column);
    }
};

// --- the steps -------------------------------------------------------------------------------------------------------

// tanh(x) = (1 - e) / (1 + e) with e = e^(-2 |x|), in seven instructions: within 2^-22 of 1, not of the result, which
// is what a logit needs. The hardware's own tanh errs by 2^-11. `slope` is the derivative 1 - tanh^2, as 4 e /
// (1 + e)^2, which keeps its digits where tanh is near 1.
__device__ __forceinline__ float tanh_fast(float x, float& slope) {
    const float e = exp2_approx(fabsf(x) * (-2.0f * LOG2_E));
    const float r = reciprocal_approx(1.0f + e);
    slope = 4.0f * e * (r * r);
    return copysignf((1.0f - e) * r, x);
}

// The same or, where results are more than 16 bits, to the last bits of Real.
template <bool APPROXIMATE, typename Real>
__device__ __forceinline__ Real tanh_of(Real x, Real& slope) {
    if constexpr (APPROXIMATE) {
        return tanh_fast(x, slope);
    } else {
        const Real e = exp(Real(-2) * fabs(x));
        const Real sum = Real(1) + e;
        slope = Real(4) * e / (sum * sum);
        return tanh(x);
    }
}

// Scores become natural logits, before bias and masks: scale, softcap, ALiBi. keep_slope(r, c, slope) is given the
// derivative of every logit by its scaled score, with SLOPED_LOGITS.
template <typename Layout, typename Rows, typename Real, typename KeepSlope>
__device__ __forceinline__ void natural_logits(typename Layout::Tile& scores, const AttentionParams<Real>& params,
                                               Real scale, const Rows& rows, const KeepSlope& keep_slope) {
    each_logit<Layout>(scores, [&](Real& score) { score *= scale; });
    if (SOFTCAP) {
        const Real softcap = params.softcap;
        if (softcap != Real(0)) {
            const Real inverse_softcap = Real(1) / softcap;
            each_row<Layout>([&](int r) {
#pragma unroll
                for (int c = 0; c < Layout::COLUMNS; c++) {
                    Real& score = Layout::at(scores, r, c);
                    Real slope;
                    score = softcap * tanh_of<Layout::APPROXIMATE>(score * inverse_softcap, slope);
                    keep_slope(r, c, slope);
                }
            });
        } else {
            each_row<Layout>([&](int r) {
#pragma unroll
                for (int c = 0; c < Layout::COLUMNS; c++) keep_slope(r, c, Real(1));
            });
        }
    }
    if (ALIBI && rows.has_slope()) {
        each_row<Layout>([&](int r) {
            each_column<Layout>(scores, r, [&](Real& score, int column) {
                score -= rows.slope(r) * fabs(rows.distance(r, column));
            });
        });
    }
}

// The same where nobody asks for derivatives, ...
template <typename Layout, typename Rows, typename Real>
__device__ __forceinline__ void natural_logits(typename Layout::Tile& scores, const AttentionParams<Real>& params,
                                               Real scale, const Rows& rows) {
    natural_logits<Layout>(scores, params, scale, rows, [](int, int, Real) {});
}

// ... and where they are kept for multiply_by_slopes.
template <typename Layout, typename Rows, typename Real>
__device__ __forceinline__ void natural_logits(typename Layout::Tile& scores, typename Layout::Tile& slopes,
                                               const AttentionParams<Real>& params, Real scale, const Rows& rows) {
    natural_logits<Layout>(scores, params, scale, rows,
                           [&](int r, int c, Real slope) { Layout::at(slopes, r, c) = slope; });
}

// Gradients of logits, or what they are a product with, become those of scaled scores.
template <typename Layout>
__device__ __forceinline__ void multiply_by_slopes(typename Layout::Tile& gradients, typename Layout::Tile& slopes) {
    if (!SLOPED_LOGITS) return;
    each_row<Layout>([&](int r) {
#pragma unroll
        for (int c = 0; c < Layout::COLUMNS; c++) Layout::at(gradients, r, c) *= Layout::at(slopes, r, c);
    });
}

// A number of the bias in the type of the sums. A finite double stays finite: it hides nothing.
template <typename Real, typename Bias>
__device__ __forceinline__ Real bias_value(Bias bias) {
    if constexpr (sizeof(Bias) > sizeof(Real)) {
        constexpr Bias LARGEST = 3.402823466e38;
        const bool infinite = bias == -negative_infinity<Bias>() || bias == negative_infinity<Bias>();
        // Written so that NaN passes.
        if (!infinite) bias = bias > LARGEST ? LARGEST : bias < -LARGEST ? -LARGEST : bias;
    }
    return static_cast<Real>(bias);
}

// Adds the bias, and -inf where the mask says so. Nothing outside of [num_own, num_other] is read.
template <typename Layout, bool OWN_KEYS, typename Real>
__device__ __forceinline__ void add_bias_and_mask(typename Layout::Tile& logits, const AttentionParams<Real>& params,
                                                  const ScoreOptions<Real>& options,
                                                  const TilePosition<OWN_KEYS>& lane, int num_own, int num_other) {
    each_row<Layout>([&](int r) {
        const int row = Layout::row(r);
        // Rows are passed over at once: in the condition of every column, some loads got a branch of their own.
        if (lane.own + row >= num_own) return;
        const int num_columns = num_other - lane.other;
        // Strides are read anew for every element, from constant memory: copies take registers and instructions.
        if (BIAS && options.g_bias != nullptr) {
            const BiasElement* g_bias = options.g_bias + lane.row_offset(params.bias, row);
            each_column<Layout>(logits, r, [&](Real& logit, int column) {
                if (column < num_columns) logit += bias_value<Real>(g_bias[column * lane.column_stride(params.bias)]);
            });
        }
        if (MASK && options.g_mask != nullptr) {
            const unsigned char* g_mask = options.g_mask + lane.row_offset(params.mask, row);
            each_column<Layout>(logits, r, [&](Real& logit, int column) {
                if (column < num_columns && !g_mask[column * lane.column_stride(params.mask)]) {
                    logit = negative_infinity<Real>();
                }
            });
        }
    });
}

// `hidden` where a key is not visible by its position: -inf for logits, 0 for probabilities. bounds_of(r): what row r
// sees, counted from the lane's first column.
template <typename Layout, typename Real, typename BoundsOf>
__device__ __forceinline__ void hide_by_position(typename Layout::Tile& tile, Real hidden, const BoundsOf& bounds_of) {
    each_row<Layout>([&](int r) {
        const auto bounds = bounds_of(r);
        each_column<Layout>(tile, r, [&](Real& element, int column) {
            if (bounds.hides(column)) element = hidden;
        });
    });
}

// The same where rows follow each other, and `band` is that of their side. Rows from num_own on see nothing.
template <typename Layout, typename Band, bool OWN_KEYS, typename Real>
__device__ __forceinline__ void hide_by_position(typename Layout::Tile& tile, Real hidden, const Band& band,
                                                 const TilePosition<OWN_KEYS>& lane, int num_own = UNBOUNDED) {
    // The ends of a band do not change from tile to tile. Kept over the loop, those of both sides take registers that
    // the tightest rows have not: two rows of the forward spilled.
    const int own = Band::HAS_BEGIN && Band::HAS_END ? forget_origin(lane.own) : lane.own;
    hide_by_position<Layout>(tile, hidden, [&](int r) {
        const int row = own + Layout::row(r);
        auto bounds = band.row(row).from(lane.other);
        if (OWN_KEYS && row >= num_own) bounds.end = 0;
        return bounds;
    });
}
