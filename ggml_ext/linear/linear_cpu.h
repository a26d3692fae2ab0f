// The quantised weight formats as the CPU's products read them (linear.c): a block of eight or sixteen rows at a time
// into a tile, or a block of one row times one row of x. Needs AVX2.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define GROUP 8   // weight rows together: 32-bit lanes of a register
#define STEPS 64  // of four k, in the largest block

// A tile is one register wide. With AVX512-VNNI that is sixteen weight rows, and one instruction multiplies four
// unsigned with four signed bytes and adds the products to 32 bits; more registers are free, so that more rows of x
// share the loads of a weight.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define DOT_OF_FOUR
#define TILE_ROWS 16
#define TOGETHER 8  // rows of x
#define WIDE(operation, ...) _mm512_##operation(__VA_ARGS__)
typedef __m512i wide;
typedef __m512  wide_float;
#else
#define TILE_ROWS GROUP
#define TOGETHER 4
#define WIDE(operation, ...) _mm256_##operation(__VA_ARGS__)
typedef __m256i wide;
typedef __m256  wide_float;
#endif

// weight = d * (scale * q) - dmin * min, or d * (scale * q - min) where the format folds the minimum.
struct tile {
    wide q[STEPS];    // a step: rows of four unsigned bytes; magnitudes when the weights are signed
    wide sign[8];     // the signed bytes (Q8_0 without DOT_OF_FOUR)
    wide scale[16];   // per sub-block: the row's scale, as int32 (without DOT_OF_FOUR: twice, as int16)
    wide min[8];      // per two sums of x: the minima of the row, as int16
    wide_float d, dmin;
};

INLINE __m256i loaded(const void * bytes) {
    return _mm256_loadu_si256((const __m256i *) bytes);
}

// total + the sums of neighbouring products of 16 bits.
INLINE __m256i add_pairs(__m256i total, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(total, a, b);
#else
    return _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
#endif
}

INLINE wide add_products(wide total, wide a, wide b) {
#ifdef DOT_OF_FOUR
    return _mm512_dpwssd_epi32(total, a, b);
#else
    return add_pairs(total, a, b);
#endif
}

// Sixteen bytes of every fourth row of the tile.
INLINE wide every_fourth(const char * const * row, size_t offset) {
    __m256i part[TILE_ROWS / GROUP];
    for (int i = 0; i < TILE_ROWS / GROUP; i++) {
        const __m128i low  = _mm_loadu_si128((const __m128i *) (row[i * GROUP] + offset));
        const __m128i high = _mm_loadu_si128((const __m128i *) (row[i * GROUP + 4] + offset));
        part[i] = _mm256_set_m128i(high, low);
    }
#ifdef DOT_OF_FOUR
    return _mm512_inserti64x4(_mm512_castsi256_si512(part[0]), part[1], 1);
#else
    return part[0];
#endif
}

// Sixteen bytes at the same place in each row: dword i of all rows in out[i].
INLINE void transpose(wide out[4], const char * const row[TILE_ROWS], size_t offset) {
    wide in[4];
    for (int r = 0; r < 4; r++) {
        in[r] = every_fourth(row + r, offset);
    }
    const wide a = WIDE(unpacklo_epi32, in[0], in[1]), b = WIDE(unpackhi_epi32, in[0], in[1]);
    const wide c = WIDE(unpacklo_epi32, in[2], in[3]), d = WIDE(unpackhi_epi32, in[2], in[3]);
    out[0] = WIDE(unpacklo_epi64, a, c);
    out[1] = WIDE(unpackhi_epi64, a, c);
    out[2] = WIDE(unpacklo_epi64, b, d);
    out[3] = WIDE(unpackhi_epi64, b, d);
}

INLINE __m256i nibble(__m256i bytes, int shift) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(15));
}

// Bits of `mask` in every byte, after a shift to the left (negative: to the right).
INLINE __m256i bits(__m256i bytes, int shift, int mask) {
    const __m256i moved = shift < 0 ? _mm256_srli_epi16(bytes, -shift) : _mm256_slli_epi16(bytes, shift);
    return _mm256_and_si256(moved, _mm256_set1_epi8((char) mask));
}

INLINE wide wide_nibble(wide bytes, int shift) {
    return WIDE(srli_epi16, bytes, shift) & WIDE(set1_epi8, 15);
}

