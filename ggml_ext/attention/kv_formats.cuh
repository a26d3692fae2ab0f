// How a warp turns cached keys and values into operands of the tensor cores: one struct for each type of the cache.
//
// The attention kernel keeps tiles of slots in shared memory, exactly as the cache holds them. A head's slice of a slot
// is a row of blocks of 32 values. A format says how large a block is and how lane 4 g + t reads its share of the A
// operand of mma.m16n8k16 in f16.
//
// BLOCK      bytes of 32 values
// IN_ORDER   whether the values of a fragment stand in their own order; otherwise in one that unpacks two at a time
// k_padding, v_padding
//            words to add to a slice of so many words in a tile of K or V: the 32 lanes of a load meet different banks
// load_k<ODD>(a, block, t)
//            the values 4t .. 4t+3 and 16+4t .. 16+4t+3 of a block as four half2; each four in the order 0, 2, 1, 3
//            unless IN_ORDER, which Q follows (stage_queries). ODD: the block's number within a pair of blocks.
// load_v<STRIDE>(a, slots, block, lane)
//            the A fragments of V^T for 16 slots, STRIDE bytes apart, and the 32 dimensions of a block: row r of
//            fragment j is dimension 16 j + r if IN_ORDER, else 16 j + 2 (r % 8) + r / 8. All values are finite,
//            whatever the bytes, so that p = 0 makes them vanish.
#pragma once

#include "ext.h"

#include <cuda_fp16.h>
#include <stdint.h>

namespace pydflash_attention {

// Row i of a 16-slot tile of S^T is slot row_slot(i): the pair (i, i + 8), which the accumulator layout packs into one
// word of P, differs in bit 2 so that the transposing ldmatrix of V meets eight different banks.
static __device__ __forceinline__ int row_slot(int row) { return row < 8 ? row : 8 + ((row - 8) ^ 4); }

// ---- half2 arithmetic on 32-bit registers ----

static __device__ __forceinline__ uint32_t bits(half2 h) { return *reinterpret_cast<uint32_t *>(&h); }
static __device__ __forceinline__ half2 halves(uint32_t u) { return *reinterpret_cast<half2 *>(&u); }

constexpr uint32_t LARGEST_HALF = 0x7bff7bffu;  // 65504, twice

// Infinities and NaN become finite as well.
static __device__ __forceinline__ uint32_t saturate(uint32_t x, uint32_t limit = LARGEST_HALF) {
    return bits(__hmax2(__hmin2(halves(x), halves(limit)), halves(limit | 0x80008000u)));
}

// Magic numbers: 0x6400 | u is the f16 1024 + u for u < 1024, so subtracting 1024 + zero point is exact.
static __device__ __forceinline__ uint32_t from_nibbles(uint32_t x, half2 d) {
    const half2 biased = halves((x & 0x000f000fu) | 0x64006400u);
    return bits(__hmul2(__hsub2(biased, halves(0x64086408u)), d));
}

static __device__ __forceinline__ uint32_t from_bytes(uint32_t x, half2 d) {
    const half2 biased = halves((x & 0x00ff00ffu) ^ 0x64806480u);
    return bits(__hmul2(__hsub2(biased, halves(0x64806480u)), d));
}

static __device__ __forceinline__ uint32_t from_bf16(uint32_t x) {
    return saturate(bits(__floats2half2_rn(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u))));
}

static __device__ __forceinline__ uint32_t load16(const char * p) { return *reinterpret_cast<const uint16_t *>(p); }

// A word at p, which is 2 past a word boundary unless ALIGNED.
template <bool ALIGNED>
static __device__ __forceinline__ uint32_t load32(const char * p) {
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const uint32_t *>(p);
    } else {
        return __byte_perm(*reinterpret_cast<const uint32_t *>(p - 2), *reinterpret_cast<const uint32_t *>(p + 2),
                           0x5432);
    }
}

// ---- what two formats share; F is the format, which converts ----

// 16 bits a value. F::key and F::value make two cached values a half2.
template <typename F>
struct sixteen_bits {
    static constexpr int  BLOCK    = 64;
    static constexpr bool IN_ORDER = true;

    // K is read in 8 slots, 8 words each; V by ldmatrix in 8 slots, 4 words each.
    __host__ __device__ static constexpr int k_padding(int) { return 8; }
    __host__ __device__ static constexpr int v_padding(int) { return 4; }

    template <bool ODD>
    __device__ __forceinline__ static void load_k(uint32_t (&a)[4], const char * block, int t) {
        const uint2 low  = *reinterpret_cast<const uint2 *>(block + 8 * t);
        const uint2 high = *reinterpret_cast<const uint2 *>(block + 32 + 8 * t);
        a[0] = F::key(low.x), a[1] = F::key(low.y), a[2] = F::key(high.x), a[3] = F::key(high.y);
    }

    template <int STRIDE>
    __device__ __forceinline__ static void load_v(uint32_t (&a)[2][4], const char * slots, int block, int lane) {
        const int matrix = lane / 8, r = lane % 8;
        const int slot   = row_slot(r / 2 + 4 * (matrix / 2) + 8 * (r % 2));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const char *   row     = slots + slot * STRIDE + BLOCK * block + 32 * j + 16 * (matrix % 2);
            const uint32_t address = (uint32_t) __cvta_generic_to_shared(row);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a[j][0]), "=r"(a[j][1]), "=r"(a[j][2]), "=r"(a[j][3])
                         : "r"(address)
                         : "memory");
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[j][i] = F::value(a[j][i]);
            }
        }
    }
};

