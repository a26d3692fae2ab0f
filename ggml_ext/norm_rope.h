// norm_rope: what a query head goes through before attention: RMS norm, rotary embedding, rotation into K's basis.
//
//   n = x / sqrt(mean(x^2) + eps) * weight                                  over the D values of one head
//   r = n with (n[i], n[i + dims/2]) turned by position * base^(-2i/dims)   for i < dims/2 (NEOX pairs)
//   y = turbo_wht(r, group, signs)                                          when group is not 0 (turbo_wht.h, forward)
//
//   src[0]   x           (T, H, D) f32; D is 64, 128 or 256; the last axis contiguous, other axes strided
//   src[1]   weight      (D,) f32
//   src[2]   positions   (T,) int32
//   src[3]   signs       (2, group) f32; optional
//   params   [0] dims: even, 2..D   [1] base (float)   [2] eps (float)   [3] group: 0, or 64, 128 or 256 dividing D
//   result   (T, H, D) f32 contiguous
//
// The result has the bits of ggml's rms_norm, mul and rope_ext followed by our turbo_wht, on the CPU and on CUDA each:
// the same sums in the same order. So a row's result does not depend on T nor on the rows beside it.
//
// Source of the rotary embedding: Su et al. 2021 (arXiv:2104.09864), in GPT-NeoX's order of pairs.
#pragma once

#include "ext.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PYDFLASH_HEAD_MAX 256  // values of the largest head

// One head of norm_rope, with the cosines and sines of one position; what store_kv does to K as well.
struct pydflash_head {
    const float * weight;
    const float * signs;  // or NULL
    float         eps, base;
    int32_t       size, dims, group;
    int32_t       position;                      // of the angles below
    float         cosines[PYDFLASH_HEAD_MAX / 2];
    float         sines[PYDFLASH_HEAD_MAX / 2];
};

// Computes the angles of a position.
void pydflash_head_turn(struct pydflash_head * head, int32_t position);

// y = norm, RoPE and rotation of x, `size` contiguous values each; they may be the same array.
void pydflash_head_apply(const struct pydflash_head * head, const float * x, float * y);

void pydflash_norm_rope_cpu(struct ggml_tensor * dst, int ith, int nth, void * op);

#ifdef __cplusplus
}
#endif
