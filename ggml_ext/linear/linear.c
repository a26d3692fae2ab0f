#include "linear.h"

#include "ggml-cpu.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

// A weight is unpacked once for all rows of x, and a result never depends on how many those are: the sums of integer
// products are exact in any order, and every (weight row, x row) has a float accumulator of its own, which takes one
// multiply-add per block in the order of the blocks. x is rounded to 8 bits as ggml rounds it.
//
// Work goes in tiles of eight weight rows (sixteen with AVX-512), one to a 32-bit lane. A step is four consecutive k of
// these rows: one register of unsigned bytes, multiplied with four bytes of x that are repeated in every lane. Products
// are summed in 16 bits for as many steps as cannot overflow, then in 32 bits, times the scale of the sub-block; CPUs
// with AVX512-VNNI take a step's products and sum them in 32 bits with one instruction. The transposition that this
// takes happens on the packed bits, 16 bytes of each row at a time. For a single row of x it pays
// only with Q4_0; with the other types the same integers come from a dot product along k.
//
// What bounds it: one row, unpacking and memory; many rows, the loads of x (two a cycle, each feeds 32 products) or,
// with VNNI, the multiplier (64 products a cycle; scales and minima add a fifth, with Q6_K a third). A Zen 3 core whose
// sibling is busy does 90e9 products a second at 16 rows of Q4_K, 30e9 at one (K = 1536, M = 256).
//
// Other types, and CPUs without AVX2, take ggml's dot product row by row.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FAST_PRODUCTS
#include "linear_cpu.h"
#endif

#define MAX_ROWS PYDFLASH_STEP_ROWS

static const char * w_row(const struct pydflash_product * p, int64_t m) {
    return p->w + (size_t) m * p->w_stride;
}

// --- any type: ggml's dot product --------------------------------------------------------------------------------

// Weight rows that one pass over the rows of x uses: they stay in the L2 cache while T rows stream past.
#define PASS 16

static void multiply_any(const struct pydflash_product * p, char * rows, int64_t begin, int64_t end) {
    const struct ggml_type_traits_cpu * traits     = ggml_get_type_traits_cpu(p->type);
    const ggml_from_float_t             from_float = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
    const int64_t K = p->K, T = p->T;
    const size_t  row_size = ggml_row_size(traits->vec_dot_type, K);
    for (int64_t t = 0; t < T; t++) {
        from_float(p->x[t], rows + (size_t) t * row_size, K);
    }
    for (int64_t pass = begin; pass < end; pass += PASS) {
        for (int64_t t = 0; t < T; t++) {
            for (int64_t m = pass; m < pass + PASS && m < end; m++) {
                // One row at a time (the last argument), always: the two-row kernels of some CPUs round differently.
                const char * row = rows + (size_t) t * row_size;
                traits->vec_dot((int) K, p->out[t] + m, 0, w_row(p, m), 0, row, 0, 1);
            }
        }
    }
}

#ifdef FAST_PRODUCTS

// --- x in 8 bits -------------------------------------------------------------------------------------------------

// T rows of K values: bytes, a scale for each block, and what the minima of the weights are multiplied with. All of it
// goes block by block, and row by row within a block: what is multiplied together lies at constant distances.
struct activations {
    int64_t   T, blocks;
    int8_t *  q;
    int16_t * sums;   // minus the sum of every sixteen (or 32), in blocks of 256
    int32_t * start;  // minus the sum times what q counts from, in blocks of 32
    float *   scale;
};

// The sums of four bytes.
INLINE __m256i fours(__m256i bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
}

// 32 values to the nearest integers, as bytes.
INLINE __m256i rounded(const float * values, float times) {
    __m256i part[4];
    for (int j = 0; j < 4; j++) {
        part[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_set1_ps(times), _mm256_loadu_ps(values + 8 * j)));
    }
    const __m256i low = _mm256_packs_epi32(part[0], part[1]), high = _mm256_packs_epi32(part[2], part[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the lanes of the packs
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}

INLINE __m256 magnitudes(const float * values) {
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), _mm256_loadu_ps(values));
}

INLINE float largest(__m256 of) {
    __m128 peak = _mm_max_ps(_mm256_extractf128_ps(of, 1), _mm256_castps256_ps128(of));
    peak = _mm_max_ps(peak, _mm_movehl_ps(peak, peak));
    return _mm_cvtss_f32(_mm_max_ss(peak, _mm_movehdup_ps(peak)));
}