// A scale in f16, then 32 integers. F::dequantise makes eight of them half2, times d, each four in the order 0, 2, 1,
// 3: the bytes of x and of y, which lies 16 bytes on; or, if F::NIBBLES, the low and the high nibbles of x.
template <typename F>
struct quantised {
    static constexpr bool     IN_ORDER      = false;
    static constexpr uint32_t LARGEST_SCALE = 0x5ffc5ffcu;  // 511, twice; times -128 it is above -65504

    // K is read in 8 slots, 4 words each; V in 4 slots, 5 to 8 words each.
    __host__ __device__ static constexpr int k_padding(int words) { return (12 - words % 8) % 8; }
    __host__ __device__ static constexpr int v_padding(int words) { return (24 - words % 16) % 16; }

    template <bool ODD>
    __device__ __forceinline__ static void load_k(uint32_t (&a)[4], const char * block, int t) {
        const half2    d = halves(load16(block) * 0x00010001u);
        const uint32_t x = load32<ODD>(block + 2 + 4 * t);
        const uint32_t y = F::NIBBLES ? 0 : load32<ODD>(block + 18 + 4 * t);
        const uint4    h = F::dequantise(x, y, d);
        a[0] = h.x, a[1] = h.y, a[2] = h.z, a[3] = h.w;
    }

    template <int STRIDE>
    __device__ __forceinline__ static void load_v(uint32_t (&a)[2][4], const char * slots, int block, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const char *   first  = slots + row_slot(t + 4 * p) * STRIDE + F::BLOCK * block;
            const char *   second = slots + row_slot(t + 4 * p + 8) * STRIDE + F::BLOCK * block;
            const half2    d = halves(saturate(load16(first) | load16(second) << 16, LARGEST_SCALE));
            const uint32_t x = load16(first + 2 + 2 * g) | load16(second + 2 + 2 * g) << 16;
            const uint32_t y = F::NIBBLES ? 0 : load16(first + 18 + 2 * g) | load16(second + 18 + 2 * g) << 16;
            const uint4    h = F::dequantise(x, y, d);
            a[0][2 * p] = h.x, a[0][2 * p + 1] = h.y, a[1][2 * p] = h.z, a[1][2 * p + 1] = h.w;
        }
    }
};

// ---- the formats ----

struct f16 : sixteen_bits<f16> {
    __device__ __forceinline__ static uint32_t key(uint32_t x) { return x; }
    __device__ __forceinline__ static uint32_t value(uint32_t x) { return saturate(x); }
};

struct bf16 : sixteen_bits<bf16> {
    __device__ __forceinline__ static uint32_t key(uint32_t x) { return from_bf16(x); }
    __device__ __forceinline__ static uint32_t value(uint32_t x) { return from_bf16(x); }
};

struct q8_0 : quantised<q8_0> {
    static constexpr int  BLOCK   = 34;
    static constexpr bool NIBBLES = false;

    __device__ __forceinline__ static uint4 dequantise(uint32_t x, uint32_t y, half2 d) {
        return make_uint4(from_bytes(x, d), from_bytes(x >> 8, d), from_bytes(y, d), from_bytes(y >> 8, d));
    }
};

struct q4_0 : quantised<q4_0> {
    static constexpr int  BLOCK   = 18;
    static constexpr bool NIBBLES = true;

    __device__ __forceinline__ static uint4 dequantise(uint32_t x, uint32_t, half2 d) {
        return make_uint4(from_nibbles(x, d), from_nibbles(x >> 8, d),
                          from_nibbles(x >> 4, d), from_nibbles(x >> 12, d));
    }
};

// ---- choosing one at run time ----

// Calls `visit` with a value of the format of a ggml type; false when the type has none. The kernel branches on formats
// outside its inner loops, so that pairs of formats do not multiply the number of kernels.
template <typename Visitor>
__host__ __device__ __forceinline__ bool with_format(ggml_type type, Visitor && visit) {
    switch (type) {
        case GGML_TYPE_F16:  visit(f16());  return true;
        case GGML_TYPE_BF16: visit(bf16()); return true;
        case GGML_TYPE_Q8_0: visit(q8_0()); return true;
        case GGML_TYPE_Q4_0: visit(q4_0()); return true;
        default: return false;
    }
}

// What `constant` says of the format's struct; of a type without one, zero.
template <typename Constant>
__host__ __device__ __forceinline__ auto of_format(ggml_type type, Constant constant) {
    decltype(constant(f16())) value = {};
    with_format(type, [&](auto f) { value = constant(f); });
    return value;
}

__host__ __device__ __forceinline__ bool in_order(ggml_type type) {
    return of_format(type, [](auto f) { return decltype(f)::IN_ORDER; });
}

// Whether attention on CUDA reads a type.
__host__ __device__ inline bool has_format(ggml_type type) {
    return of_format(type, [](auto f) { return decltype(f)::BLOCK; }) > 0;
}

}  // namespace pydflash_attention
