// Philox4x32-10: a counter-based random generator (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", 2011), and the dropout mask that attention makes of it.
//
// Whether the probability of query i and key j is kept depends on (seed, offset, batch, head, i, j) alone. One call
// gives four words, for rows i and i + 8 and keys j and j + 8 of a 16 x 16 block: those that one lane holds of a
// tensor-core accumulator, and of its transpose. cuattn.dropout_mask is the same function in NumPy. Heads, i and j are
// counted in the mask, of which a call may have a part. Where that does not begin with such a block, or has not every
// row and column, tensor-core kernels ask for every element by itself: those that have every option.
//
// Constants used: DROPOUT and those of logits.cuh.
#pragma once
#include "attention/attention_params.cuh"

// In kernels with fewer options it would take registers that some rows of the tables have not got.
constexpr bool ANYWHERE_IN_MASK = DROPOUT && SOFTCAP && ALIBI && BIAS && MASK;

struct PhiloxWords {
    unsigned word[4];
};

__device__ __forceinline__ PhiloxWords philox4x32(unsigned key_low, unsigned key_high, unsigned c0, unsigned c1,
                                                  unsigned c2, unsigned c3) {
    constexpr unsigned MULTIPLIER_0 = 0xd2511f53u, MULTIPLIER_1 = 0xcd9e8d57u;
    constexpr unsigned WEYL_LOW = 0x9e3779b9u, WEYL_HIGH = 0xbb67ae85u;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high_0 = __umulhi(MULTIPLIER_0, c0), low_0 = MULTIPLIER_0 * c0;
        const unsigned high_1 = __umulhi(MULTIPLIER_1, c2), low_1 = MULTIPLIER_1 * c2;
        c0 = high_1 ^ c1 ^ key_low;
        c2 = high_0 ^ c3 ^ key_high;
        c1 = low_1;
        c3 = low_0;
        key_low += WEYL_LOW;
        key_high += WEYL_HIGH;
    }
    return {{c0, c1, c2, c3}};
}

// Head `head_idx` of batch entry `batch_idx` of the call, as the mask counts heads.
__device__ __forceinline__ unsigned dropout_head(const DropoutParams& dropout, int num_heads, int batch_idx,
                                                 int head_idx) {
    const unsigned head = static_cast<unsigned>(batch_idx) * num_heads + head_idx;
    return head * dropout.head_step + dropout.first_head + batch_idx * dropout.absent_heads;
}

// A query's or a key's word of the counter; eight rows or columns away, within its 16, it is the same.
__device__ __forceinline__ unsigned dropout_counter(unsigned position) { return position / 16 * 8 + position % 8; }

// The words of the 2 x 2 elements that share a call: rows i and i + 8 (i % 16 < 8), keys j and j + 8 (j % 16 < 8),
// where !dropout.by_element. Element (i + 8 r, j + 8 c) has word 2 r + c.
__device__ __forceinline__ PhiloxWords dropout_words(const DropoutParams& dropout, unsigned head, unsigned i,
                                                     unsigned j) {
    return philox4x32(dropout.seed_low, dropout.seed_high, dropout_counter(dropout.first_key + j),
                      dropout_counter(dropout.first_query + i), head, dropout.offset);
}

// Whether one element is kept, wherever the call lies in the mask; the four words of a call serve only one.
__device__ __forceinline__ bool dropout_keeps(const DropoutParams& dropout, unsigned head, unsigned i, unsigned j) {
    const unsigned row = dropout.first_query + i * dropout.step, column = dropout.first_key + j * dropout.step;
    const PhiloxWords words = philox4x32(dropout.seed_low, dropout.seed_high, dropout_counter(column),
                                         dropout_counter(row), head, dropout.offset);
    const unsigned left = row / 8 % 2 ? words.word[2] : words.word[0];
    const unsigned right = row / 8 % 2 ? words.word[3] : words.word[1];
    return (column / 8 % 2 ? right : left) < dropout.threshold;
}

// Which of the elements of an accumulator tile row are kept, wherever the call lies in the mask: bit 4 n + i is that of
// acc[n][i], see mma.cuh; n counts tiles of eight columns. Rows are queries and columns keys or, with OWN_KEYS, the
// other way round; column_of(8 n) is the column of this lane's first element.
template <bool OWN_KEYS, int TILES, typename ColumnOf>
__device__ __forceinline__ unsigned dropout_kept(const DropoutParams& dropout, unsigned head, int first_row,
                                                 const ColumnOf& column_of) {
    static_assert(TILES <= 8, "one bit for each element");
    unsigned kept = 0;
#pragma unroll 1  // little code, and no more registers than one turn needs
    for (int n = TILES - 1; n >= 0; n--) {
        const int first_column = column_of(8 * n);
#pragma unroll
        for (int i = 3; i >= 0; i--) {
            const int row = first_row + i / 2 * 8, column = first_column + i % 2;
            kept = kept * 2 + dropout_keeps(dropout, head, OWN_KEYS ? column : row, OWN_KEYS ? row : column);
        }
    }
    return kept;
}
