// A register of floats, for the CPU references: as many lanes as the CPU the library is built for has. GCC and Clang
// translate the arithmetic of these vectors for any CPU. An op that is written in them rounds alike in every copy of
// its code: a multiply-add is one instruction where there is one, and sums have a fixed order.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef float four_lanes __attribute__((vector_size(16)));

#define LANES_INLINE static inline __attribute__((always_inline))

LANES_INLINE lanes load_lanes(const float * from) {
    lanes x;
    memcpy(&x, from, sizeof(x));
    return x;
}

LANES_INLINE void store_lanes(float * to, lanes x) {
    memcpy(to, &x, sizeof(x));
}

// The first n values, at most all lanes; other lanes are 0 and are not stored. So the end of a row that is not a whole
// number of registers takes the same path as the rest.
LANES_INLINE lanes load_first(const float * from, int64_t n) {
    lanes x = { 0 };
    if (n >= LANES) {
        return load_lanes(from);
    }
    if (n > 0) {
        memcpy(&x, from, (size_t) n * sizeof(float));
    }
    return x;
}

LANES_INLINE void store_first(float * to, int64_t n, lanes x) {
    if (n >= LANES) {
        store_lanes(to, x);
    } else if (n > 0) {
        memcpy(to, &x, (size_t) n * sizeof(float));
    }
}

LANES_INLINE lanes all_lanes(float value) {
    return value - (lanes) { 0 };
}

// a * b + c, rounded once where the CPU has such an instruction.
LANES_INLINE lanes multiply_add(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int i = 0; i < LANES; i++) {
#ifdef __FP_FAST_FMAF
        c[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
        c[i] += a[i] * b[i];
#endif
    }
    return c;
#endif
}

// Lanes i, i + 4, i + 8, ... added up, in pairs.
LANES_INLINE four_lanes fold_lanes(lanes x) {
    four_lanes part[LANES / 4];
    memcpy(part, &x, sizeof(x));
#pragma GCC unroll 2
    for (int n = LANES / 8; n > 0; n /= 2) {
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) {
            part[i] += part[i + n];
        }
    }
    return part[0];
}

LANES_INLINE float sum_lanes(lanes x) {
    const four_lanes f = fold_lanes(x);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

#if defined(__AVX512F__)
// [a, b] with the halves of each added up; then the same for quarters, and for lanes within quarters.
LANES_INLINE lanes add_halves(lanes a, lanes b) {
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
}

LANES_INLINE lanes add_quarters(lanes a, lanes b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

LANES_INLINE lanes add_pairs(lanes a, lanes b) {
    return _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
}

LANES_INLINE lanes add_neighbours(lanes a, lanes b) {
    return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
}
#endif

// sum_lanes of four registers.
LANES_INLINE four_lanes sum_four(const lanes x[4]) {
#if defined(__AVX512F__)
    const lanes fold  = add_quarters(add_halves(x[0], x[1]), add_halves(x[2], x[3]));
    const lanes pairs = fold + _mm512_permute_ps(fold, 0x4e);
    const lanes sum   = pairs + _mm512_permute_ps(pairs, 0xb1);
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sum));
#else
    const four_lanes a = fold_lanes(x[0]), b = fold_lanes(x[1]), c = fold_lanes(x[2]), d = fold_lanes(x[3]);
    const four_lanes f0 = { a[0], b[0], c[0], d[0] }, f1 = { a[1], b[1], c[1], d[1] };
    const four_lanes f2 = { a[2], b[2], c[2], d[2] }, f3 = { a[3], b[3], c[3], d[3] };
    return (f0 + f2) + (f1 + f3);
#endif
}

