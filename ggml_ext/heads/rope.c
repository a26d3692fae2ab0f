#include "rope.h"

#include <stdint.h>
#include <string.h>

// Powers in double precision cost more than turning a few heads, and the nodes of a model all ask for the same.
static const float * frequencies_of(const struct pydflash_rope_params * params) {
    static _Thread_local float frequencies[PYDFLASH_MAX_HEAD / 2];
    static _Thread_local struct pydflash_rope_params last;
    if (memcmp(params, &last, sizeof(last)) != 0) {
        pydflash_rope_frequencies(frequencies, *params);
        last = *params;
    }
    return frequencies;
}

// The cosine and the sine of a float32 angle below 2^24, to float32 precision. In double precision, where one step takes
// the angle to r in [-pi/4, pi/4] (its error is 3e-9 at 2^24) and Taylor's series to r^12 are good to 1e-11; without
// branches, so that compilers make vectors of it.
static inline void turn_of(float angle, float * cosine, float * sine) {
    const double quarters = (double) angle * 0x1.45f306dc9c883p-1 + 0x1.8p52;  // 2/pi; rounded into the low bits
    const double r  = (double) angle - (quarters - 0x1.8p52) * 0x1.921fb54442d18p+0;
    const double rr = r * r;
    const double s  = r * (1.0 + rr * (-1.0 / 6 + rr * (1.0 / 120 + rr * (-1.0 / 5040 + rr * (1.0 / 362880 +
                      rr * (-1.0 / 39916800))))));
    const double c  = 1.0 + rr * (-0.5 + rr * (1.0 / 24 + rr * (-1.0 / 720 + rr * (1.0 / 40320 + rr * (-1.0 / 3628800 +
                      rr * (1.0 / 479001600))))));
    const float float_s = (float) s, float_c = (float) c;
    uint64_t bits;
    uint32_t sin_bits, cos_bits;
    memcpy(&bits, &quarters, sizeof(bits));
    memcpy(&sin_bits, &float_s, sizeof(sin_bits));
    memcpy(&cos_bits, &float_c, sizeof(cos_bits));
    const uint32_t quarter = (uint32_t) bits & 3;
    const uint32_t swap    = (sin_bits ^ cos_bits) & (0u - (quarter & 1));  // an odd quarter swaps the two
    sin_bits ^= swap ^ (quarter & 2) << 30;                                 // and either may change its sign
    cos_bits ^= swap ^ ((quarter + 1) & 2) << 30;
    memcpy(sine, &sin_bits, sizeof(*sine));
    memcpy(cosine, &cos_bits, sizeof(*cosine));
}

void pydflash_rope_init(struct pydflash_rope * rope, const struct ggml_tensor * node) {
    rope->params   = pydflash_rope_params_of(node);
    rope->position = 0;
    const int half = rope->params.dims / 2;
    memcpy(rope->frequencies, frequencies_of(&rope->params), (size_t) half * sizeof(float));
    for (int i = 0; i < half; i++) {
        rope->cosines[i] = rope->params.magnitude;
        rope->sines[i]   = 0.0f;
    }
}

void pydflash_rope_move(struct pydflash_rope * rope, int32_t position) {
    if (position == rope->position) {
        return;
    }
    rope->position = position;
    const int   half      = rope->params.dims / 2;
    const float magnitude = rope->params.magnitude;
    for (int i = 0; i < half; i++) {
        float cosine, sine;
        turn_of((float) position * rope->frequencies[i], &cosine, &sine);
        rope->cosines[i] = cosine * magnitude;
        rope->sines[i]   = sine * magnitude;
    }
}

void pydflash_rope_turn(const struct pydflash_rope * rope, float * head) {
    const int half = rope->params.dims / 2;
    const float * restrict cosines = rope->cosines, * restrict sines = rope->sines;
    float * restrict first = head, * restrict second = head + half;
    for (int i = 0; i < half; i++) {
        const float x0 = first[i];
        const float x1 = second[i];
        first[i]  = x0 * cosines[i] - x1 * sines[i];
        second[i] = x0 * sines[i] + x1 * cosines[i];
    }
}

void pydflash_rope_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const int32_t * positions    = (const int32_t *) dst->src[1]->data;
    struct pydflash_rope rope;
    pydflash_rope_init(&rope, dst);
    int64_t begin, end;
    pydflash_share(x->ne[1] * x->ne[2], ith, nth, &begin, &end);
    for (int64_t item = begin; item < end; item++) {
        const int64_t h = item % x->ne[1];
        const int64_t t = item / x->ne[1];
        float *       y = (float *) dst->data + item * x->ne[0];
        memcpy(y, (const char *) x->data + h * x->nb[1] + t * x->nb[2], (size_t) x->ne[0] * sizeof(float));
        pydflash_rope_move(&rope, positions[t]);
        pydflash_rope_turn(&rope, y);
    }
}
