// Lists of integers as the caller has them: int or long long.
#pragma once

__device__ __forceinline__ long long load_integer(const void* g_integers, bool are_64_bit, long long index) {
    return are_64_bit ? static_cast<const long long*>(g_integers)[index] : static_cast<const int*>(g_integers)[index];
}
