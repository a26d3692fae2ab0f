#include "rope.h"

#include <string.h>

void pydflash_rope_init(struct pydflash_rope * rope, int dims, float base) {
    rope->dims     = dims;
    rope->position = 0;
    pydflash_rope_frequencies(rope->frequencies, dims, base);
    for (int i = 0; i < dims / 2; i++) {
        rope->cosines[i] = 1.0f;
        rope->sines[i]   = 0.0f;
    }
}

void pydflash_rope_move(struct pydflash_rope * rope, int32_t position) {
    if (position == rope->position) {
        return;
    }
    rope->position = position;
    for (int i = 0; i < rope->dims / 2; i++) {
        const float angle = (float) position * rope->frequencies[i];
        rope->cosines[i]  = cosf(angle);
        rope->sines[i]    = sinf(angle);
    }
}

void pydflash_rope_turn(const struct pydflash_rope * rope, float * head) {
    const int half = rope->dims / 2;
    for (int i = 0; i < half; i++) {
        const float c  = rope->cosines[i];
        const float s  = rope->sines[i];
        const float x0 = head[i];
        const float x1 = head[i + half];
        head[i]        = x0 * c - x1 * s;
        head[i + half] = x0 * s + x1 * c;
    }
}

void pydflash_rope_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const int32_t * positions    = (const int32_t *) dst->src[1]->data;
    struct pydflash_rope rope;
    pydflash_rope_init(&rope, pydflash_node_params(dst)[0], pydflash_node_param_f32(dst, 1));
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
