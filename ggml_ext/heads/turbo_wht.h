// turbo_wht: the Walsh-Hadamard rotation of groups of the last axis, with optional sign vectors.
//
//   forward   y = D2 (H / sqrt(n)) D1 x          inverse   x = D1 (H / sqrt(n)) D2 y
//
// H is the n x n Hadamard matrix in natural (Sylvester) order, H[i][j] = (-1)^popcount(i & j); it is symmetric and
// (H / sqrt(n))^2 = I, so both directions are orthonormal and undo each other. Without sign vectors D1 = D2 = I and
// the two directions are the same map.
//
//   src[0]   x       (..., columns) f32; the last axis contiguous, other axes strided; columns % n == 0
//   src[1]   signs   (2, n) f32, rows D1 and D2, each entry +1 or -1; optional
//   params   [0] n: 64, 128 or 256   [1] inverse: 0 or 1
//   result   f32, the shape of x, contiguous
//
// Source of the signed form: the op of the same name in public ggml forks; the plain form is llama.cpp's K/V rotation.
#pragma once

#include "ext.h"

#ifdef __cplusplus
extern "C" {
#endif

// One group of n values in place; `signs` holds D1 and D2, or is NULL.
void pydflash_rotate(float * x, int n, const float * signs, int inverse);

#ifdef __cplusplus
}
#endif
