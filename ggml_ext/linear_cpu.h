// The quantised weight formats as the CPU's products read them (linear.c): a block of eight rows at a time into a tile,
// or a block of one row times one row of x. Needs AVX2.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define GROUP 8   // weight rows together: 32-bit lanes of a register
#define STEPS 64  // of four k, in the largest block

// A tile is one register wide. With AVX512-VNNI that is two groups of weight rows, and one instruction multiplies four
// unsigned with four signed bytes and adds the products to 32 bits; more registers are free, so that more rows of x
// share the loads of a weight.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define DOT_OF_FOUR
#define GROUPS 2
#define TOGETHER 8  // rows of x
#define WIDE(operation, ...) _mm512_##operation(__VA_ARGS__)
typedef __m512i wide;
typedef __m512  wide_float;
#else
#define GROUPS 1
#define TOGETHER 4
#define WIDE(operation, ...) _mm256_##operation(__VA_ARGS__)
typedef __m256i wide;
typedef __m256  wide_float;
#endif
#define TILE_ROWS (GROUPS * GROUP)

// weight = d * (scale * q) - dmin * min, or d * (scale * q - min) where the format folds the minimum.
// Every member is a register of the tile, group after group.
struct tile {
    _Alignas(64) __m256i q[STEPS][GROUPS];  // a step: rows of four unsigned bytes; magnitudes when the weights are signed
    __m256i sign[8][GROUPS];                // the signed bytes (Q8_0 only)
    __m256i scale[16][GROUPS];              // per sub-block: the row's scale twice, as int16
    __m256i min[8][GROUPS];                 // per two sums of x: the minima of the row, as int16
    __m256  d[GROUPS], dmin[GROUPS];
};

INLINE __m256i loaded(const void * bytes) {
    return _mm256_loadu_si256((const __m256i *) bytes);
}

// Sixteen bytes at the same place in each row: dword i of all rows in out[i].
INLINE void transpose(__m256i out[4], const char * const row[GROUP], size_t offset) {
    __m256i in[4];
    for (int r = 0; r < 4; r++) {
        const __m128i low = _mm_loadu_si128((const __m128i *) (row[r] + offset));
        const __m128i high = _mm_loadu_si128((const __m128i *) (row[r + 4] + offset));
        in[r] = _mm256_set_m128i(high, low);
    }
    const __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpackhi_epi32(in[0], in[1]);
    const __m256i c = _mm256_unpacklo_epi32(in[2], in[3]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

INLINE __m256i nibble(__m256i bytes, int shift) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(15));
}

// Bits of `mask` in every byte, after a shift to the left (negative: to the right).
INLINE __m256i bits(__m256i bytes, int shift, int mask) {
    const __m256i moved = shift < 0 ? _mm256_srli_epi16(bytes, -shift) : _mm256_slli_epi16(bytes, shift);
    return _mm256_and_si256(moved, _mm256_set1_epi8((char) mask));
}

// Two of the four bytes of every lane, as int16 with their signs.
INLINE __m256i widened(__m256i bytes, int first, int second) {
    const int     pair  = (int) (0x00800080u | (unsigned) first << 8 | (unsigned) second << 24);
    const __m128i lanes = _mm_setr_epi32(pair, pair + 0x04000400, pair + 0x08000800, pair + 0x0c000c00);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(bytes, _mm256_set_m128i(lanes, lanes)), 8);
}

INLINE __m256 halves(const char * const row[GROUP], size_t offset) {
    __m128i half[GROUP];
    for (int r = 0; r < GROUP; r++) {
        half[r] = _mm_loadu_si16(row[r] + offset);
    }
    const __m128i a = _mm_unpacklo_epi16(half[0], half[1]), b = _mm_unpacklo_epi16(half[2], half[3]);
    const __m128i c = _mm_unpacklo_epi16(half[4], half[5]), d = _mm_unpacklo_epi16(half[6], half[7]);
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d)));
}

// The common head of Q4_K and Q5_K: d, dmin and eight scales and minima of six bits.
INLINE void unpack_head(struct tile * tile, int g, const char * const row[GROUP], size_t at) {
    __m256i head[4], scales[2], minima[2];
    transpose(head, row, at);
    scales[0] = bits(head[1], 0, 63);
    minima[0] = bits(head[2], 0, 63);
    scales[1] = _mm256_or_si256(nibble(head[3], 0), bits(head[1], -2, 48));
    minima[1] = _mm256_or_si256(nibble(head[3], 4), bits(head[2], -2, 48));
    for (int j = 0; j < 8; j++) {
        tile->scale[j][g] = widened(scales[j / 4], j % 4, j % 4);
    }
    for (int i = 0; i < 4; i++) {
        tile->min[i][g] = widened(minima[i / 2], 2 * (i % 2), 2 * (i % 2) + 1);
    }
    const __m256i d = _mm256_and_si256(head[0], _mm256_set1_epi32(0xffff)), dmin = _mm256_srli_epi32(head[0], 16);
    tile->d[g]    = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
    tile->dmin[g] = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(dmin), _mm256_extracti128_si256(dmin, 1)));
}