INLINE wide wide_bits(wide bytes, int shift, int mask) {
    const wide moved = shift < 0 ? WIDE(srli_epi16, bytes, -shift) : WIDE(slli_epi16, bytes, shift);
    return moved & WIDE(set1_epi8, (char) mask);
}

// In every lane the bytes of `lane` (0 to 3 for its own, 128 for a zero).
INLINE wide shuffled(wide bytes, unsigned lane) {
    const __m128i first = _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m128i lanes = _mm_add_epi32(_mm_set1_epi32((int) lane), first);
#ifdef DOT_OF_FOUR
    return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(lanes));
#else
    return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(lanes));
#endif
}

// Two of the four bytes of every lane, as int16 with their signs.
INLINE wide widened(wide bytes, int first, int second) {
    return WIDE(srai_epi16, shuffled(bytes, 0x00800080u | (unsigned) first << 8 | (unsigned) second << 24), 8);
}

// Byte j of every lane, as the tile holds a scale.
INLINE wide scale_of(wide bytes, int j) {
#ifdef DOT_OF_FOUR
    return _mm512_srai_epi32(_mm512_slli_epi32(bytes, 24 - 8 * j), 24);
#else
    return widened(bytes, j, j);
#endif
}

// The f16 in the low half of every lane.
INLINE wide_float low_halves(wide lanes) {
#ifdef DOT_OF_FOUR
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes));
#else
    const __m256i low = _mm256_and_si256(lanes, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#endif
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

INLINE wide_float wide_halves(const char * const row[TILE_ROWS], size_t offset) {
#ifdef DOT_OF_FOUR
    return _mm512_insertf32x8(_mm512_castps256_ps512(halves(row, offset)), halves(row + GROUP, offset), 1);
#else
    return halves(row, offset);
#endif
}

// The common head of Q4_K and Q5_K: d, dmin and eight scales and minima of six bits.
INLINE void unpack_head(struct tile * tile, const char * const row[TILE_ROWS], size_t at) {
    wide head[4], scales[2], minima[2];
    transpose(head, row, at);
    scales[0] = wide_bits(head[1], 0, 63);
    minima[0] = wide_bits(head[2], 0, 63);
    scales[1] = wide_nibble(head[3], 0) | wide_bits(head[1], -2, 48);
    minima[1] = wide_nibble(head[3], 4) | wide_bits(head[2], -2, 48);
    for (int j = 0; j < 8; j++) {
        tile->scale[j] = scale_of(scales[j / 4], j % 4);
    }
    for (int i = 0; i < 4; i++) {
        tile->min[i] = widened(minima[i / 2], 2 * (i % 2), 2 * (i % 2) + 1);
    }
    tile->d    = low_halves(head[0]);
    tile->dmin = low_halves(WIDE(srli_epi32, head[0], 16));
}

INLINE void unpack_q4_k(struct tile * tile, const char * const row[TILE_ROWS], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q4_K);
    unpack_head(tile, row, at);
    for (int part = 0; part < 8; part++) {  // 32 bytes hold sub-blocks 2j (low nibbles) and 2j + 1 (high nibbles)
        wide packed[4];
        transpose(packed, row, at + offsetof(block_q4_K, qs) + 16 * (size_t) part);
        wide * q = tile->q + part / 2 * 16 + part % 2 * 4;
        for (int i = 0; i < 4; i++) {
            q[i]     = wide_nibble(packed[i], 0);
            q[i + 8] = wide_nibble(packed[i], 4);
        }
    }
}

INLINE void unpack_q5_k(struct tile * tile, const char * const row[TILE_ROWS], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q5_K);
    unpack_head(tile, row, at);
    for (int half = 0; half < 2; half++) {
        wide high[4], packed[4];
        transpose(high, row, at + offsetof(block_q5_K, qh) + 16 * (size_t) half);
        for (int j = 0; j < 4; j++) {  // as Q4_K; bits 2j and 2j + 1 of qh are the fifth ones
            transpose(packed, row, at + offsetof(block_q5_K, qs) + 32 * (size_t) j + 16 * (size_t) half);
            wide * q = tile->q + 16 * j + 4 * half;
            for (int i = 0; i < 4; i++) {
                q[i]     = wide_nibble(packed[i], 0) | wide_bits(high[i], 4, 16);
                q[i + 8] = wide_nibble(packed[i], 4) | wide_bits(high[i], 3, 16);
                high[i]  = WIDE(srli_epi16, high[i], 2);
            }
        }
    }
}

