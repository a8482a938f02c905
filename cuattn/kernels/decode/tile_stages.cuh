// Tiles of cached keys and values in shared memory, on their way and in use.
//
// Constants used: Storage, Element, BLOCK_N, HEAD_DIM, HEAD_DIM_V, NUM_STAGES, SLOT_SCALES; NUM_THREADS of the
// including kernel.
#pragma once
#include "attention/warp_products.cuh"
#include "decode/cached_tiles.cuh"

constexpr int QK_STRIDE = TILE_STRIDE<HEAD_DIM>;
constexpr int V_STRIDE = TILE_STRIDE<HEAD_DIM_V>;
constexpr bool CONVERT = sizeof(Storage) != sizeof(Element);  // what is stored is not what is multiplied

// Tiles of keys and values, NUM_STAGES of them on their way. What is stored in elements is used where it lands; other
// formats land as they are stored, with their scales, and are converted to a tile of elements, one at a time.
template <typename Stored, bool CONVERTED>
struct CachedTiles {
    Element k[NUM_STAGES][BLOCK_N][QK_STRIDE];
    Element v[NUM_STAGES][BLOCK_N][V_STRIDE];

    static constexpr int K_LANDING_STRIDE = QK_STRIDE * sizeof(Element);
    static constexpr int V_LANDING_STRIDE = V_STRIDE * sizeof(Element);
    __device__ __forceinline__ unsigned char* k_landing(int stage) {
        return reinterpret_cast<unsigned char*>(k[stage]);
    }
    __device__ __forceinline__ unsigned char* v_landing(int stage) {
        return reinterpret_cast<unsigned char*>(v[stage]);
    }
    __device__ __forceinline__ Element* k_tile(int stage) { return k[stage][0]; }
    __device__ __forceinline__ Element* v_tile(int stage) { return v[stage][0]; }
    template <typename PlaceOf>
    __device__ __forceinline__ void load_scales(int, const CachedRows<Stored>&, const CachedRows<Stored>&,
                                                int, int, PlaceOf) {}
    __device__ __forceinline__ void convert(int) {}
};

template <typename Stored>
struct CachedTiles<Stored, true> {
    Element k[BLOCK_N][QK_STRIDE];
    Element v[BLOCK_N][V_STRIDE];
    unsigned char stored_k[NUM_STAGES][BLOCK_N][STORED_STRIDE<Stored, HEAD_DIM>];
    unsigned char stored_v[NUM_STAGES][BLOCK_N][STORED_STRIDE<Stored, HEAD_DIM_V>];
    TileScales<BLOCK_N, HEAD_DIM> k_scales[NUM_STAGES];
    TileScales<BLOCK_N, HEAD_DIM_V> v_scales[NUM_STAGES];

    static constexpr int K_LANDING_STRIDE = STORED_STRIDE<Stored, HEAD_DIM>;
    static constexpr int V_LANDING_STRIDE = STORED_STRIDE<Stored, HEAD_DIM_V>;
    __device__ __forceinline__ unsigned char* k_landing(int stage) { return stored_k[stage][0]; }
    __device__ __forceinline__ unsigned char* v_landing(int stage) { return stored_v[stage][0]; }
    __device__ __forceinline__ Element* k_tile(int) { return k[0]; }
    __device__ __forceinline__ Element* v_tile(int) { return v[0]; }
    template <typename PlaceOf>
    __device__ __forceinline__ void load_scales(int stage, const CachedRows<Stored>& k_rows,
                                                const CachedRows<Stored>& v_rows, int head_dim, int head_dim_v,
                                                PlaceOf place_of) {
        ::load_scales<SLOT_SCALES, NUM_THREADS>(k_scales[stage], k_rows, head_dim, place_of);
        ::load_scales<SLOT_SCALES, NUM_THREADS>(v_scales[stage], v_rows, head_dim_v, place_of);
    }
    __device__ __forceinline__ void convert(int stage) {
        convert_tile<SLOT_SCALES, NUM_THREADS, Stored>(k[0], stored_k[stage][0], k_scales[stage]);
        convert_tile<SLOT_SCALES, NUM_THREADS, Stored>(v[0], stored_v[stage][0], v_scales[stage]);
    }
};
