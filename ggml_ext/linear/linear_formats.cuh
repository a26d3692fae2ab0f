// How a warp turns rows of quantised weights into operands of the tensor cores.
//
// The product kernel stages the bytes of one chunk (256 weights) of each row in shared memory. A format says how large
// that is and, for lane (g, t), what it contributes to step s of the 16 steps of a chunk: 4 weights of its row. Which 4
// is free, as long as the activations agree: unit 16 t + s (pack.cuh), unless a format overrides `activations`.
//
// Formats of the f16 kind give the 4 weights as two half2, values 0, 2 and 1, 3. Where the block scales are small
// integers they are multiplied in exactly (the product of a 4- or 5-bit weight and a 6-bit scale has at most 11 bits),
// and what remains of a row's scale, one f32 for the chunk, is applied to the f32 accumulator. So the K-quants lose
// nothing here that the file has not lost. Formats of the tf32 kind give 4 floats.
//
// Unpacking works on 4 bytes at once: OR-ing 0x6400 over a byte makes the half 1024 + byte (over a byte shifted left by
// 4, 1024 + 16 byte), and one fused multiply-add removes the offset and applies the scale.
//
// Members: BLOCK, the weights of a block (K is a multiple of it); BYTES of a chunk; STRIDE and skew(row), its place in
// shared memory, chosen so that the 32 lanes of a load spread over the banks; ALIGNED, whether rows start on 16 bytes;
// M_TILES of 16 rows that a warp holds; WARPS of the block that compute; FLOAT_SCALE and MINIMUM, whether a row has
// scale() and minimum() for the chunk.
#pragma once

#include "pack.cuh"

#include <cuda_fp16.h>
#include <stdint.h>

namespace pydflash_linear {

constexpr int WARPS = 8;

// ---- half2 arithmetic on 32-bit registers

__device__ __forceinline__ __half2 as_half2(uint32_t bits) {
    return *(const __half2 *) &bits;
}
__device__ __forceinline__ uint32_t as_bits(__half2 value) {
    return *(const uint32_t *) &value;
}

constexpr uint32_t HALF_1024      = 0x64006400;  // 1024
constexpr uint32_t HALF_1024_LESS = 0xe400e400;  // -1024
constexpr uint32_t HALF_1032_LESS = 0xe408e408;  // -1032
constexpr uint32_t HALF_1056_LESS = 0xe420e420;  // -1056
constexpr uint32_t HALF_1152_LESS = 0xe480e480;  // -1152
constexpr uint32_t HALF_72_LESS   = 0xd480d480;  // -72
constexpr uint32_t HALF_SIXTEENTH = 0x2c002c00;  // 1/16

__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return as_bits(__hadd2(as_half2(a), as_half2(b))); }
__device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) { return as_bits(__hmul2(as_half2(a), as_half2(b))); }
__device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return as_bits(__hfma2(as_half2(a), as_half2(b), as_half2(c)));
}
__device__ __forceinline__ uint32_t twice_low(uint32_t v)  { return __byte_perm(v, v, 0x1010); }
__device__ __forceinline__ uint32_t twice_high(uint32_t v) { return __byte_perm(v, v, 0x3232); }

// Bits of a where mask is set, of b elsewhere; one LOP3, as are (v & mask) | bits.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

// Bytes 0 and 2, and 1 and 3, of v & mask (mask repeats every 2 bytes) as the halves 1024 + byte.
__device__ __forceinline__ uint32_t even_bytes(uint32_t v, uint32_t mask) { return (v & mask) | HALF_1024; }
__device__ __forceinline__ uint32_t odd_bytes(uint32_t v, uint32_t mask)  { return (v >> 8 & mask) | HALF_1024; }

// Bytes 0 and 1 of v as the halves 1024 + byte.
__device__ __forceinline__ uint32_t low_bytes(uint32_t v) { return __byte_perm(v, 0x64646464u, 0x4140); }

__device__ __forceinline__ float half_at(const uint8_t * p) { return __half2float(*(const __half *) p); }
__device__ __forceinline__ uint32_t u16_at(const uint8_t * p) { return *(const uint16_t *) p; }

// N words from a 2-byte aligned address: 4-byte loads, the last of which may reach 4 bytes past the end.
template <int N>
__device__ __forceinline__ void load_words(const uint8_t * p, uint32_t (&words)[N]) {
    const uint32_t * from  = (const uint32_t *) (p - ((uintptr_t) p & 2));
    const uint32_t   order = (uintptr_t) p & 2 ? 0x5432 : 0x3210;
    uint32_t         word  = from[0];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const uint32_t next = from[i + 1];
        words[i] = __byte_perm(word, next, order);
        word     = next;
    }
}

