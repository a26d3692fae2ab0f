// norm_rope: what a query head goes through before attention: RMS norm, rotary embedding, rotation into K's basis.
//
//   n = x / sqrt(mean(x^2) + eps) * weight                                  over the D values of one head
//   r = rope(n, positions)                                                  as rope.h states it
//   y = turbo_wht(r, group, signs)                                          when group is not 0 (turbo_wht.h, forward)
//
//   src[0]   x           (T, H, D) f32; D is 64, 128 or 256; the last axis contiguous, other axes strided
//   src[1]   weight      (D,) f32
//   src[2]   positions   (T,) int32
//   src[3]   signs       (2, group) f32; optional
//   params   [0..4] those of rope   [5] eps (float)   [6] group: 0, or 64, 128 or 256 dividing D
//   result   (T, H, D) f32 contiguous
//
// The result has the bits of the norm (rms_norm on the CPU, ggml's rms_norm and mul on CUDA) followed by rope and
// turbo_wht: the same sums in the same order. So a row's result does not depend on T nor on the rows beside it.
#pragma once

#include "rope.h"

#ifdef __cplusplus
extern "C" {
#endif

// What norm_rope does to one head at one position, and store_kv to one of K.
struct pydflash_head {
    const float * weight;
    const float * signs;  // or NULL
    float         eps;
    int32_t       size, group;
    struct pydflash_rope rope;
};

// y = norm, RoPE and rotation of x, `size` contiguous values each; they may be the same array.
void pydflash_head_apply(const struct pydflash_head * head, const float * x, float * y);

#ifdef __cplusplus
}
#endif