// ggml's q8_0: 32 values, scale max|x|/127 kept as f16. Returns the scale. (ggml's own function costs a call for each
// block, and with few weight rows as much as the product.)
INLINE float round_q8_0(int8_t * q, int32_t * start, int from, const float * values) {
    __m256 peaks = magnitudes(values);
    for (int i = 8; i < QK8_0; i += 8) {
        peaks = _mm256_max_ps(peaks, magnitudes(values + i));
    }
    const float   peak  = largest(peaks);
    const __m256i bytes = rounded(values, peak != 0.0f ? 127.0f / peak : 0.0f);
    _mm256_storeu_si256((__m256i *) q, bytes);
    const __m256i sums = fours(bytes);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    *start = -from * _mm_cvtsi128_si32(sum);
    return _cvtsh_ss(_cvtss_sh(peak / 127.0f, 0));
}

// The value of the largest magnitude; the first of equals, for its sign.
static float peak_of(const float values[QK_K]) {
    __m256 highest = _mm256_loadu_ps(values), lowest = highest;
    for (int i = 8; i < QK_K; i += 8) {
        highest = _mm256_max_ps(highest, _mm256_loadu_ps(values + i));
        lowest  = _mm256_min_ps(lowest, _mm256_loadu_ps(values + i));
    }
    const float high = largest(highest), low = largest(_mm256_sub_ps(_mm256_setzero_ps(), lowest));
    if (high > low) {
        return high;
    }
    if (low > high) {
        return -low;
    }
    for (int i = 0; i < QK_K; i++) {
        if (fabsf(values[i]) == high) {
            return values[i];
        }
    }
    return NAN;  // one of the values is NaN
}

// Minus the sum of every sixteen (or 32) of 256 bytes: fours, eights, then halves and wholes of registers.
INLINE void add_up(int16_t * sums, int64_t sum_of, const int8_t * q) {
    __m256i part[2];
    for (int i = 0; i < 2; i++) {
        __m256i four[4];
        for (int j = 0; j < 4; j++) {
            four[j] = fours(_mm256_loadu_si256((const __m256i *) (q + 128 * i + 32 * j)));
        }
        part[i] = _mm256_hadd_epi32(_mm256_hadd_epi32(four[0], four[1]), _mm256_hadd_epi32(four[2], four[3]));
    }
    const __m256i minus = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_packs_epi32(part[0], part[1]));
    const __m128i low = _mm256_castsi256_si128(minus), high = _mm256_extracti128_si256(minus, 1);
    if (sum_of == 16) {
        _mm_storeu_si128((__m128i *) sums, _mm_unpacklo_epi16(low, high));
        _mm_storeu_si128((__m128i *) (sums + 8), _mm_unpackhi_epi16(low, high));
    } else {
        _mm_storeu_si128((__m128i *) sums, _mm_add_epi16(low, high));
    }
}

// ggml's q8_K: 256 values, scale such that the largest magnitude becomes -127. Returns the scale. (ggml's own function
// is scalar and takes as long as a small product.)
static float round_q8_k(int8_t * q, int16_t * sums, int64_t sum_of, const float * values) {
    const float peak = peak_of(values);
    if (peak == 0.0f) {
        memset(q, 0, QK_K);
        memset(sums, 0, (size_t) (QK_K / sum_of) * sizeof(*sums));
        return 0.0f;
    }
    const float inverse = -127.0f / peak;
    for (int i = 0; i < QK_K; i += 32) {
        _mm256_storeu_si256((__m256i *) (q + i), rounded(values + i, inverse));
    }
    add_up(sums, sum_of, q);
    return 1.0f / inverse;
}

INLINE struct activations round_rows(const struct pydflash_product * p, void * memory, int64_t block, int64_t sum_of,
                                     int from) {
    const int64_t T = p->T, blocks = p->K / block, all = T * blocks;
    struct activations x = { T, blocks, NULL, NULL, NULL, (float *) memory };
    x.start = (int32_t *) (x.scale + all);
    x.sums  = (int16_t *) (x.start + all);
    x.q     = (int8_t *) (x.sums + all * (block / sum_of));
    for (int64_t t = 0; t < T; t++) {
        const float * values = p->x[t];
        for (int64_t i = t; i < all; i += T, values += block) {
            if (block == QK8_0) {
                x.scale[i] = round_q8_0(x.q + i * block, x.start + i, from, values);
            } else {
                x.scale[i] = round_q8_k(x.q + i * block, x.sums + i * (block / sum_of), sum_of, values);
            }
        }
    }
    return x;
}

