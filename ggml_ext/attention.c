#include "attention.h"

#include "ggml-cpu.h"
#include "lanes.h"
#include "vec.h"  // ggml_vec_soft_max_f32

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

// Slots are taken in aligned blocks of BLOCK: scores first, then values. Values, and keys of a float type, are
// converted to f32 once for up to BATCH (row, head) items of a key/value head. The block is cut at fixed slots, so an
// item's arithmetic is the same in any batch.
#define BLOCK 32
#define BATCH 96
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
    ggml_vec_dot_t             dot;             // NULL: keys are used as f32
    ggml_from_float_t          q_from_float;    // NULL: K is f32 and q is used as it is
    ggml_to_float_t            k_to_float;      // NULL: K is f32, or not used as such
    ggml_to_float_t            v_to_float;      // NULL: V is f32
};

// The converter in the type traits is scalar; this one uses the CPU's instructions.
static void f16_to_float(const void * restrict x, float * restrict y, int64_t n) {
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n);
}

static ggml_to_float_t to_float(enum ggml_type type) {
    return type == GGML_TYPE_F32 ? NULL : type == GGML_TYPE_F16 ? f16_to_float : ggml_get_type_traits(type)->to_float;
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
    a.dot          = ggml_is_quantized(a.k->type) ? k_traits->vec_dot : NULL;
    a.q_from_float = k_traits->vec_dot_type == GGML_TYPE_F32
                   ? NULL : ggml_get_type_traits_cpu(k_traits->vec_dot_type)->from_float;
    a.k_to_float   = a.dot ? NULL : to_float(a.k->type);
    a.v_to_float   = to_float(a.v->type);
    assert(a.columns <= MAX_HEAD);
    return a;
}

// One (row, head) with its online softmax: the sum of exp(score - max), and the values so weighed.
struct item {
    struct pydflash_span span;
    float *              dst;
    const void *         q;                          // as the dot product wants it
    float                max;
    float                sum;
    _Alignas(64) float   converted[MAX_HEAD + 64];   // holds q when it is not q itself; never wider than f32
    float                out[MAX_HEAD];
};

static void begin_item(const struct attention * a, struct item * item, int64_t row, int64_t head, float * dst) {
    const char * q = (const char *) a->q->data + (size_t) row * a->q->nb[2] + (size_t) head * a->q->nb[1];
    item->span = pydflash_attention_span(a->positions[row], a->causal, a->window);
    item->dst  = dst;
    item->q    = a->q_from_float ? (const void *) item->converted : q;
    item->max  = -INFINITY;
    item->sum  = 0.0f;
    memset(item->out, 0, sizeof(item->out));
    if (a->q_from_float && a->k_to_float) {  // q as it is after rounding to K's type
        char rounded[MAX_HEAD * sizeof(float)];
        a->q_from_float((const float *) q, rounded, a->columns);
        a->k_to_float(rounded, item->converted, a->columns);
    } else if (a->q_from_float) {
        a->q_from_float((const float *) q, item->converted, a->columns);
    }
}

static void end_item(const struct attention * a, const struct item * item) {
    const float inverse = item->sum == 0.0f ? 0.0f : 1.0f / item->sum;  // padding saw nothing
    for (int64_t i = 0; i < a->columns; i++) {
        item->dst[i] = item->out[i] * inverse;
    }
}

// One side of a block of the cache: where its slots start, and their f32 values once somebody needs them.
struct side {
    const char *       slots;
    size_t             stride;
    ggml_to_float_t    to_float;  // NULL: the slots hold f32
    bool               loaded[BLOCK];
    _Alignas(64) float values[BLOCK][MAX_HEAD];
};

struct block {
    int         count;
    int32_t     positions[BLOCK];
    struct side k, v;
};

static const char * head_slice(const struct ggml_tensor * cache, int64_t kv_head, int64_t columns, int64_t slot) {
    const size_t head = ggml_row_size(cache->type, columns);
    return (const char *) cache->data + (size_t) slot * cache->nb[1] + (size_t) kv_head * head;
}

static void begin_side(struct side * side, const struct ggml_tensor * cache, ggml_to_float_t to_float,
                       const char * slots) {
    side->slots    = slots;
    side->stride   = cache->nb[1];
    side->to_float = to_float;
    memset(side->loaded, 0, sizeof(side->loaded));
}

static void begin_block(const struct attention * a, struct block * block, int64_t kv_head, int64_t slot) {
    const int64_t left = a->k->ne[1] - slot;
    block->count = left < BLOCK ? (int) left : BLOCK;
    begin_side(&block->k, a->k, a->k_to_float, head_slice(a->k, kv_head, a->columns, slot));
    begin_side(&block->v, a->v, a->v_to_float, head_slice(a->v, kv_head, a->columns, slot));
    for (int i = 0; i < block->count; i++) {
        block->positions[i] = a->slot_positions ? a->slot_positions[slot + i] : (int32_t) slot + i;
    }
}