// 4 N words from a 16-byte aligned address.
template <int N>
__device__ __forceinline__ void load_vectors(const uint8_t * p, uint32_t (&words)[4 * N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const uint4 v = ((const uint4 *) p)[i];
        words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
    }
}

// ---- what most formats share

// Steps 2 i and 2 i + 1 of a panel for this lane.
struct common {
    static constexpr int  BLOCK       = 32;
    static constexpr bool ALIGNED     = true;
    static constexpr bool MINIMUM     = false;
    static constexpr bool FLOAT_SCALE = false;
    static constexpr int  WARPS       = pydflash_linear::WARPS;

    __device__ static uint4 activations(const char * panel, int pair, int lane) {
        return *(const uint4 *) (panel + pair / 4 * HALF_PANEL + pair % 4 * STEP_PAIR + lane * 16);
    }
    __host__ __device__ static constexpr int skew(int) { return 0; }           // extra bytes before a row
    __host__ __device__ static constexpr int piece_offset(int piece) { return piece * 16; }
};

// The scales and minima of blocks 2t and 2t+1 of a Q4_K or Q5_K chunk: 6 bits each, packed in 12 bytes.
struct k_scales {
    uint32_t scales;  // two halves
    uint32_t minima;  // two halves
    float    d, dmin;

    __device__ k_scales(const uint8_t * chunk, int t) {
        const uint4    head  = *(const uint4 *) chunk;
        const int      shift = 16 * (t & 1);
        const uint32_t a = head.y >> shift, b = head.z >> shift, c = head.w >> shift;
        const uint32_t scale_bits = t < 2 ? a & 0x3f3f : (c & 0x0f0f) | (a >> 2 & 0x3030);
        const uint32_t min_bits   = t < 2 ? b & 0x3f3f : (c >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
        scales = add(low_bytes(scale_bits), HALF_1024_LESS);
        minima = add(low_bytes(min_bits), HALF_1024_LESS);
        d      = __half2float(__low2half(as_half2(head.x)));
        dmin   = __half2float(__high2half(as_half2(head.x)));
    }
};

// ---- the formats

struct q4_k : common {
    static constexpr int  BLOCK = 256, BYTES = 144, STRIDE = 144, M_TILES = 1;
    static constexpr bool FLOAT_SCALE = true, MINIMUM = true;

    struct row {
        uint32_t qs[8];               // low nibbles: weights 64 t + 0..31, high nibbles: 64 t + 32..63
        uint32_t scale_low, offset_low, scale_high, offset_high, minima;
        float    d, dmin;

        __device__ void load(const uint8_t * chunk, int t) {
            const k_scales k(chunk, t);
            load_vectors<2>(chunk + 16 + 32 * t, qs);
            scale_low   = twice_low(k.scales);
            offset_low  = mul(scale_low, HALF_1024_LESS);
            scale_high  = mul(twice_high(k.scales), HALF_SIXTEENTH);
            offset_high = mul(scale_high, HALF_1024_LESS);
            minima = k.minima, d = k.d, dmin = k.dmin;
        }
        __device__ uint2 weights(int step) const {
            const uint32_t q = qs[step % 8];
            if (step < 8) {
                return make_uint2(fma(even_bytes(q, 0x000f000f), scale_low, offset_low),
                                  fma(odd_bytes(q, 0x000f000f), scale_low, offset_low));
            }
            return make_uint2(fma(even_bytes(q, 0x00f000f0), scale_high, offset_high),
                              fma(odd_bytes(q, 0x00f000f0), scale_high, offset_high));
        }
        __device__ float scale() const { return d; }
        __device__ float minimum() const { return dmin; }
    };
};

struct q5_k : common {
    static constexpr int  BLOCK = 256, BYTES = 176, STRIDE = 176, M_TILES = 1;
    static constexpr bool FLOAT_SCALE = true, MINIMUM = true;

    struct row {
        uint32_t qs[8], qh[8];        // bits 0 and 1 of a byte of qh: the fifth bits of the two nibbles
        uint32_t scale_low, offset_low, scale_high, offset_high, minima;
        float    d, dmin;