// --- the product -------------------------------------------------------------------------------------------------

struct format {
    void    (*unpack)(struct tile *, const char * const *, int64_t);
    __m256i (*dot)(const char *, const int8_t *, const int16_t *, __m256i *);  // or NULL: one row is unpacked for, too
    int  steps;         // in a block
    int  run;           // steps that 16 bits hold: 2 * 127 * largest q * run < 2^15
    int  per_scale;     // steps
    int  minima;        // registers of them
    int  sum_of;        // values of x that share a minimum
    int  from;          // q counts from minus this (blocks of 32)
    bool is_signed;
    bool has_scales;    // within a block
    bool has_dmin;      // minima have their own scale
    size_t bytes, d;    // size of a block, offset of its scale
};

INLINE wide repeated(const void * four_bytes) {
    int32_t value;
    memcpy(&value, four_bytes, sizeof(value));
    return WIDE(set1_epi32, value);
}

// acc[i] += block b of the tile's rows times that of row t + i of x, for n rows.
INLINE void add_block(struct format f, const struct tile * tile, const struct activations * x, int64_t b, int64_t t,
                      int n, wide_float * acc) {
    const int       block = 4 * f.steps, n_sums = block / f.sum_of;
    const int8_t *  q     = x->q + (b * x->T + t) * block;
    const int16_t * sums  = x->sums + (b * x->T + t) * n_sums;
    const int32_t * start = x->start + b * x->T + t;
    const float *   scale = x->scale + b * x->T + t;
    wide total[TOGETHER], run[TOGETHER];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        total[i] = f.from ? repeated(start + i) : WIDE(set1_epi32, 0);
        for (int j = 0; j < f.minima; j++) {
            total[i] = add_products(total[i], tile->min[j], repeated(sums + i * n_sums + 2 * j));
        }
        if (f.has_dmin) {
            const wide_float unit = WIDE(mul_ps, tile->dmin, WIDE(set1_ps, scale[i]));
            acc[i]   = WIDE(fmadd_ps, unit, WIDE(cvtepi32_ps, total[i]), acc[i]);
            total[i] = WIDE(set1_epi32, 0);
        }
    }
#ifdef DOT_OF_FOUR
    for (int s = 0; s < f.steps; s += f.per_scale) {
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            run[i] = f.has_scales ? WIDE(set1_epi32, 0) : total[i];
        }
#pragma GCC unroll 8
        for (int r = s; r < s + f.per_scale; r++) {
#pragma GCC unroll 8
            for (int i = 0; i < n; i++) {
                run[i] = WIDE(dpbusd_epi32, run[i], tile->q[r], repeated(q + i * block + 4 * r));
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const wide scaled = WIDE(mullo_epi32, run[i], tile->scale[s / f.per_scale]);
            total[i] = f.has_scales ? WIDE(add_epi32, total[i], scaled) : run[i];
        }
    }
#else
    for (int s = 0; s < f.steps; s += f.run) {
#pragma GCC unroll 8
        for (int r = s; r < s + f.run; r++) {
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                const wide four  = repeated(q + i * block + 4 * r);
                const wide right = f.is_signed ? WIDE(sign_epi8, four, tile->sign[r]) : four;
                const wide pairs = WIDE(maddubs_epi16, tile->q[r], right);
                run[i] = r == s ? pairs : WIDE(add_epi16, run[i], pairs);
                __asm__("" : "+x"(run[i]));  // compilers otherwise take all products first and run out of registers
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            total[i] = add_products(total[i], run[i], tile->scale[s / f.per_scale]);
        }
    }
#endif
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        const wide_float unit = WIDE(mul_ps, tile->d, WIDE(set1_ps, scale[i]));
        acc[i] = WIDE(fmadd_ps, unit, WIDE(cvtepi32_ps, total[i]), acc[i]);
    }
}

// `count` rows from m on; past the end, the last one again.
INLINE void take_rows(const char ** row, int count, const struct pydflash_product * p, int64_t m, int64_t end) {
    for (int r = 0; r < count; r++) {
        row[r] = w_row(p, m + r < end ? m + r : end - 1);
    }
}

