#include "linear.h"

#include "ggml-cpu.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// A weight is unpacked once for all rows of x, and a result never depends on how many those are: the sums of integer
// products are exact in any order, and every (weight row, x row) has an accumulator of its own that takes one
// multiply-add per block, in the order of the blocks. x is rounded to 8 bits per ggml's own rule.
//
// Work goes in groups of GROUP weight rows, one row to a 32-bit lane. A step is four consecutive k of the eight rows:
// one register of unsigned bytes, multiplied with four bytes of x that are repeated in every lane. Products are summed
// in 16 bits for as many steps as cannot overflow, then in 32 bits, times the scale of the sub-block. The transposition
// happens on the packed nibbles, 16 bytes of each row at a time.
//
// One row is bound by that unpacking and by memory, many rows by the multiplier and the loads of x (two a cycle): 256
// products take about 5 cycles of a 256-bit CPU. Other types and CPUs without AVX2 take ggml's dot product row by row.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FAST_PRODUCTS 1
#include <immintrin.h>
#endif

#define MAX_ROWS PYDFLASH_LINEAR_MAX_ROWS

// Custom ops have no barrier, so every thread converts x for itself into memory of its own, which grows to the largest
// product the thread has seen and lives as long as the thread.
static void * scratch(size_t needed) {
    static _Thread_local void * buffer   = NULL;
    static _Thread_local size_t capacity = 0;
    if (needed > capacity) {
        free(buffer);
        buffer   = malloc(needed);
        capacity = needed;
        GGML_ASSERT(buffer != NULL);
    }
    return buffer;
}

static const float * x_row(const struct ggml_tensor * dst, int64_t t) {
    return (const float *) ((const char *) dst->src[0]->data + (size_t) t * dst->src[0]->nb[1]);
}

static const char * w_row(const struct ggml_tensor * dst, int64_t m) {
    return (const char *) dst->src[1]->data + (size_t) m * dst->src[1]->nb[1];
}

static float * result_row(const struct ggml_tensor * dst, int64_t t) {
    return (float *) ((char *) dst->data + (size_t) t * dst->nb[1]);
}

// --- any type: ggml's dot product --------------------------------------------------------------------------------

// Weight rows that one pass over the rows of x uses: they stay in the L2 cache while T rows stream past.
#define PASS 16

static void multiply_any(const struct ggml_tensor * dst, int64_t begin, int64_t end) {
    const struct ggml_type_traits_cpu * traits     = ggml_get_type_traits_cpu(dst->src[1]->type);
    const ggml_from_float_t             from_float = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
    const int64_t K = dst->src[0]->ne[0], T = dst->ne[1];
    const size_t  row_size = ggml_row_size(traits->vec_dot_type, K);
    char *        rows     = (char *) scratch(row_size * (size_t) T);
    for (int64_t t = 0; t < T; t++) {
        from_float(x_row(dst, t), rows + (size_t) t * row_size, K);
    }
    for (int64_t pass = begin; pass < end; pass += PASS) {
        for (int64_t t = 0; t < T; t++) {
            for (int64_t m = pass; m < pass + PASS && m < end; m++) {
                // One row at a time (the last argument), always: the two-row kernels of some CPUs round differently.
                traits->vec_dot((int) K, result_row(dst, t) + m, 0, w_row(dst, m), 0, rows + (size_t) t * row_size, 0, 1);
            }
        }
    }
}

#ifdef FAST_PRODUCTS

#define INLINE static inline __attribute__((always_inline))
#define GROUP 8   // weight rows together: 32-bit lanes of a register
#define STEPS 64  // of four k, in the largest block

// --- x in 8 bits -------------------------------------------------------------------------------------------------

// T rows of K values: bytes, the sum of every sixteen (or 32) of them, and a scale for each block.
struct activations {
    int64_t   T, K, block, sum_of;
    int8_t *  q;
    int16_t * sums;
    float *   scale;
};

