// rope: the rotary embedding of the first `dims` values of each head, plain, with linear scaling or with YaRN.
//
//   plain[i]     = float32(base^(-2i/dims))                          the power in double precision; i < dims/2
//   kept[i]      = 1 for i < low, 0 for i >= high, (high - i) / (high - low) between
//   frequency[i] = float32(plain[i] * (kept[i] + (1 - kept[i]) / factor))
//   angle[t, i]  = float32(position[t]) * frequency[i]               rounded once, to float32
//   y = x with (x[i], x[i + dims/2]) turned by angle[t, i] and multiplied by `magnitude`
//                                                                    NEOX pairs; values from dims on are copied
//
//   src[0]   x           (T, H, D) f32; D at most 256; the last axis contiguous, other axes strided
//   src[1]   positions   (T,) int32, magnitudes below 2^24
//   params   [0] dims: even, 2..D   [1] base (float)   [2] factor (float): at least 1
//            [3] low | high << 16, low <= high: both 0 for linear scaling   [4] magnitude (float)
//   result   (T, H, D) f32 contiguous
//
// With a factor and a magnitude of 1 the frequencies are the plain ones, bit by bit, whatever low and high are.
//
// The angles are those of the models' reference implementation, which rounds in these two places: a model is trained on
// them, and rounding elsewhere gives far positions other angles, as ggml's own RoPE does: on the CPU it multiplies its
// way from pair to pair, on CUDA it takes a fast power, cosine and sine. At position 262,143 they are off by some
// hundredths of a radian and by more than a tenth (docs/log.md, "RoPE at far positions"). Here cosines and sines of
// the angles are within 1e-7 of the true ones on both devices, up to an angle of 2^20; up to 2^24 within 1e-5.
//
// A row's result does not depend on T nor on the rows beside it. norm_rope and store_kv turn heads with the same code.
//
// Sources: Su et al. 2021 (arXiv:2104.09864), in GPT-NeoX's order of pairs; linear scaling: Chen et al. 2023
// (arXiv:2306.15595); YaRN: Peng et al. 2023 (arXiv:2309.00071), its ramp over pairs as in the authors' code.
#pragma once

#include "ext.h"

#include <math.h>

#ifdef __cplusplus
extern "C" {
#endif

// The parameters above, which begin those of norm_rope and store_kv too.
#define PYDFLASH_ROPE_PARAMS 5
struct pydflash_rope_params {
    int32_t dims, low, high;
    float   base, factor, magnitude;
};

// Inline, as is the next one, because the binding and ggml-cuda share no objects.
static inline struct pydflash_rope_params pydflash_rope_params_of(const struct ggml_tensor * node) {
    const uint32_t kept = (uint32_t) pydflash_node_params(node)[3];
    struct pydflash_rope_params p;
    p.dims      = pydflash_node_params(node)[0];
    p.low       = (int32_t) (kept & 0xffff);
    p.high      = (int32_t) (kept >> 16);
    p.base      = pydflash_node_param_f32(node, 1);
    p.factor    = pydflash_node_param_f32(node, 2);
    p.magnitude = pydflash_node_param_f32(node, 4);
    return p;
}

// The frequencies of dims/2 pairs.
static inline void pydflash_rope_frequencies(float * frequencies, struct pydflash_rope_params p) {
    for (int i = 0; i < p.dims / 2; i++) {
        const float  plain = (float) pow((double) p.base, -2.0 * i / p.dims);
        const double kept  = i < p.low ? 1.0 : i >= p.high ? 0.0 : (double) (p.high - i) / (p.high - p.low);
        frequencies[i] = (float) (plain * (kept + (1.0 - kept) / p.factor));
    }
}

// The rotary embedding at one position; cosines and sines have the magnitude in them.
struct pydflash_rope {
    struct pydflash_rope_params params;
    int32_t position;
    float   frequencies[PYDFLASH_MAX_HEAD / 2];
    float   cosines[PYDFLASH_MAX_HEAD / 2];
    float   sines[PYDFLASH_MAX_HEAD / 2];
};

// Starts at position 0, as `node` says: a rope, norm_rope or store_kv.
void pydflash_rope_init(struct pydflash_rope * rope, const struct ggml_tensor * node);

// Goes to another position; costs nothing when it is there already.
void pydflash_rope_move(struct pydflash_rope * rope, int32_t position);

// Turns the pairs of one head in place.
void pydflash_rope_turn(const struct pydflash_rope * rope, float * head);

#ifdef __cplusplus
}
#endif
