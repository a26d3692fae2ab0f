#include "norm_rope.h"

#include "rms_norm.h"
#include "turbo_wht.h"

void pydflash_head_apply(const struct pydflash_head * head, const float * x, float * y) {
    pydflash_rms_norm_row(y, x, head->weight, head->size, head->eps);
    pydflash_rope_turn(&head->rope, y);
    for (int i = 0; head->group && i < head->size; i += head->group) {
        pydflash_rotate(y + i, head->group, head->signs, 0);
    }
}

void pydflash_norm_rope_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const int32_t * positions    = (const int32_t *) dst->src[2]->data;
    struct pydflash_head head = {
        .weight = (const float *) dst->src[1]->data,
        .signs  = dst->src[3] ? (const float *) dst->src[3]->data : NULL,
        .eps    = pydflash_node_param_f32(dst, PYDFLASH_ROPE_PARAMS),
        .group  = pydflash_node_params(dst)[PYDFLASH_ROPE_PARAMS + 1],
        .size   = (int32_t) x->ne[0],
    };
    pydflash_rope_init(&head.rope, dst);
    int64_t begin, end;
    pydflash_share(x->ne[1] * x->ne[2], ith, nth, &begin, &end);
    for (int64_t item = begin; item < end; item++) {
        const int64_t h = item % x->ne[1];
        const int64_t t = item / x->ne[1];
        pydflash_rope_move(&head.rope, positions[t]);
        const char * from = (const char *) x->data + h * x->nb[1] + t * x->nb[2];
        pydflash_head_apply(&head, (const float *) from, (float *) dst->data + item * x->ne[0]);
    }
}
