#include "attention.h"

#include "ggml-cpu.h"

#include <assert.h>
#include <math.h>
#include <string.h>

// Slots scored before their values are added: large enough to hide the loop around the dot products, small enough that
// the scores stay in registers and the first-level cache.
#define BLOCK 64
#define MAX_HEAD 256

// Everything about one node that its (row, head) items share.
struct attention {
    const struct ggml_tensor * q;
    const struct ggml_tensor * k;
    const struct ggml_tensor * v;
    const int32_t *            positions;
    const int32_t *            slot_positions;  // NULL: slot s holds position s
    float                      scale;
    int32_t                    causal;
    int32_t                    window;
    int64_t                    group;           // query heads per key/value head
    int64_t                    columns;         // D
    ggml_vec_dot_t             dot;
    ggml_from_float_t          q_from_float;    // NULL: K is f32 and q is used as it is
    ggml_to_float_t            v_to_float;      // NULL: V is f32
};

// The converter in the type traits is scalar; this one uses the CPU's instructions.
static void f16_to_float(const void * restrict x, float * restrict y, int64_t n) {
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n);
}

static struct attention read_node(const struct ggml_tensor * dst) {
    const int32_t * params = pydflash_node_params(dst);
    struct attention a = {
        .q = dst->src[0], .k = dst->src[1], .v = dst->src[2],
        .positions      = (const int32_t *) dst->src[3]->data,
        .slot_positions = dst->src[4] ? (const int32_t *) dst->src[4]->data : NULL,
        .scale  = pydflash_node_param_f32(dst, 0),
        .causal = params[1],
        .window = params[2],
        .group   = dst->src[0]->ne[1] / params[3],
        .columns = dst->src[0]->ne[0],
    };
    const struct ggml_type_traits_cpu * k_traits = ggml_get_type_traits_cpu(a.k->type);
    a.dot          = k_traits->vec_dot;
    a.q_from_float = k_traits->vec_dot_type == GGML_TYPE_F32 ? NULL
                                                             : ggml_get_type_traits_cpu(k_traits->vec_dot_type)->from_float;
    a.v_to_float   = a.v->type == GGML_TYPE_F32 ? NULL
                   : a.v->type == GGML_TYPE_F16 ? f16_to_float : ggml_get_type_traits(a.v->type)->to_float;
    assert(a.columns <= MAX_HEAD);
    return a;
}

static void scale_row(float * restrict y, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) {
        y[i] *= factor;
    }
}

static void add_row(float * restrict y, const float * restrict x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) {
        y[i] += factor * x[i];
    }
}

// The online softmax of one (row, head): scores relative to `max`, their sum, and the sum of the values they weigh.
struct running {
    float max;
    float sum;
    float out[MAX_HEAD];
};

// Adds `count` visible slots to `r`. Their boundaries do not depend on T or P, since slots are taken in order.
static void add_slots(const struct attention * a, struct running * r, const void * q, int64_t kv_head,
                      const int64_t * slots, int count) {
    const char * k = (const char *) a->k->data + (size_t) kv_head * ggml_row_size(a->k->type, a->columns);
    const char * v = (const char *) a->v->data + (size_t) kv_head * ggml_row_size(a->v->type, a->columns);
    float scores[BLOCK];
    float max = r->max;
    for (int i = 0; i < count; i++) {
        a->dot((int) a->columns, &scores[i], 0, k + (size_t) slots[i] * a->k->nb[1], 0, q, 0, 1);
        scores[i] *= a->scale;
        max = scores[i] > max ? scores[i] : max;
    }
    if (max > r->max) {
        const float factor = expf(r->max - max);  // 0 the first time, when r->max is -infinity
        scale_row(r->out, a->columns, factor);
        r->sum *= factor;
        r->max = max;
    }
    float values[MAX_HEAD];
    for (int i = 0; i < count; i++) {
        const float  p   = expf(scores[i] - r->max);
        const void * row = v + (size_t) slots[i] * a->v->nb[1];
        if (a->v_to_float) {
            a->v_to_float(row, values, a->columns);
        }
        add_row(r->out, a->v_to_float ? values : (const float *) row, a->columns, p);
        r->sum += p;
    }
}

static void attend(const struct attention * a, int64_t row, int64_t head, float * out) {
    const struct pydflash_span span = pydflash_attention_span(a->positions[row], a->causal, a->window);

    const float * q = (const float *) ((const char *) a->q->data + row * (int64_t) a->q->nb[2] + head * (int64_t) a->q->nb[1]);
    float         converted[MAX_HEAD + 64];  // q as the dot product wants it; never wider than f32
    if (a->q_from_float) {
        a->q_from_float(q, converted, a->columns);
    }

    // Without slot positions the visible slots are one range; with them, each slot says.
    const int64_t slots = a->k->ne[1];
    const int64_t begin = a->slot_positions ? 0 : span.first;
    const int64_t end   = a->slot_positions ? slots : (int64_t) span.last + 1 < slots ? (int64_t) span.last + 1 : slots;

    struct running r = { .max = -INFINITY };
    int64_t        block[BLOCK];
    int            count = 0;
    for (int64_t slot = begin; slot < end; slot++) {
        if (a->slot_positions && (a->slot_positions[slot] < span.first || a->slot_positions[slot] > span.last)) {
            continue;
        }
        block[count++] = slot;
        if (count == BLOCK) {
            add_slots(a, &r, a->q_from_float ? (const void *) converted : q, head / a->group, block, count);
            count = 0;
        }
    }
    add_slots(a, &r, a->q_from_float ? (const void *) converted : q, head / a->group, block, count);

    const float inverse = r.sum > 0.0f || r.sum != r.sum ? 1.0f / r.sum : 0.0f;
    for (int64_t i = 0; i < a->columns; i++) {
        out[i] = r.out[i] * inverse;
    }
}

void pydflash_attention_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct attention a = read_node(dst);
    const int64_t rows  = a.q->ne[2];
    const int64_t heads = a.q->ne[1];

    // Items are ordered by head, so that the rows of one head find its keys and values in the cache; consecutive items
    // go to different threads because a causal row's cost grows with its position.
    for (int64_t item = ith; item < rows * heads; item += nth) {
        const int64_t head = item / rows;
        const int64_t row  = item % rows;
        attend(&a, row, head, (float *) dst->data + (row * heads + head) * a.columns);
    }
}