        __device__ void load(const uint8_t * chunk, int t) {
            const k_scales k(chunk, t);
            load_vectors<2>(chunk + 16, qh);
            load_vectors<2>(chunk + 48 + 32 * t, qs);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                qh[i] >>= 2 * t;
            }
            scale_low   = twice_low(k.scales);
            offset_low  = mul(scale_low, HALF_1024_LESS);
            scale_high  = twice_high(k.scales);
            offset_high = mul(scale_high, HALF_1024_LESS);
            minima = k.minima, d = k.d, dmin = k.dmin;
        }
        __device__ uint2 weights(int step) const {
            const uint32_t q = qs[step % 8], h = qh[step % 8];
            if (step < 8) {
                const uint32_t v = select_bits(0x0f0f0f0f, q, h << 4);
                return make_uint2(fma(even_bytes(v, 0x001f001f), scale_low, offset_low),
                                  fma(odd_bytes(v, 0x001f001f), scale_low, offset_low));
            }
            const uint32_t v = select_bits(0x0f0f0f0f, q >> 4, h << 3);
            return make_uint2(fma(even_bytes(v, 0x001f001f), scale_high, offset_high),
                              fma(odd_bytes(v, 0x001f001f), scale_high, offset_high));
        }
        __device__ float scale() const { return d; }
        __device__ float minimum() const { return dmin; }
    };
};

// Q6_K keeps weights that are 64 apart in one byte. Lane t = 2 n + j takes both nibbles of 32 bytes: the weights
// 128 n + 32 j + 0..31 in steps 0-7 and 128 n + 64 + 32 j + 0..31 in steps 8-15. In terms of pack.cuh these are steps
// 8 j + 0..7 of lanes 2 n and 2 n + 1; the padding between the halves of a panel keeps j = 0 and j = 1 on other banks.
// Chunks are 210 bytes, so rows start on any even byte.
struct q6_k : common {
    static constexpr int  BLOCK = 256, BYTES = 210, STRIDE = 224, M_TILES = 1;
    static constexpr bool FLOAT_SCALE = true, ALIGNED = false;

    // Rows 224 bytes apart would share 8 banks; every second one moves on by 16 bytes.
    __host__ __device__ static constexpr int skew(int row) { return row / 2 * 16; }

    __device__ static uint4 activations(const char * panel, int pair, int lane) {
        const int owner = (lane & ~1) + pair / 4;
        return *(const uint4 *) (panel + (lane & 1) * HALF_PANEL + pair % 4 * STEP_PAIR + owner * 16);
    }

    struct row {
        uint32_t ql[8], qh[8];
        uint32_t scale_low, scale_high;  // int8 scales of the 16-weight blocks of either half, as two halves each
        float    d;

        __device__ void load(const uint8_t * chunk, int t) {
            const int n = t / 2, j = t % 2;
            load_words<8>(chunk + 64 * n + 32 * j, ql);
            load_words<8>(chunk + 128 + 32 * n, qh);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                qh[i] >>= 2 * j;
            }
            const uint8_t * scales = chunk + 192 + 8 * n + 2 * j;
            scale_low  = add(low_bytes(u16_at(scales) ^ 0x8080), HALF_1152_LESS);
            scale_high = add(low_bytes(u16_at(scales + 4) ^ 0x8080), HALF_1152_LESS);
            d          = half_at(chunk + 208);
        }
        __device__ uint2 weights(int step) const {
            const uint32_t q = ql[step % 8], h = qh[step % 8];
            const uint32_t v = step < 8 ? select_bits(0x0f0f0f0f, q, h << 4) : select_bits(0x0f0f0f0f, q >> 4, h);
            const uint32_t both  = step < 8 ? scale_low : scale_high;
            const uint32_t scale = step % 8 < 4 ? twice_low(both) : twice_high(both);
            return make_uint2(mul(add(even_bytes(v, 0x003f003f), HALF_1056_LESS), scale),
                              mul(add(odd_bytes(v, 0x003f003f), HALF_1056_LESS), scale));
        }
        __device__ float scale() const { return d; }
    };
};

// Eight blocks of 34 bytes; lane t takes blocks 2 t and 2 t + 1.
struct q8_0 : common {
    static constexpr int  BYTES = 272, STRIDE = 304, M_TILES = 1, WARPS = 4;
    static constexpr bool ALIGNED = false;

    struct row {
        uint32_t q[16];
        uint32_t d[2];