// sum_four of each of `count` groups, at most four: the same additions, but of sixteen registers at once.
LANES_INLINE void sum_fours(const lanes (*x)[4], int count, four_lanes * sums) {
#if defined(__AVX512F__)
    lanes all[4][4] = { 0 }, fold[4];
    memcpy(all, x, (size_t) count * sizeof(all[0]));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        fold[j] = add_quarters(add_halves(all[0][j], all[1][j]), add_halves(all[2][j], all[3][j]));
    }
    const lanes sum = add_neighbours(add_pairs(fold[0], fold[1]), add_pairs(fold[2], fold[3]));
    memcpy(sums, &sum, (size_t) count * sizeof(*sums));
#else
    for (int i = 0; i < count; i++) {
        sums[i] = sum_four(x[i]);
    }
#endif
}

// Lane by lane, a where `mask` (the result of a comparison) holds, else b.
LANES_INLINE lanes choose_lanes(int_lanes mask, lanes a, lanes b) {
    return (lanes) ((mask & (int_lanes) a) | (~mask & (int_lanes) b));
}

LANES_INLINE lanes larger_lanes(lanes a, lanes b) {
    return choose_lanes(a > b, a, b);
}

LANES_INLINE float largest_lane(lanes x) {
    four_lanes part[LANES / 4];
    memcpy(part, &x, sizeof(x));
#pragma GCC unroll 4
    for (int i = 1; i < LANES / 4; i++) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
            part[0][l] = part[i][l] > part[0][l] ? part[i][l] : part[0][l];
        }
    }
    const float a = part[0][0] > part[0][1] ? part[0][0] : part[0][1];
    const float b = part[0][2] > part[0][3] ? part[0][2] : part[0][3];
    return a > b ? a : b;
}

// 2^n * p for whole n, of which `shifted` holds the low bits; p = e^x / 2^n.
LANES_INLINE lanes scale_exp(lanes p, lanes n, lanes shifted, lanes x) {
#if defined(__AVX512F__)
    (void) shifted;
    (void) x;
    return _mm512_scalef_ps(p, n);
#else
    (void) n;
    const lanes power = (lanes) (((int_lanes) shifted << 23) + (int_lanes) all_lanes(1.0f));
    p = choose_lanes(x < -87.0f, all_lanes(0.0f), p * power);
    return choose_lanes(x > 88.0f, all_lanes(INFINITY), p);
#endif
}

// e^x to 1 ulp (0.88 where multiply-adds round once). 0 and infinity where float32 ends; without AVX-512, 0 below -87
// and infinity above 88 already.
//
// e^x = 2^n e^r with n = x / ln 2 rounded, so |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds: n then stands in the low bits
// of the sum. ln 2 is taken off in two parts, the first of which has few bits, so that its multiples are exact. The
// polynomial, 1 + r + r^2 (...), is e^r to a relative 3e-9 (fitted by weighted least squares).
LANES_INLINE lanes exp_lanes(lanes x) {
#if defined(__AVX512F__)
    x = _mm512_min_ps(all_lanes(104.0f), _mm512_max_ps(all_lanes(-104.0f), x));
#endif
    const lanes magic   = all_lanes(0x1.8p23f);
    const lanes shifted = multiply_add(x, all_lanes(0x1.715476p+0f), magic);
    const lanes n       = shifted - magic;
    const lanes r = multiply_add(n, all_lanes(0x1.bd0106p-13f), multiply_add(n, all_lanes(-0x1.63p-1f), x));
    lanes p = all_lanes(0x1.6a23cep-10f);
    p = multiply_add(p, r, all_lanes(0x1.123a2p-7f));
    p = multiply_add(p, r, all_lanes(0x1.5558f2p-5f));
    p = multiply_add(p, r, all_lanes(0x1.555492p-3f));
    p = multiply_add(p, r, all_lanes(0x1.fffffcp-2f));
    p = multiply_add(p, r, all_lanes(1.0f));
    p = multiply_add(p, r, all_lanes(1.0f));
    return scale_exp(p, n, shifted, x);
}

LANES_INLINE lanes sigmoid_lanes(lanes x) {
    return 1.0f / (1.0f + exp_lanes(-x));
}

LANES_INLINE lanes silu_lanes(lanes x) {
    return x / (1.0f + exp_lanes(-x));
}