static void add_up(struct activations * x, int64_t t) {
    for (int64_t i = 0; i < x->K / x->sum_of; i++) {
        int sum = 0;
        for (int64_t k = 0; k < x->sum_of; k++) {
            sum += x->q[t * x->K + i * x->sum_of + k];
        }
        x->sums[t * (x->K / x->sum_of) + i] = (int16_t) sum;
    }
}

// ggml's q8_0: 32 values, scale max|x|/127 kept as f16.
static void round_q8_0(struct activations * x, int64_t t, const float * values) {
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
    for (int64_t b = 0; b < x->K / QK8_0; b++) {
        block_q8_0 block;
        from_float(values + b * QK8_0, &block, QK8_0);
        memcpy(x->q + t * x->K + b * QK8_0, block.qs, QK8_0);
        x->scale[t * (x->K / QK8_0) + b] = _cvtsh_ss(block.d);
    }
}

// ggml's q8_K: 256 values, scale such that the largest magnitude becomes -127. (ggml's own function is scalar and takes
// as long as a small product.)
static float round_q8_k(int8_t * q, const float * values) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 peak = _mm256_setzero_ps();
    for (int i = 0; i < QK_K; i += 8) {
        peak = _mm256_max_ps(peak, _mm256_and_ps(magnitude, _mm256_loadu_ps(values + i)));
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(peak), _mm256_extractf128_ps(peak, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float most = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    if (most == 0.0f) {
        memset(q, 0, QK_K);
        return 0.0f;
    }
    int first = 0;  // of the largest magnitude: its sign decides
    while (first < QK_K - 1 && values[first] != most && values[first] != -most) {
        first++;
    }
    const float  inverse = -127.0f / values[first];
    const __m256 factor  = _mm256_set1_ps(inverse);
    for (int i = 0; i < QK_K; i += 32) {
        __m256i part[4];
        for (int j = 0; j < 4; j++) {
            part[j] = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_loadu_ps(values + i + 8 * j)));
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *) (q + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    return 1.0f / inverse;
}

static struct activations round_rows(const struct ggml_tensor * dst, int64_t block, int64_t sum_of) {
    const int64_t T = dst->ne[1], K = dst->src[0]->ne[0];
    char * memory = (char *) scratch((size_t) (T * K / 4 * 6 + T * K / block * 4));
    struct activations x = { T, K, block, sum_of, NULL, NULL, (float *) memory };
    x.sums = (int16_t *) (x.scale + T * (K / block));
    x.q    = (int8_t *) (x.sums + T * (K / sum_of));
    for (int64_t t = 0; t < T; t++) {
        if (block == QK8_0) {
            round_q8_0(&x, t, x_row(dst, t));
        } else {
            for (int64_t b = 0; b < K / QK_K; b++) {
                x.scale[t * (K / QK_K) + b] = round_q8_k(x.q + t * K + b * QK_K, x_row(dst, t) + b * QK_K);
            }
        }
        add_up(&x, t);
    }
    return x;
}

// --- a block of eight weight rows, unpacked ----------------------------------------------------------------------

// weight = d * (scale * q) - dmin * min, or d * (scale * q - min) where the format folds the minimum.
struct tile {
    __m256i q[STEPS];     // a step: eight rows of four unsigned bytes; magnitudes when the weights are signed
    __m256i sign[8];      // the signed bytes (Q8_0 only)
    __m256i scale[16];    // per sub-block: the row's scale twice, as int16
    __m256i min[8];       // per two sums of x: the minima of the row, as int16
    __m256  d, dmin;
};

// Sixteen bytes at the same place in each row: dword i of all rows in out[i].
INLINE void transpose(__m256i out[4], const char * const row[GROUP], size_t offset) {
    __m256i in[4];
    for (int r = 0; r < 4; r++) {
        const __m128i low = _mm_loadu_si128((const __m128i *) (row[r] + offset));
        in[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i *) (row[r + 4] + offset)), 1);
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

// Two bytes of every lane, widened: sign-extended.
INLINE __m256i widened(__m256i bytes, int first, int second) {
    const int     base  = (int) (0x00800080u | (unsigned) first << 8 | (unsigned) second << 24);
    const __m256i lanes = _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400, 0x08000800, 0x0c000c00);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(bytes, _mm256_add_epi32(lanes, _mm256_set1_epi32(base))), 8);
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
INLINE void unpack_head(struct tile * tile, const char * const row[GROUP], size_t at) {
    __m256i head[4], scales[2], minima[2];
    transpose(head, row, at);
    scales[0] = bits(head[1], 0, 63);
    minima[0] = bits(head[2], 0, 63);
    scales[1] = _mm256_or_si256(nibble(head[3], 0), bits(head[1], -2, 48));
    minima[1] = _mm256_or_si256(nibble(head[3], 4), bits(head[2], -2, 48));
    for (int j = 0; j < 8; j++) {
        tile->scale[j] = widened(scales[j / 4], j % 4, j % 4);
    }
    for (int i = 0; i < 4; i++) {
        tile->min[i] = widened(minima[i / 2], 2 * (i % 2), 2 * (i % 2) + 1);
    }
    const __m256i d = _mm256_and_si256(head[0], _mm256_set1_epi32(0xffff)), dmin = _mm256_srli_epi32(head[0], 16);
    tile->d    = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
    tile->dmin = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(dmin), _mm256_extracti128_si256(dmin, 1)));
}

