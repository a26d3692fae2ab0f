#include "store_kv.h"

#include "norm_rope.h"
#include "turbo_wht.h"

#include "ggml-cpu.h"

#include <string.h>

static const float * head_of(const struct ggml_tensor * x, int64_t t, int64_t h) {
    return (const float *) ((const char *) x->data + h * x->nb[1] + t * x->nb[2]);
}

// Writes the n values of head h to a row of a table, in the table's type; n is a whole number of its blocks.
static void put(const struct ggml_tensor * table, int64_t row, int64_t h, const float * values, int64_t n) {
    char * to = (char *) table->data + row * table->nb[1] + (size_t) h * ggml_row_size(table->type, n);
    if (table->type == GGML_TYPE_F32) {
        memcpy(to, values, (size_t) n * sizeof(float));
    } else {
        ggml_get_type_traits_cpu(table->type)->from_float(values, to, n);
    }
}

void pydflash_store_kv_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * k = dst->src[0];
    const struct ggml_tensor * v = dst->src[1];
    const int32_t * positions = (const int32_t *) dst->src[3]->data;
    const int32_t * rows      = (const int32_t *) dst->src[4]->data;
    const int       v_group   = pydflash_node_params(dst)[PYDFLASH_ROPE_PARAMS + 2];
    const int64_t   size      = k->ne[0];
    struct pydflash_head head = {
        .weight = (const float *) dst->src[2]->data,
        .signs  = dst->src[7] ? (const float *) dst->src[7]->data : NULL,
        .eps    = pydflash_node_param_f32(dst, PYDFLASH_ROPE_PARAMS),
        .group  = pydflash_node_params(dst)[PYDFLASH_ROPE_PARAMS + 1],
        .size   = (int32_t) size,
    };
    pydflash_rope_init(&head.rope, dst);
    float values[PYDFLASH_MAX_HEAD];
    int64_t begin, end;
    pydflash_share(k->ne[1] * k->ne[2], ith, nth, &begin, &end);
    for (int64_t item = begin; item < end; item++) {
        const int64_t h = item % k->ne[1];
        const int64_t t = item / k->ne[1];
        pydflash_rope_move(&head.rope, positions[t]);
        pydflash_head_apply(&head, head_of(k, t, h), values);
        put(dst->src[5], rows[t], h, values, size);

        memcpy(values, head_of(v, t, h), (size_t) size * sizeof(float));
        for (int64_t i = 0; v_group && i < size; i += v_group) {
            pydflash_rotate(values + i, v_group, NULL, 0);
        }
        put(dst->src[6], rows[t], h, values, size);
    }
}