// q counts from -32: the minimum is 32 times the scale.
INLINE void unpack_q6_k(struct tile * tile, const char * const row[TILE_ROWS], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q6_K);
    wide scales[4], low[4], middle[4], high[4];
    transpose(scales, row, at + offsetof(block_q6_K, scales));
    for (int j = 0; j < 16; j++) {
        tile->scale[j] = scale_of(scales[j / 4], j % 4);
    }
    for (int i = 0; i < 8; i++) {
        tile->min[i] = WIDE(slli_epi16, widened(scales[i / 2], 2 * (i % 2), 2 * (i % 2) + 1), 5);
    }
    tile->d = wide_halves(row, at + offsetof(block_q6_K, d));
    for (int part = 0; part < 4; part++) {
        const size_t n = (size_t) part / 2, p = (size_t) part % 2;
        transpose(low,    row, at + offsetof(block_q6_K, ql) + 64 * n + 16 * p);
        transpose(middle, row, at + offsetof(block_q6_K, ql) + 64 * n + 16 * p + 32);
        transpose(high,   row, at + offsetof(block_q6_K, qh) + 32 * n + 16 * p);
        wide * q = tile->q + 32 * n + 4 * p;
        for (int i = 0; i < 4; i++) {
            q[i]      = wide_nibble(low[i], 0)    | wide_bits(high[i], 4, 48);
            q[i + 8]  = wide_nibble(middle[i], 0) | wide_bits(high[i], 2, 48);
            q[i + 16] = wide_nibble(low[i], 4)    | wide_bits(high[i], 0, 48);
            q[i + 24] = wide_nibble(middle[i], 4) | wide_bits(high[i], -2, 48);
        }
    }
}

// Bytes are signed: magnitudes and, beside them, the signs; or, where products cannot overflow, q counts from -128.
#ifdef DOT_OF_FOUR
#define Q8_0_FROM 128
#else
#define Q8_0_FROM 0
#endif
INLINE void unpack_q8_0(struct tile * tile, const char * const row[TILE_ROWS], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q8_0);
    wide bytes[8];
    transpose(bytes,     row, at + offsetof(block_q8_0, qs));
    transpose(bytes + 4, row, at + offsetof(block_q8_0, qs) + 16);
    for (int i = 0; i < 8; i++) {
        tile->q[i]    = Q8_0_FROM ? (wide) (bytes[i] ^ WIDE(set1_epi8, -128)) : WIDE(abs_epi8, bytes[i]);
        tile->sign[i] = bytes[i];
    }
    tile->scale[0] = WIDE(set1_epi16, 1);
    tile->d        = wide_halves(row, at + offsetof(block_q8_0, d));
}

// q counts from -8.
INLINE void unpack_q4_0(struct tile * tile, const char * const row[TILE_ROWS], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q4_0);
    wide packed[4];
    transpose(packed, row, at + offsetof(block_q4_0, qs));
    for (int i = 0; i < 4; i++) {
        tile->q[i]     = wide_nibble(packed[i], 0);
        tile->q[i + 4] = wide_nibble(packed[i], 4);
    }
    tile->scale[0] = WIDE(set1_epi16, 1);
    tile->d        = wide_halves(row, at + offsetof(block_q4_0, d));
}

// --- one row times one row: the sum of the eight lanes is that of q * x (K-quants: of scale * q * x), an exact
// integer; that of *minima is what the minima take off, where they have a scale of their own ---

INLINE __m256i dot_q8_0(const char * block, const int8_t * x, const int16_t * sums, __m256i * minima) {
    (void) sums;
    (void) minima;
    const __m256i w     = loaded(block + offsetof(block_q8_0, qs));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(loaded(x), w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
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
    *minima = _mm256_zextsi128_si256(_mm_madd_epi16(minimum, _mm_loadu_si128((const __m128i *) sums)));
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
    __m256i total = _mm256_madd_epi16(minima, loaded(sums));
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