INLINE void unpack_q4_k(struct tile * tile, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q4_K);
    unpack_head(tile, row, at);
    for (int part = 0; part < 8; part++) {  // 32 bytes hold sub-blocks 2j (low nibbles) and 2j + 1 (high nibbles)
        __m256i packed[4];
        transpose(packed, row, at + offsetof(block_q4_K, qs) + 16 * (size_t) part);
        __m256i * q = tile->q + part / 2 * 16 + part % 2 * 4;
        for (int i = 0; i < 4; i++) {
            q[i]     = nibble(packed[i], 0);
            q[i + 8] = nibble(packed[i], 4);
        }
    }
}

INLINE void unpack_q5_k(struct tile * tile, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q5_K);
    unpack_head(tile, row, at);
    for (int half = 0; half < 2; half++) {
        __m256i high[4], packed[4];
        transpose(high, row, at + offsetof(block_q5_K, qh) + 16 * (size_t) half);
        for (int j = 0; j < 4; j++) {  // as Q4_K; bits 2j and 2j + 1 of qh are the fifth ones
            transpose(packed, row, at + offsetof(block_q5_K, qs) + 32 * (size_t) j + 16 * (size_t) half);
            __m256i * q = tile->q + 16 * j + 4 * half;
            for (int i = 0; i < 4; i++) {
                q[i]     = _mm256_or_si256(nibble(packed[i], 0), bits(high[i], 4, 16));
                q[i + 8] = _mm256_or_si256(nibble(packed[i], 4), bits(high[i], 3, 16));
                high[i]  = _mm256_srli_epi16(high[i], 2);
            }
        }
    }
}

// q counts from -32: the minimum is 32 times the scale.
INLINE void unpack_q6_k(struct tile * tile, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q6_K);
    __m256i scales[4], low[4], middle[4], high[4];
    transpose(scales, row, at + offsetof(block_q6_K, scales));
    for (int j = 0; j < 16; j++) {
        tile->scale[j] = widened(scales[j / 4], j % 4, j % 4);
    }
    for (int i = 0; i < 8; i++) {
        tile->min[i] = _mm256_slli_epi16(widened(scales[i / 2], 2 * (i % 2), 2 * (i % 2) + 1), 5);
    }
    tile->d = halves(row, at + offsetof(block_q6_K, d));
    for (int part = 0; part < 4; part++) {
        const size_t n = (size_t) part / 2, p = (size_t) part % 2;
        transpose(low,    row, at + offsetof(block_q6_K, ql) + 64 * n + 16 * p);
        transpose(middle, row, at + offsetof(block_q6_K, ql) + 64 * n + 16 * p + 32);
        transpose(high,   row, at + offsetof(block_q6_K, qh) + 32 * n + 16 * p);
        __m256i * q = tile->q + 32 * n + 4 * p;
        for (int i = 0; i < 4; i++) {
            q[i]      = _mm256_or_si256(nibble(low[i], 0),    bits(high[i], 4, 48));
            q[i + 8]  = _mm256_or_si256(nibble(middle[i], 0), bits(high[i], 2, 48));
            q[i + 16] = _mm256_or_si256(nibble(low[i], 4),    bits(high[i], 0, 48));
            q[i + 24] = _mm256_or_si256(nibble(middle[i], 4), bits(high[i], -2, 48));
        }
    }
}