// Prefetches a piece of the rows `ahead` of these into the L2 cache. The CPU's own prefetcher does not follow eight or
// sixteen rows at once. Without this, and with weights that other work has driven out of the caches, a single row of x
// takes nearly twice as long, and sixteen take 1.5 times (K-quants) to 1.9 times (Q8_0).
INLINE void fetch(const struct pydflash_product * p, const char * const * row, int count, int ahead, size_t at,
                  size_t bytes) {
    const size_t begin = at + (size_t) ahead * p->w_stride;
    for (int r = 0; r < count; r++) {
        for (size_t line = 0; line < bytes; line += 64) {
            _mm_prefetch(row[r] + begin + line, _MM_HINT_T1);
        }
    }
}

// Before all else: the first rows. (128 x 256 of Q8_0 with 8 rows of x: 3.6 to 2.9 us. With a single row of x it costs
// more than it gives: 91 to 102 us for 512 x 5120 of Q6_K.)
INLINE void fetch_first(const struct pydflash_product * p, int64_t begin, int64_t end) {
    const char * row[TILE_ROWS];
    const size_t bytes = p->w_stride;
    take_rows(row, TILE_ROWS, p, begin, end);
    fetch(p, row, TILE_ROWS, 0, 0, bytes < 512 ? bytes : 512);
}

INLINE void store_group(const struct pydflash_product * p, int64_t t, int64_t m, int64_t end, __m256 values) {
    float * result = p->out[t] + m;
    if (end - m >= GROUP) {
        _mm256_storeu_ps(result, values);
    } else {
        memcpy(result, &values, (size_t) (end - m) * sizeof(float));
    }
}

INLINE void store_tile(const struct pydflash_product * p, int64_t t, int64_t m, int64_t end, wide_float values) {
    float * result = p->out[t] + m;
    if (end - m >= TILE_ROWS) {
        WIDE(storeu_ps, result, values);
    } else {
        memcpy(result, &values, (size_t) (end - m) * sizeof(float));
    }
}

// Lane r: the sum of the lanes of in[r].
INLINE __m256i lane_sums(const __m256i in[GROUP]) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(in[0], in[1]), _mm256_hadd_epi32(in[2], in[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(in[4], in[5]), _mm256_hadd_epi32(in[6], in[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// A single row of x, by the format's own dot product.
INLINE void multiply_one(struct format f, const struct activations * x, const struct pydflash_product * p,
                         int64_t begin, int64_t end) {
    const int block = 4 * f.steps;
    for (int64_t m = begin; m < end; m += GROUP) {
        const char * row[GROUP];
        take_rows(row, GROUP, p, m, end);
        __m256 acc = _mm256_setzero_ps();
        for (int64_t b = 0; b < x->blocks; b++) {
            const size_t at = (size_t) b * f.bytes;
            fetch(p, row, GROUP, GROUP, at, f.bytes);
            __m256i total[GROUP], minima[GROUP];
            for (int r = 0; r < GROUP; r++) {
                total[r] = f.dot(row[r] + at, x->q + b * block, x->sums + b * (block / f.sum_of), &minima[r]);
            }
            if (f.has_dmin) {
                const __m256 unit = _mm256_mul_ps(halves(row, at + f.d + 2), _mm256_set1_ps(x->scale[b]));
                acc = _mm256_fmadd_ps(unit, _mm256_cvtepi32_ps(lane_sums(minima)), acc);
            }
            const __m256 unit = _mm256_mul_ps(halves(row, at + f.d), _mm256_set1_ps(x->scale[b]));
            acc = _mm256_fmadd_ps(unit, _mm256_cvtepi32_ps(lane_sums(total)), acc);
        }
        store_group(p, 0, m, end, acc);
    }
}

INLINE void multiply(struct format f, const struct pydflash_product * p, void * memory, int64_t begin, int64_t end) {
    const bool is_single = f.dot && p->T == 1;
    if (!is_single) {
        fetch_first(p, begin, end);
    }
    const struct activations x = round_rows(p, memory, 4 * f.steps, f.sum_of, f.from);
    if (is_single) {
        multiply_one(f, &x, p, begin, end);
        return;
    }
    for (int64_t m = begin; m < end; m += TILE_ROWS) {
        const char * row[TILE_ROWS];
        take_rows(row, TILE_ROWS, p, m, end);
        wide_float  acc[MAX_ROWS];
        struct tile tile;
        for (int64_t t = 0; t < x.T; t++) {
            acc[t] = WIDE(set1_ps, 0.0f);
        }
        for (int64_t b = 0; b < x.blocks; b++) {
            // In two bursts: all rows at once fill the queue of misses, and loads wait behind it.
            const size_t at = (size_t) b * f.bytes;
            fetch(p, row, TILE_ROWS / 2, TILE_ROWS, at, f.bytes);
            f.unpack(&tile, row, b);
            fetch(p, row + TILE_ROWS / 2, TILE_ROWS / 2, TILE_ROWS, at, f.bytes);
            int64_t t = 0;
            for (; t + TOGETHER <= x.T; t += TOGETHER) {
                add_block(f, &tile, &x, b, t, TOGETHER, acc + t);
            }
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
            store_tile(p, t, m, end, acc[t]);
        }
    }
}

// One copy of the code for each format, so that everything in it is a constant.
#define FORMAT(name, ...)                                                                                       \
    static void multiply_##name(const struct pydflash_product * p, void * memory, int64_t begin, int64_t end) { \
        multiply((struct format) __VA_ARGS__, p, memory, begin, end);                                           \
    }
FORMAT(q4_k, { unpack_q4_k, dot_q4_k, 64, 8, 8, 4, 32, 0, false, true,  true,  sizeof(block_q4_K), 0 })
FORMAT(q5_k, { unpack_q5_k, dot_q5_k, 64, 4, 8, 4, 32, 0, false, true,  true,  sizeof(block_q5_K), 0 })
FORMAT(q6_k, { unpack_q6_k, dot_q6_k, 64, 2, 4, 8, 16, 0, false, true,  false, sizeof(block_q6_K),
               offsetof(block_q6_K, d) })
FORMAT(q8_0, { unpack_q8_0, dot_q8_0,  8, 1, 8, 0, 32, Q8_0_FROM, !Q8_0_FROM, false, false, sizeof(block_q8_0),
               offsetof(block_q8_0, d) })
FORMAT(q4_0, { unpack_q4_0, NULL,      8, 8, 8, 0, 32, 8, false, false, false, sizeof(block_q4_0), 0 })

// --- f16, bf16 and f32 weights -----------------------------------------------------------------------------------

#define CHUNK 128  // k of eight rows that are converted at a time: 4 KiB, which stay in the L1 cache

INLINE __m256 load_f32(const char * at) {
    return _mm256_loadu_ps((const float *) at);
}

INLINE __m256 load_f16(const char * at) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) at));
}