INLINE void unpack_q4_k(struct tile * tile, int g, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q4_K);
    unpack_head(tile, g, row, at);
    for (int part = 0; part < 8; part++) {  // 32 bytes hold sub-blocks 2j (low nibbles) and 2j + 1 (high nibbles)
        __m256i packed[4];
        transpose(packed, row, at + offsetof(block_q4_K, qs) + 16 * (size_t) part);
        __m256i (* q)[GROUPS] = tile->q + part / 2 * 16 + part % 2 * 4;
        for (int i = 0; i < 4; i++) {
            q[i][g]     = nibble(packed[i], 0);
            q[i + 8][g] = nibble(packed[i], 4);
        }
    }
}

INLINE void unpack_q5_k(struct tile * tile, int g, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q5_K);
    unpack_head(tile, g, row, at);
    for (int half = 0; half < 2; half++) {
        __m256i high[4], packed[4];
        transpose(high, row, at + offsetof(block_q5_K, qh) + 16 * (size_t) half);
        for (int j = 0; j < 4; j++) {  // as Q4_K; bits 2j and 2j + 1 of qh are the fifth ones
            transpose(packed, row, at + offsetof(block_q5_K, qs) + 32 * (size_t) j + 16 * (size_t) half);
            __m256i (* q)[GROUPS] = tile->q + 16 * j + 4 * half;
            for (int i = 0; i < 4; i++) {
                q[i][g]     = _mm256_or_si256(nibble(packed[i], 0), bits(high[i], 4, 16));
                q[i + 8][g] = _mm256_or_si256(nibble(packed[i], 4), bits(high[i], 3, 16));
                high[i]  = _mm256_srli_epi16(high[i], 2);
            }
        }
    }
}

// q counts from -32: the minimum is 32 times the scale.
INLINE void unpack_q6_k(struct tile * tile, int g, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q6_K);
    __m256i scales[4], low[4], middle[4], high[4];
    transpose(scales, row, at + offsetof(block_q6_K, scales));
    for (int j = 0; j < 16; j++) {
        tile->scale[j][g] = widened(scales[j / 4], j % 4, j % 4);
    }
    for (int i = 0; i < 8; i++) {
        tile->min[i][g] = _mm256_slli_epi16(widened(scales[i / 2], 2 * (i % 2), 2 * (i % 2) + 1), 5);
    }
    tile->d[g] = halves(row, at + offsetof(block_q6_K, d));
    for (int part = 0; part < 4; part++) {
        const size_t n = (size_t) part / 2, p = (size_t) part % 2;
        transpose(low,    row, at + offsetof(block_q6_K, ql) + 64 * n + 16 * p);
        transpose(middle, row, at + offsetof(block_q6_K, ql) + 64 * n + 16 * p + 32);
        transpose(high,   row, at + offsetof(block_q6_K, qh) + 32 * n + 16 * p);
        __m256i (* q)[GROUPS] = tile->q + 32 * n + 4 * p;
        for (int i = 0; i < 4; i++) {
            q[i][g]      = _mm256_or_si256(nibble(low[i], 0),    bits(high[i], 4, 48));
            q[i + 8][g]  = _mm256_or_si256(nibble(middle[i], 0), bits(high[i], 2, 48));
            q[i + 16][g] = _mm256_or_si256(nibble(low[i], 4),    bits(high[i], 0, 48));
            q[i + 24][g] = _mm256_or_si256(nibble(middle[i], 4), bits(high[i], -2, 48));
        }
    }
}

// Bytes are signed: magnitudes and, beside them, the signs; or, where products cannot overflow, bytes from -128 on.
#ifdef DOT_OF_FOUR
#define Q8_0_MINIMA 1
#else
#define Q8_0_MINIMA 0
#endif
INLINE void unpack_q8_0(struct tile * tile, int g, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q8_0);
    __m256i bytes[8];
    transpose(bytes,     row, at + offsetof(block_q8_0, qs));
    transpose(bytes + 4, row, at + offsetof(block_q8_0, qs) + 16);
    for (int i = 0; i < 8; i++) {
        tile->q[i][g]    = Q8_0_MINIMA ? _mm256_xor_si256(bytes[i], _mm256_set1_epi8(-128)) : _mm256_abs_epi8(bytes[i]);
        tile->sign[i][g] = bytes[i];
    }
    tile->scale[0][g] = _mm256_set1_epi16(1);
    tile->min[0][g]   = _mm256_set1_epi16(128);
    tile->d[g]        = halves(row, at + offsetof(block_q8_0, d));
}

// q counts from -8.
INLINE void unpack_q4_0(struct tile * tile, int g, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q4_0);
    __m256i packed[4];
    transpose(packed, row, at + offsetof(block_q4_0, qs));
    for (int i = 0; i < 4; i++) {
        tile->q[i][g]     = nibble(packed[i], 0);
        tile->q[i + 4][g] = nibble(packed[i], 4);
    }
    tile->scale[0][g] = _mm256_set1_epi16(1);
    tile->min[0][g]   = _mm256_set1_epi16(8);
    tile->d[g]        = halves(row, at + offsetof(block_q4_0, d));
}