INLINE void unpack_q8_0(struct tile * tile, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q8_0);
    transpose(tile->sign,     row, at + offsetof(block_q8_0, qs));
    transpose(tile->sign + 4, row, at + offsetof(block_q8_0, qs) + 16);
    for (int i = 0; i < 8; i++) {
        tile->q[i] = _mm256_abs_epi8(tile->sign[i]);
    }
    tile->scale[0] = _mm256_set1_epi16(1);
    tile->d        = halves(row, at + offsetof(block_q8_0, d));
}

// q counts from -8.
INLINE void unpack_q4_0(struct tile * tile, const char * const row[GROUP], int64_t b) {
    const size_t at = (size_t) b * sizeof(block_q4_0);
    __m256i packed[4];
    transpose(packed, row, at + offsetof(block_q4_0, qs));
    for (int i = 0; i < 4; i++) {
        tile->q[i]     = nibble(packed[i], 0);
        tile->q[i + 4] = nibble(packed[i], 4);
    }
    tile->scale[0] = _mm256_set1_epi16(1);
    tile->min[0]   = _mm256_set1_epi16(8);
    tile->d        = halves(row, at + offsetof(block_q4_0, d));
}

// --- a single row of x, for formats whose transposition costs more than it saves ------------------------------------

// Lane r: the sum of the lanes of in[r].
INLINE __m256i lane_sums(const __m256i in[GROUP]) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(in[0], in[1]), _mm256_hadd_epi32(in[2], in[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(in[4], in[5]), _mm256_hadd_epi32(in[6], in[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

INLINE __m256i loaded(const void * bytes) {
    return _mm256_loadu_si256((const __m256i *) bytes);
}

INLINE __m256i dot_q8_0(const char * block, const int8_t * x, const int16_t * sums) {
    (void) sums;
    const __m256i w = loaded(block + offsetof(block_q8_0, qs));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(loaded(x), w)), _mm256_set1_epi16(1));
}

INLINE __m256i dot_q6_k(const char * block, const int8_t * x, const int16_t * sums) {
    const __m128i bytes  = _mm_loadu_si128((const __m128i *) (block + offsetof(block_q6_K, scales)));
    const __m256i scales = _mm256_broadcastsi128_si256(bytes);
    const __m256i low    = _mm256_set1_epi16(0x0080), one = _mm256_set1_epi16(0x0100);
    __m256i which = _mm256_or_si256(low, _mm256_set_m128i(_mm_set1_epi16(0x0100), _mm_setzero_si128()));
    __m256i total = _mm256_madd_epi16(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 5), loaded(sums));
    total = _mm256_sub_epi32(_mm256_setzero_si256(), total);
    for (int half = 0; half < 2; half++) {
        const __m256i a = loaded(block + 64 * half), b = loaded(block + 64 * half + 32);
        const __m256i high = loaded(block + offsetof(block_q6_K, qh) + 32 * half);
        const __m256i q[4] = {
            _mm256_or_si256(nibble(a, 0), bits(high, 4, 48)), _mm256_or_si256(nibble(b, 0), bits(high, 2, 48)),
            _mm256_or_si256(nibble(a, 4), bits(high, 0, 48)), _mm256_or_si256(nibble(b, 4), bits(high, -2, 48)),
        };
        for (int i = 0; i < 4; i++) {
            const __m256i scale = _mm256_srai_epi16(_mm256_shuffle_epi8(scales, which), 8);
            which = _mm256_add_epi16(which, _mm256_add_epi16(one, one));
            total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(q[i], loaded(x + 128 * half + 32 * i)), scale));
        }
    }
    return total;
}

