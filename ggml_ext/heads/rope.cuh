// The rotary embedding as rope, norm_rope and store_kv apply it: the angles and their cosines and sines, on CUDA.
//
// ggml-cuda is compiled with fast math: powf, cosf and sinf are approximations whose error grows with their argument,
// and the compiler may contract a product and a sum. So every rounding here is spelt out: the code gives the same bits
// in every kernel, and a float32 emulation gives them too.
#pragma once

#include "rope.h"

// Computed on the host and passed to a kernel by value.
struct rope_frequencies {
    int   dims;
    float magnitude;
    float of[PYDFLASH_MAX_HEAD / 2];
};

static inline rope_frequencies rope_frequencies_of(const ggml_tensor * node) {
    const pydflash_rope_params p = pydflash_rope_params_of(node);
    rope_frequencies f;
    f.dims      = p.dims;
    f.magnitude = p.magnitude;
    pydflash_rope_frequencies(f.of, p);
    return f;
}

// (cos, sin) of an angle, each within 1e-7 to |angle| = 2^20 and within 1e-5 to 2^24. Two fused steps take k quarter
// turns off it (Cody and Waite 1980); the Taylor series of what is left, an eighth of a turn at most but for the
// rounding of k, end where their next term is below 2^-28.
static __device__ __forceinline__ float2 cos_sin(float angle) {
    constexpr float QUARTER = 1.57079637f, REST = -4.37113900e-8f;  // pi/2 = QUARTER + REST + 2e-15
    const float k = rintf(__fmul_rn(angle, 0.636619772f));
    const float r = __fmaf_rn(-k, REST, __fmaf_rn(-k, QUARTER, angle));  // the inner one is exact
    const float s = __fmul_rn(r, r);

    float c = __fmaf_rn(s, -1.0f / 3628800, 1.0f / 40320);
    c = __fmaf_rn(c, s, -1.0f / 720);
    c = __fmaf_rn(c, s, 1.0f / 24);
    c = __fmaf_rn(c, s, -0.5f);
    c = __fmaf_rn(c, s, 1.0f);

    float d = __fmaf_rn(s, 1.0f / 362880, -1.0f / 5040);
    d = __fmaf_rn(d, s, 1.0f / 120);
    d = __fmaf_rn(d, s, -1.0f / 6);
    d = __fmaf_rn(__fmul_rn(d, s), r, r);

    const int   quadrant = __float2int_rn(k);
    const float x = quadrant & 1 ? d : c, y = quadrant & 1 ? c : d;
    return make_float2((quadrant + 1) & 2 ? -x : x, quadrant & 2 ? -y : y);
}

// What becomes of value i of a head, i < dims, at a position: v with its partner of the same pair.
static __device__ __forceinline__ float turn(float v, float partner, int i, int position, const rope_frequencies & f) {
    const int    half  = f.dims / 2;
    const bool   first = i < half;
    const float2 t     = cos_sin(__fmul_rn((float) position, f.of[first ? i : i - half]));
    const float  other = __fmul_rn(partner, __fmul_rn(t.y, f.magnitude));
    return __fmaf_rn(v, __fmul_rn(t.x, f.magnitude), first ? -other : other);
}
