// linear: the product of a few activation rows with a weight matrix, each row independent of the others.
//
//   result[t][m] = sum over k of x[t][k] * W[m][k]
//
// A row of the result depends on that row of x and on W only: it is bit-equal for every T, whatever the other rows hold
// and however many threads or blocks share the work. That is what makes speculative decoding reproduce plain decoding,
// and what ggml's own products do not promise (they change kernels with T).
//
//   src[0]   x   (T, K) f32, rows contiguous; 1 <= T <= 64 on the CPU, 16 on CUDA
//   src[1]   W   (M, K) Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, F16, BF16 or F32, rows contiguous; K a multiple of the block of
//                the type and of 32
//   params       none
//   result   (T, M) f32, contiguous
//
// The CPU rounds a row of x as ggml does for the same weight type (to 8 bits for the quantised types); CUDA rounds it
// to f16, with one power-of-two scale for every 256 values. The two therefore agree up to that rounding, not to the
// bit.
#pragma once

#include "ext.h"

#ifdef __cplusplus
extern "C" {
#endif

// The product on the CPU, also for operations that are made of it: the rows of x and of the result may lie anywhere.
struct pydflash_product {
    enum ggml_type type;                      // of W
    int64_t        K;
    const char *   w;                         // row m at w + m * w_stride
    size_t         w_stride;
    int64_t        T;
    const float *  x[PYDFLASH_STEP_ROWS];
    float *        out[PYDFLASH_STEP_ROWS];  // value m of row t at out[t][m]
};

// Bytes of memory that a product of T rows of K values needs.
size_t pydflash_multiply_scratch(int64_t T, int64_t K);

// Values begin..end - 1 of every row of the result, in memory of that size, aligned as malloc aligns it.
void pydflash_multiply(const struct pydflash_product * product, void * memory, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