// --- the product -------------------------------------------------------------------------------------------------

struct format {
    void    (*unpack)(struct tile *, const char * const *, int64_t);
    __m256i (*dot)(const char *, const int8_t *, const int16_t *);  // or NULL: a single row of x is unpacked for, too
    int  steps;         // in a block
    int  run;           // steps that 16 bits hold: 2 * 127 * largest q * run < 2^15
    int  per_scale;     // steps
    int  minima;        // registers of them
    int  sum_of;        // values of x that share a minimum
    bool is_signed;
    bool has_dmin;      // minima have a scale of their own
    size_t bytes, d;    // size of a block, offset of its scale (for dot)
};

INLINE __m256i repeated(const void * four_bytes) {
    int32_t value;
    memcpy(&value, four_bytes, sizeof(value));
    return _mm256_set1_epi32(value);
}

// acc[i] += block b of the tile's rows times that of row t + i of x, for n rows.
INLINE void add_block(struct format f, const struct tile * tile, const struct activations * x, int64_t b, int64_t t, int n,
                      __m256 * acc) {
    const int8_t *  q    = x->q + t * x->K + b * x->block;
    const int16_t * sums = x->sums + (t * x->K + b * x->block) / f.sum_of;
    __m256i total[4], run[4];
    for (int i = 0; i < n; i++) {
        total[i] = _mm256_setzero_si256();
        for (int j = 0; j < f.minima; j++) {
            total[i] = _mm256_sub_epi32(total[i], _mm256_madd_epi16(tile->min[j], repeated(sums + i * (x->K / f.sum_of) + 2 * j)));
        }
        if (f.has_dmin) {
            const __m256 scale = _mm256_mul_ps(tile->dmin, _mm256_set1_ps(x->scale[(t + i) * (x->K / x->block) + b]));
            acc[i]   = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(total[i]), acc[i]);
            total[i] = _mm256_setzero_si256();
        }
    }
    for (int s = 0; s < f.steps; s += f.run) {
#pragma GCC unroll 8
        for (int r = s; r < s + f.run; r++) {
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                __m256i four = repeated(q + i * x->K + 4 * r);
                four   = _mm256_maddubs_epi16(tile->q[r], f.is_signed ? _mm256_sign_epi8(four, tile->sign[r]) : four);
                run[i] = r == s ? four : _mm256_add_epi16(run[i], four);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            total[i] = _mm256_add_epi32(total[i], _mm256_madd_epi16(run[i], tile->scale[s / f.per_scale]));
        }
    }
    for (int i = 0; i < n; i++) {
        const __m256 scale = _mm256_mul_ps(tile->d, _mm256_set1_ps(x->scale[(t + i) * (x->K / x->block) + b]));
        acc[i] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(total[i]), acc[i]);
    }
}

// The rows of a group; past the end, the last one again.
INLINE void group_rows(const char * row[GROUP], const struct ggml_tensor * dst, int64_t m, int64_t end) {
    for (int r = 0; r < GROUP; r++) {
        row[r] = w_row(dst, m + r < end ? m + r : end - 1);
    }
}

INLINE void store_group(const struct ggml_tensor * dst, int64_t t, int64_t m, int64_t end, __m256 values) {
    float * result = result_row(dst, t) + m;
    if (end - m >= GROUP) {
        _mm256_storeu_ps(result, values);
    } else {
        memcpy(result, &values, (size_t) (end - m) * sizeof(float));
    }
}

