// rope: the rotary embedding of the first `dims` values of each head.
//
//   frequency[i] = float32(base^(-2i/dims))                          the power in double precision; i < dims/2
//   angle[t, i]  = float32(position[t]) * frequency[i]               rounded once, to float32
//   y = x with (x[i], x[i + dims/2]) turned by angle[t, i]           NEOX pairs; values from dims on are copied
//
//   src[0]   x           (T, H, D) f32; D at most 256; the last axis contiguous, other axes strided
//   src[1]   positions   (T,) int32, magnitudes below 2^24
//   params   [0] dims: even, 2..D   [1] base (float)
//   result   (T, H, D) f32 contiguous
//
// The angles are those of the models' reference implementation, which rounds in these two places: a model is trained on
// them, and rounding elsewhere gives far positions other angles, as ggml's own RoPE does: on the CPU it multiplies its
// way from pair to pair, on CUDA it takes a fast power, cosine and sine. At position 262,143 they are off by some
// hundredths of a radian and by more than a tenth (docs/log.md, "RoPE at far positions"). Here cosines and sines of
// the angles are within 1e-7 of the true ones on both devices, up to an angle of 2^20; up to 2^24 within 1e-5.
//
// A row's result does not depend on T nor on the rows beside it. norm_rope and store_kv turn heads with the same code.
//
// Source: Su et al. 2021 (arXiv:2104.09864), in GPT-NeoX's order of pairs.
#pragma once

#include "ext.h"

#include <math.h>

#ifdef __cplusplus
extern "C" {
#endif

// The frequencies of dims/2 pairs. Inline, because the binding and ggml-cuda share no objects.
static inline void pydflash_rope_frequencies(float * frequencies, int dims, float base) {
    for (int i = 0; i < dims / 2; i++) {
        frequencies[i] = (float) pow((double) base, -2.0 * i / dims);
    }
}

// The rotary embedding at one position.
struct pydflash_rope {
    int32_t dims, position;
    float   frequencies[PYDFLASH_MAX_HEAD / 2];
    float   cosines[PYDFLASH_MAX_HEAD / 2];
    float   sines[PYDFLASH_MAX_HEAD / 2];
};

// Starts at position 0.
void pydflash_rope_init(struct pydflash_rope * rope, int dims, float base);

// Goes to another position; costs nothing when it is there already.
void pydflash_rope_move(struct pydflash_rope * rope, int32_t position);

// Turns the pairs of one head in place.
void pydflash_rope_turn(const struct pydflash_rope * rope, float * head);

#ifdef __cplusplus
}
#endif