INLINE __m256 load_bf16(const char * at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) at)), 16));
}

// The rows of x, rounded as ggml does for this weight type, in f32.
INLINE const float * round_floats(__m256 (*load)(const char *), const struct pydflash_product * p, void * memory) {
    const enum ggml_type    type       = p->type;
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(type)->from_float;
    const int64_t K = p->K, T = p->T;
    const size_t  size = ggml_type_size(type);
    float * rows    = (float *) memory;
    char *  rounded = (char *) (rows + T * K);
    for (int64_t t = 0; t < T; t++) {
        from_float(p->x[t], rounded, K);
        for (int64_t k = 0; k < K; k += GROUP) {
            _mm256_storeu_ps(rows + t * K + k, load(rounded + (size_t) k * size));
        }
    }
    return rows;
}

// sums[r] += w[r] * x over a chunk, row r starting at w + r * CHUNK / 8: lane l takes k = l, l + 8, ... in order.
INLINE void add_chunk(__m256 sums[GROUP], const __m256 * w, const float * x, int64_t count) {
    __m256 acc[GROUP];
    memcpy(acc, sums, sizeof(acc));
    for (int64_t i = 0; i < count / 8; i++) {
        const __m256 values = _mm256_loadu_ps(x + 8 * i);
#pragma GCC unroll 8
        for (int r = 0; r < GROUP; r++) {
            acc[r] = _mm256_fmadd_ps(w[r * (CHUNK / 8) + i], values, acc[r]);
        }
    }
    memcpy(sums, acc, sizeof(acc));
}

// The same over a whole row for the only row of x, which is not worth a conversion through memory.
INLINE void add_row(__m256 sums[GROUP], __m256 (*load)(const char *), const char * const row[GROUP], size_t size,
                    const float * x, int64_t K) {
    __m256 acc[GROUP];
    memcpy(acc, sums, sizeof(acc));
    for (int64_t k = 0; k < K; k += 8) {
        const __m256 values = _mm256_loadu_ps(x + k);
#pragma GCC unroll 8
        for (int r = 0; r < GROUP; r++) {
            acc[r] = _mm256_fmadd_ps(load(row[r] + (size_t) k * size), values, acc[r]);
        }
    }
    memcpy(sums, acc, sizeof(acc));
}