// A single row of x, by the format's own dot product.
INLINE void multiply_one(struct format f, const struct activations * x, const struct ggml_tensor * dst, int64_t begin,
                         int64_t end) {
    for (int64_t m = begin; m < end; m += GROUP) {
        const char * row[GROUP];
        group_rows(row, dst, m, end);
        __m256 acc = _mm256_setzero_ps();
        for (int64_t b = 0; b < x->K / x->block; b++) {
            const size_t at = (size_t) b * f.bytes;
            __m256i total[GROUP];
            for (int r = 0; r < GROUP; r++) {
                total[r] = f.dot(row[r] + at, x->q + b * x->block, x->sums + b * (x->block / f.sum_of));
            }
            const __m256 scale = _mm256_mul_ps(halves(row, at + f.d), _mm256_set1_ps(x->scale[b]));
            acc = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(lane_sums(total)), acc);
        }
        store_group(dst, 0, m, end, acc);
    }
}

INLINE void multiply(struct format f, const struct ggml_tensor * dst, int64_t begin, int64_t end) {
    const struct activations x = round_rows(dst, 4 * f.steps, f.sum_of);
    if (f.dot && x.T == 1) {
        multiply_one(f, &x, dst, begin, end);
        return;
    }
    for (int64_t m = begin; m < end; m += GROUP) {
        const char * row[GROUP];
        group_rows(row, dst, m, end);
        __m256      acc[MAX_ROWS];
        struct tile tile;
        for (int64_t t = 0; t < x.T; t++) {
            acc[t] = _mm256_setzero_ps();
        }
        for (int64_t b = 0; b < x.K / x.block; b++) {
            f.unpack(&tile, row, b);
            int64_t t = 0;
            for (; t + 4 <= x.T; t += 4) {
                add_block(f, &tile, &x, b, t, 4, acc + t);
            }
            for (; t + 2 <= x.T; t += 2) {
                add_block(f, &tile, &x, b, t, 2, acc + t);
            }
            for (; t < x.T; t++) {
                add_block(f, &tile, &x, b, t, 1, acc + t);
            }
        }
        for (int64_t t = 0; t < x.T; t++) {
            store_group(dst, t, m, end, acc[t]);
        }
    }
}
// One copy of the code for each format, so that everything in it is a constant.
#define FORMAT(name, ...)                                                                             \
    static void multiply_##name(const struct ggml_tensor * dst, int64_t begin, int64_t end) {         \
        multiply((struct format) __VA_ARGS__, dst, begin, end);                                       \
    }
FORMAT(q4_k, { unpack_q4_k, NULL,     64, 8, 8, 4, 32, false, true,  0, 0 })
FORMAT(q5_k, { unpack_q5_k, NULL,     64, 4, 8, 4, 32, false, true,  0, 0 })
FORMAT(q6_k, { unpack_q6_k, dot_q6_k, 64, 2, 4, 8, 16, false, false, sizeof(block_q6_K), offsetof(block_q6_K, d) })
FORMAT(q8_0, { unpack_q8_0, dot_q8_0,  8, 1, 8, 0, 16, true,  false, sizeof(block_q8_0), offsetof(block_q8_0, d) })
FORMAT(q4_0, { unpack_q4_0, NULL,      8, 8, 8, 1, 16, false, false, 0, 0 })
#endif

void pydflash_linear_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    int64_t begin, end;
    pydflash_share(dst->src[1]->ne[1], ith, nth, &begin, &end);
    if (begin == end) {
        return;
    }
    switch (dst->src[1]->type) {
#ifdef FAST_PRODUCTS
        case GGML_TYPE_Q4_K: multiply_q4_k(dst, begin, end); break;
        case GGML_TYPE_Q5_K: multiply_q5_k(dst, begin, end); break;
        case GGML_TYPE_Q6_K: multiply_q6_k(dst, begin, end); break;
        case GGML_TYPE_Q8_0: multiply_q8_0(dst, begin, end); break;
        case GGML_TYPE_Q4_0: multiply_q4_0(dst, begin, end); break;
#endif
        default: multiply_any(dst, begin, end);
    }
}