static const float * float_row(struct side * side, int64_t columns, int i) {
    const char * slot = side->slots + (size_t) i * side->stride;
    if (!side->to_float) {
        return (const float *) slot;
    }
    if (!side->loaded[i]) {
        side->to_float(slot, side->values[i], columns);
        side->loaded[i] = true;
    }
    return side->values[i];
}

// q times four keys.
static four_lanes dot_four(const float * q, const float * const key[4], int64_t columns) {
    lanes sum[4] = { 0 };
#pragma GCC unroll 1
    for (int64_t c = 0; c < columns; c += LANES) {
        const lanes x = load_lanes(q + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            sum[i] = multiply_add(x, load_lanes(key[i] + c), sum[i]);
        }
    }
    return sum_four(sum);
}

// scores[i] = q . key of slot seen[i]; up to three more are written.
static void score(const struct attention * a, const struct item * item, struct block * block, const int * seen, int count,
                  float * scores) {
    for (int i = 0; i < count && a->dot; i++) {
        const char * key = block->k.slots + (size_t) seen[i] * block->k.stride;
        a->dot((int) a->columns, &scores[i], 0, key, 0, item->q, 0, 1);
    }
    for (int i = 0; i < count && !a->dot; i += 4) {
        const float * key[4];
        for (int j = 0; j < 4; j++) {
            key[j] = float_row(&block->k, a->columns, seen[i + j < count ? i + j : i]);
        }
        const four_lanes four = dot_four((const float *) item->q, key, a->columns);
        memcpy(scores + i, &four, sizeof(four));
    }
}

// out = factor * out + the rows' values, weighed, slot after slot.
static void add_values(float * out, float factor, const float * const * rows, const float * weights, int count,
                       int64_t columns) {
    for (int64_t c = 0; c < columns; c += 4 * LANES) {
        lanes sum[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sum[j] = factor * load_lanes(out + c + j * LANES);
        }
#pragma GCC unroll 1
        for (int i = 0; i < count; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                sum[j] = multiply_add(all_lanes(weights[i]), load_lanes(rows[i] + c + j * LANES), sum[j]);
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            store_lanes(out + c + j * LANES, sum[j]);
        }
    }
}

static void add_block(const struct attention * a, struct item * item, struct block * block) {
    int           seen[BLOCK];
    const float * values[BLOCK];
    float         scores[BLOCK], weights[BLOCK];
    int           count = 0;
    float         max   = item->max;
    for (int i = 0; i < block->count; i++) {
        seen[count] = i;
        count += block->positions[i] >= item->span.first && block->positions[i] <= item->span.last;
    }
    if (count == 0) {
        return;
    }
    score(a, item, block, seen, count, scores);
    for (int i = 0; i < count; i++) {
        scores[i] *= a->scale;
        max = scores[i] > max ? scores[i] : max;
        values[i] = float_row(&block->v, a->columns, seen[i]);
    }
    for (int i = count; i < BLOCK; i++) {  // whole vectors, so that every exponential is computed alike
        scores[i] = -INFINITY;
    }
    const float factor = expf(item->max - max);  // 0 the first time, when item->max is -infinity
    const float sum    = (float) ggml_vec_soft_max_f32(BLOCK, weights, scores, max);
    add_values(item->out, factor, values, weights, count, a->columns);
    item->sum = item->sum * factor + sum;
    item->max = max;
}

// Items [begin, end) of one key/value head, counted by row and then by head; at most BATCH of them.
static void attend(const struct attention * a, float * dst, int64_t kv_head, int64_t begin, int64_t end) {
    struct item  items[BATCH];
    struct block block;
    const int64_t slots = a->k->ne[1];
    int64_t first = slots, last = -1;  // slots that somebody may see
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / a->group, head = kv_head * a->group + i % a->group;
        struct item * item = &items[i - begin];
        begin_item(a, item, row, head, dst + (row * a->q->ne[1] + head) * a->columns);
        if (item->span.first <= item->span.last) {
            first = item->span.first < first ? item->span.first : first;
            last  = item->span.last > last ? item->span.last : last;
        }
    }
    if (a->slot_positions) {
        first = 0;
        last  = slots - 1;
    }
    for (int64_t slot = first / BLOCK * BLOCK; slot < slots && slot <= last; slot += BLOCK) {
        begin_block(a, &block, kv_head, slot);
        for (int64_t i = begin; i < end; i++) {
            add_block(a, &items[i - begin], &block);
        }
    }
    for (int64_t i = begin; i < end; i++) {
        end_item(a, &items[i - begin]);
    }
}

void pydflash_attention_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct attention a = read_node(dst);
    const int64_t per_head = a.q->ne[2] * a.group;

    int64_t begin, end;
    pydflash_share(a.q->ne[2] * a.q->ne[1], ith, nth, &begin, &end);
    while (begin < end) {
        const int64_t kv_head = begin / per_head;
        const int64_t index   = begin % per_head;
        int64_t       count   = end - begin < BATCH ? end - begin : BATCH;
        count = count < per_head - index ? count : per_head - index;
        attend(&a, (float *) dst->data, kv_head, index, index + count);
        begin += count;
    }
}
