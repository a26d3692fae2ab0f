// Values of a row in an order that unsigned integers share: what top_k compares on both devices.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define PYDFLASH_EVERYWHERE __host__ __device__
#else
#define PYDFLASH_EVERYWHERE
#endif

// Larger for a larger value, and for the lower index of equal ones; never 0, and no two of a row are equal. -0 equals
// 0, and a NaN lies beyond the infinity of its sign.
PYDFLASH_EVERYWHERE static inline uint64_t pydflash_order_key(float value, int64_t index) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    bits = bits == 0x80000000u ? 0u : bits;
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t) ordered << 32 | (0xffffffffu - (uint32_t) index);
}

PYDFLASH_EVERYWHERE static inline int32_t pydflash_order_index(uint64_t key) {
    return (int32_t) (0xffffffffu - (uint32_t) key);
}
