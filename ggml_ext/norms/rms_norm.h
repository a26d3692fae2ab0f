// rms_norm: the norm of whole rows, and the gated norm of a delta-net layer. For the CPU only.
//
//   y = x / sqrt(mean(x^2) + eps) * weight                  over the C values of a row
//   y = x / sqrt(mean(x^2) + eps) * weight * silu(z)        with src[2]
//
//   src[0]   x        (..., C) f32, up to four axes; the last axis contiguous, other axes strided
//   src[1]   weight   (C,) f32
//   src[2]   z        as x, with its own strides; optional
//   params   [0] eps (float)
//   result   x's shape, f32 contiguous
//
// On the CPU ggml runs its norm, the products and silu as separate nodes, and adds up the squares one by one. On
// CUDA those nodes are what ggml and fuse.cu fuse, so that this op has no kernel there and is refused.
//
// A row's result does not depend on the rows beside it. norm_rope and store_kv normalise heads with the same code.
//
// Source: Zhang & Sennrich 2019 (arXiv:1910.07467).
#pragma once

#include "ext.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = x / sqrt(mean(x^2) + eps) * weight, n contiguous values each; y may be x.
void pydflash_rms_norm_row(float * y, const float * x, const float * weight, int64_t n, float eps);

#ifdef __cplusplus
}
#endif