// --- one row times one row: the sum of the eight lanes is that of q * x (K-quants: of scale * q * x), an exact integer;
// that of *minima is what the minima take off, where they have a scale of their own ---

INLINE __m256i dot_q8_0(const char * block, const int8_t * x, const int16_t * sums, __m256i * minima) {
    (void) sums;
    (void) minima;
    const __m256i w     = loaded(block + offsetof(block_q8_0, qs));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(loaded(x), w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// total + the sums of neighbouring products of 16 bits.
INLINE __m256i add_pairs(__m256i total, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(total, a, b);
#else
    return _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
#endif
}

// The eight scales and the eight minima of a Q4_K or Q5_K block, as int16.
INLINE void k_head(const char * block, __m128i * scales, __m128i * minima) {
    uint32_t word[3];
    memcpy(word, block + offsetof(block_q4_K, scales), sizeof(word));
    const uint32_t high = word[2], scale = (high & 0x0f0f0f0f) | (word[0] >> 2 & 0x30303030),
                   minimum = (high >> 4 & 0x0f0f0f0f) | (word[1] >> 2 & 0x30303030);
    *scales = _mm_cvtepu8_epi16(_mm_setr_epi32((int) (word[0] & 0x3f3f3f3f), (int) scale, 0, 0));
    *minima = _mm_cvtepu8_epi16(_mm_setr_epi32((int) (word[1] & 0x3f3f3f3f), (int) minimum, 0, 0));
}

// Q4_K and Q5_K; `fifth`: the 32 bytes with the fifth bits, or NULL.
INLINE __m256i dot_k(const char * block, const char * qs, const char * fifth, const int8_t * x, const int16_t * sums,
                     __m256i * minima) {
    __m128i scale, minimum;
    k_head(block, &scale, &minimum);
    const __m128i less = _mm_madd_epi16(minimum, _mm_loadu_si128((const __m128i *) sums));
    *minima = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_zextsi128_si256(less));
    const __m256i scales = _mm256_set_m128i(scale, scale);
    __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {  // 32 bytes hold sub-blocks 2i (low nibbles) and 2i + 1 (high nibbles)
        __m256i q = nibble(loaded(qs + 32 * (j / 2)), j % 2 * 4);
        if (fifth) {
            q = _mm256_or_si256(q, bits(loaded(fifth), 4 - j, 16));
        }
        const __m256i pairs = _mm256_maddubs_epi16(q, loaded(x + 32 * j));
        const __m256i times = _mm256_shuffle_epi8(scales, _mm256_set1_epi16((short) (0x0100 + 0x0202 * j)));
        total = add_pairs(total, pairs, times);
    }
    return total;
}

INLINE __m256i dot_q4_k(const char * block, const int8_t * x, const int16_t * sums, __m256i * minima) {
    return dot_k(block, block + offsetof(block_q4_K, qs), NULL, x, sums, minima);
}

INLINE __m256i dot_q5_k(const char * block, const int8_t * x, const int16_t * sums, __m256i * minima) {
    return dot_k(block, block + offsetof(block_q5_K, qs), block + offsetof(block_q5_K, qh), x, sums, minima);
}

INLINE __m256i dot_q6_k(const char * block, const int8_t * x, const int16_t * sums, __m256i * taken_off) {
    (void) taken_off;
    const __m128i packed = _mm_loadu_si128((const __m128i *) (block + offsetof(block_q6_K, scales)));
    const __m256i scales = _mm256_set_m128i(packed, packed);
    const __m256i minima = _mm256_slli_epi16(_mm256_cvtepi8_epi16(packed), 5);
    __m256i total = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_madd_epi16(minima, loaded(sums)));
    __m256i which = _mm256_set_m128i(_mm_set1_epi16(0x0180), _mm_set1_epi16(0x0080));  // scale 0, scale 1
    for (int half = 0; half < 2; half++) {
        const __m256i low  = loaded(block + 64 * half), middle = loaded(block + 64 * half + 32);
        const __m256i high = loaded(block + offsetof(block_q6_K, qh) + 32 * half);
        const __m256i q[4] = {
            _mm256_or_si256(nibble(low, 0), bits(high, 4, 48)), _mm256_or_si256(nibble(middle, 0), bits(high, 2, 48)),
            _mm256_or_si256(nibble(low, 4), bits(high, 0, 48)), _mm256_or_si256(nibble(middle, 4), bits(high, -2, 48)),
        };
        for (int i = 0; i < 4; i++) {
            const __m256i scale = _mm256_srai_epi16(_mm256_shuffle_epi8(scales, which), 8);
            const __m256i pairs = _mm256_maddubs_epi16(q[i], loaded(x + 128 * half + 32 * i));
            total = add_pairs(total, pairs, scale);
            which = _mm256_add_epi16(which, _mm256_set1_epi16(0x0200));
        }
    }
    return total;
}
