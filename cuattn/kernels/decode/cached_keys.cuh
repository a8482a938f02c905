// Where cached keys and values lie: contiguous for each sequence, or on pages that a block table lists.
//
// Key j of a sequence is slot j % page_size of page table[j / page_size]; a contiguous cache is one page a sequence. A
// table may be device data that nobody has checked: a page that does not exist is never touched, and its keys and
// values read as zeros. Of the table itself only the entries of keys below the sequence's length are read, and those
// are inside of it: no length exceeds the capacity.
#pragma once
#include "decode/attention_decode_params.cuh"
#include "kv/kv_decode.cuh"

struct KeyPlace {
    int page;  // or the batch entry of a contiguous cache
    int slot;
    bool exists;

    __device__ __forceinline__ long long offset(const RowStrides& strides) const {
        return page * strides.batch + slot * strides.seq;
    }
};

// The keys of one sequence.
template <bool PAGED>
struct CachedKeys {
    const int* g_table;
    int batch_idx, num_keys, page_size, num_pages, page_shift;
    unsigned page_magic;

    template <typename Real>
    __device__ __forceinline__ CachedKeys(const DecodeParams<Real>& params, const int* g_block_tables, int batch_idx,
                                          int num_keys)
        : g_table(PAGED ? g_block_tables + batch_idx * params.table_stride : nullptr),
          batch_idx(batch_idx),
          num_keys(num_keys),
          page_size(params.page_size),
          num_pages(params.num_pages),
          page_shift(params.page_shift),
          page_magic(params.page_magic) {}

    // Any key from 0 on; one that is not below num_keys does not exist.
    __device__ __forceinline__ KeyPlace find(int key) const {
        if (key >= num_keys) return {0, 0, false};
        if (!PAGED) return {batch_idx, key, true};
        const int index = static_cast<int>(static_cast<unsigned long long>(key) * page_magic >> page_shift);
        const int page = g_table[index];
        const bool exists = page >= 0 && page < num_pages;
        return {exists ? page : 0, key - index * page_size, exists};
    }
};

// Stored rows of one key/value head from column first_col on, where an item and a block begin; and their scales. Null
// where there are none.
template <typename Storage>
struct CachedRows {
    const Storage* g_rows;
    const float* g_scales;         // a scale of each row
    const unsigned char* g_blocks;  // the block scales of each row
    RowStrides strides, scale_strides, block_strides;

    __device__ __forceinline__ CachedRows(const Storage* rows, const RowStrides& strides, const float* scales,
                                          const RowStrides& scale_strides, const unsigned char* blocks,
                                          const RowStrides& block_strides, int kv_head_idx, int first_col = 0)
        : g_rows(rows + kv_head_idx * strides.head + first_col / KvFormat<Storage>::PER_ITEM),
          g_scales(scales == nullptr ? nullptr : scales + kv_head_idx * scale_strides.head),
          g_blocks(blocks == nullptr ? nullptr : blocks + kv_head_idx * block_strides.head + first_block(first_col)),
          strides(strides),
          scale_strides(scale_strides),
          block_strides(block_strides) {}

    __device__ __forceinline__ const Storage* row(const KeyPlace& place) const {
        return g_rows + place.offset(strides);
    }
    __device__ __forceinline__ float scale(const KeyPlace& place) const {
        return g_scales[place.offset(scale_strides)];
    }
    __device__ __forceinline__ const unsigned char* blocks(const KeyPlace& place) const {
        return g_blocks + place.offset(block_strides);
    }

   private:
    static __device__ __forceinline__ int first_block(int first_col) {
        constexpr int BLOCK = KvFormat<Storage>::BLOCK;
        if constexpr (BLOCK == 0) return 0; else return first_col / BLOCK;
    }
};