// Lane r: the sum of the lanes of in[r].
INLINE __m256 float_lane_sums(const __m256 in[GROUP]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(in[0], in[1]), _mm256_hadd_ps(in[2], in[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(in[4], in[5]), _mm256_hadd_ps(in[6], in[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

INLINE void multiply_floats(__m256 (*load)(const char *), const struct pydflash_product * p, void * memory,
                            int64_t begin, int64_t end) {
    const int64_t K = p->K, T = p->T;
    const size_t  size = ggml_type_size(p->type);
    const float * x    = round_floats(load, p, memory);
    for (int64_t m = begin; m < end; m += GROUP) {
        const char * row[GROUP];
        take_rows(row, GROUP, p, m, end);
        __m256 sums[MAX_ROWS][GROUP], w[GROUP][CHUNK / 8];
        memset(sums, 0, (size_t) T * sizeof(sums[0]));
        if (T == 1) {
            add_row(sums[0], load, row, size, x, K);
        }
        for (int64_t k = 0; T > 1 && k < K; k += CHUNK) {
            const int64_t count = K - k < CHUNK ? K - k : CHUNK;
            for (int r = 0; r < GROUP; r++) {
                for (int64_t i = 0; i < count / 8; i++) {
                    w[r][i] = load(row[r] + (size_t) (k + 8 * i) * size);
                }
            }
            for (int64_t t = 0; t < T; t++) {
                add_chunk(sums[t], &w[0][0], x + t * K + k, count);
            }
        }
        for (int64_t t = 0; t < T; t++) {
            store_group(p, t, m, end, float_lane_sums(sums[t]));
        }
    }
}

static void multiply_f32(const struct pydflash_product * p, void * memory, int64_t begin, int64_t end) {
    multiply_floats(load_f32, p, memory, begin, end);
}

static void multiply_f16(const struct pydflash_product * p, void * memory, int64_t begin, int64_t end) {
    multiply_floats(load_f16, p, memory, begin, end);
}

static void multiply_bf16(const struct pydflash_product * p, void * memory, int64_t begin, int64_t end) {
    multiply_floats(load_bf16, p, memory, begin, end);
}

#endif

// Custom ops have no barrier, so every thread converts x for itself. Rows of f32 and one more are enough for every
// format: round_floats takes just that, a row in any 8-bit format is smaller.
size_t pydflash_multiply_scratch(int64_t T, int64_t K) {
    return (size_t) (T + 1) * (size_t) K * sizeof(float);
}

void pydflash_multiply(const struct pydflash_product * p, void * memory, int64_t begin, int64_t end) {
    if (begin == end) {
        return;
    }
    switch (p->type) {
#ifdef FAST_PRODUCTS
        case GGML_TYPE_Q4_K: multiply_q4_k(p, memory, begin, end); break;
        case GGML_TYPE_Q5_K: multiply_q5_k(p, memory, begin, end); break;
        case GGML_TYPE_Q6_K: multiply_q6_k(p, memory, begin, end); break;
        case GGML_TYPE_Q8_0: multiply_q8_0(p, memory, begin, end); break;
        case GGML_TYPE_Q4_0: multiply_q4_0(p, memory, begin, end); break;
        case GGML_TYPE_F16: multiply_f16(p, memory, begin, end); break;
        case GGML_TYPE_BF16: multiply_bf16(p, memory, begin, end); break;
        case GGML_TYPE_F32: multiply_f32(p, memory, begin, end); break;
#endif
        default: multiply_any(p, (char *) memory, begin, end);
    }
}

size_t pydflash_linear_scratch(const struct ggml_tensor * node) {
    return pydflash_multiply_scratch(node->ne[1], node->src[1]->ne[0]);
}

void pydflash_linear_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const struct ggml_tensor * w = dst->src[1];
    struct pydflash_product product = { w->type, w->ne[0], (const char *) w->data, w->nb[1], dst->ne[1], { 0 }, { 0 } };
    for (int64_t t = 0; t < product.T; t++) {
        product.x[t]   = (const float *) ((const char *) x->data + (size_t) t * x->nb[1]);
        product.out[t] = (float *) ((char *) dst->data + (size_t) t * dst->nb[1]);
    }
    int64_t begin, end;
    pydflash_share(w->ne[1], ith, nth, &begin, &end);
    pydflash_multiply(&product, pydflash_node_scratch(dst, ith), begin, end);
}