        __device__ void load(const uint8_t * chunk, int t) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint8_t * block = chunk + 34 * (2 * t + b);
                uint32_t words[8];
                load_words<8>(block + 2, words);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    q[8 * b + i] = words[i] ^ 0x80808080;
                }
                d[b] = twice_low(u16_at(block));
            }
        }
        __device__ uint2 weights(int step) const {
            const uint32_t scale = d[step / 8];
            return make_uint2(mul(add(even_bytes(q[step], 0x00ff00ff), HALF_1152_LESS), scale),
                              mul(add(odd_bytes(q[step], 0x00ff00ff), HALF_1152_LESS), scale));
        }
    };
};

// Eight blocks of 18 bytes; lane t takes blocks 2 t and 2 t + 1.
struct q4_0 : common {
    static constexpr int  BYTES = 144, STRIDE = 176, M_TILES = 1;
    static constexpr bool ALIGNED = false;

    struct row {
        uint32_t q[8];
        uint32_t d[2];

        __device__ void load(const uint8_t * chunk, int t) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint8_t * block = chunk + 18 * (2 * t + b);
                uint32_t words[4];
                load_words<4>(block + 2, words);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    q[4 * b + i] = words[i];
                }
                d[b] = twice_low(u16_at(block));
            }
        }
        __device__ uint2 weights(int step) const {
            const uint32_t v = q[step / 8 * 4 + step % 4], scale = d[step / 8];
            if (step % 8 < 4) {
                return make_uint2(mul(add(even_bytes(v, 0x000f000f), HALF_1032_LESS), scale),
                                  mul(add(odd_bytes(v, 0x000f000f), HALF_1032_LESS), scale));
            }
            return make_uint2(mul(fma(even_bytes(v, 0x00f000f0), HALF_SIXTEENTH, HALF_72_LESS), scale),
                              mul(fma(odd_bytes(v, 0x00f000f0), HALF_SIXTEENTH, HALF_72_LESS), scale));
        }
    };
};

// Lane t reads 128 bytes; 16 bytes of padding after each 128 keep the four lanes of a row on other banks.
struct f16 : common {
    static constexpr int BYTES = 512, STRIDE = 576, M_TILES = 1, WARPS = 4;

    __host__ __device__ static constexpr int piece_offset(int piece) { return piece * 16 + piece / 8 * 16; }

    struct row {
        const uint2 * w;

        __device__ void load(const uint8_t * chunk, int t) { w = (const uint2 *) (chunk + 144 * t); }
        __device__ uint2 weights(int step) const {
            const uint2 v = w[step];
            return make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632));
        }
    };
};

// bf16 has the range of f32, so it takes the tf32 tensor cores, which hold its values exactly.
struct bf16 : f16 {
    struct row {
        const uint2 * w;

        __device__ void load(const uint8_t * chunk, int t) { w = (const uint2 *) (chunk + 144 * t); }
        __device__ uint4 weights(int step) const {
            const uint2 v = w[step];
            return make_uint4(v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u);
        }
    };
};

// Rounded to tf32, whose 11 bits are what the activations have. Half the warps compute, so that two stages fit into the
// shared memory of any device; the models have only small f32 weights.
struct f32 : common {
    static constexpr int BYTES = 1024, STRIDE = 1088, M_TILES = 1, WARPS = 2;

    __host__ __device__ static constexpr int piece_offset(int piece) { return piece * 16 + piece / 16 * 16; }

    __device__ static uint32_t round(uint32_t bits) {
        uint32_t result;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
        return result;
    }

    struct row {
        const uint4 * w;

        __device__ void load(const uint8_t * chunk, int t) { w = (const uint4 *) (chunk + 272 * t); }
        __device__ uint4 weights(int step) const {
            const uint4 v = w[step];
            return make_uint4(round(v.x), round(v.y), round(v.z), round(v.w));
        }
    };
};

// ---- choosing one at run time

// Calls `visit` with a value of the format of a ggml type; false when the type has none.
template <typename Visitor>
__host__ __device__ __forceinline__ bool with_format(int type, Visitor && visit) {
    switch (type) {
        case GGML_TYPE_Q4_K: visit(q4_k()); return true;
        case GGML_TYPE_Q5_K: visit(q5_k()); return true;
        case GGML_TYPE_Q6_K: visit(q6_k()); return true;
        case GGML_TYPE_Q8_0: visit(q8_0()); return true;
        case GGML_TYPE_Q4_0: visit(q4_0()); return true;
        case GGML_TYPE_F16:  visit(f16());  return true;
        case GGML_TYPE_BF16: visit(bf16()); return true;
        case GGML_TYPE_F32:  visit(f32());  return true;
        default: return false;
    }
}

}  // namespace pydflash_linear
