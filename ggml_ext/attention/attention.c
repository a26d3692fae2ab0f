#include "attention.h"

#include "ggml-cpu.h"
#include "lanes.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

// Slots are taken in aligned blocks of BLOCK: scores first, then values. Values, and keys of a float type, are
// converted to f32 once for up to BATCH (row, head) items of a key/value head. The block is cut at fixed slots, so an
// item's arithmetic is the same in any batch.
//
// Items that see the same slots of a block go together, as many as fill the registers with sums: a key or a value is
// then loaded once for all of them. A sum's terms and their order do not depend on the items beside it.
#define BLOCK 32
#define TOGETHER (LANES == 16 ? 4 : 2)
#define BATCH 96
#define MAX_HEAD PYDFLASH_MAX_HEAD

// Everything about one node that its (row, head) items share.
struct attention {
    const struct ggml_tensor * q;
    const struct ggml_tensor * k;
    const struct ggml_tensor * v;
    const int32_t *            positions;
    const int32_t *            slot_positions;  // NULL: slot s holds position s
    const int32_t *            pages;           // NULL: slot s is row s of the cache
    const int32_t *            sequences;       // of the rows; NULL without pages
    int64_t                    slots;           // of a sequence
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
        .slots = dst->src[1]->ne[1],
        .scale  = pydflash_node_param_f32(dst, 0),
        .causal = params[1],
        .window = params[2],
        .group   = dst->src[0]->ne[1] / params[3],
        .columns = dst->src[0]->ne[0],
    };
    if (dst->src[5]) {
        a.pages     = (const int32_t *) dst->src[4]->data;
        a.sequences = (const int32_t *) dst->src[5]->data;
        a.slots     = dst->src[4]->ne[0] * PYDFLASH_PAGE;
    } else if (dst->src[4]) {
        a.slot_positions = (const int32_t *) dst->src[4]->data;
    }
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
    const void *         q;                          // in the dot product's type
    float                max;
    float                sum;
    float                factor;                     // what out is worth by the block's maximum
    _Alignas(64) float   weights[BLOCK];             // of the slots it sees of a block: first their scores
    float                converted[MAX_HEAD + 64];   // holds q when it is not q itself; never wider than f32
    float                out[MAX_HEAD];
};

static void begin_item(const struct attention * a, struct item * item, int64_t row, int64_t head, float * dst) {
    const char * q = (const char *) a->q->data + (size_t) row * a->q->nb[2] + (size_t) head * a->q->nb[1];
    item->span = pydflash_attention_span(a->positions[row], a->causal, a->window);
    item->dst  = dst;
    item->q    = a->q_from_float ? (const void *) item->converted : q;
    item->max  = -INFINITY;
    item->sum  = 0.0f;
    memset(item->out, 0, (size_t) a->columns * sizeof(float));
    if (a->q_from_float && a->k_to_float) {  // q after rounding to K's type
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

// One side of a block of the cache: where its slots start, and their f32 values once an item needs them.
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
    int32_t     lowest, highest;  // of the positions
    struct side k, v;
};

static const char * head_slice(const struct ggml_tensor * cache, int64_t kv_head, int64_t columns, int64_t row) {
    const size_t head = ggml_row_size(cache->type, columns);
    return (const char *) cache->data + (size_t) row * cache->nb[1] + (size_t) kv_head * head;
}

// The row of the cache that is `slot`; a block never crosses a page.
static int64_t row_of(const int32_t * pages, int64_t slot) {
    return pages ? (int64_t) pages[slot / PYDFLASH_PAGE] * PYDFLASH_PAGE + slot % PYDFLASH_PAGE : slot;
}

static void begin_side(struct side * side, const struct ggml_tensor * cache, ggml_to_float_t to_float,
                       const char * slots) {
    side->slots    = slots;
    side->stride   = cache->nb[1];
    side->to_float = to_float;
    memset(side->loaded, 0, sizeof(side->loaded));
}

static void begin_block(const struct attention * a, struct block * block, int64_t kv_head, const int32_t * pages,
                        int64_t slot) {
    const int64_t left = a->slots - slot, row = row_of(pages, slot);
    block->count = left < BLOCK ? (int) left : BLOCK;
    begin_side(&block->k, a->k, a->k_to_float, head_slice(a->k, kv_head, a->columns, row));
    begin_side(&block->v, a->v, a->v_to_float, head_slice(a->v, kv_head, a->columns, row));
    block->lowest  = INT32_MAX;
    block->highest = INT32_MIN;
    for (int i = 0; i < block->count; i++) {
        const int32_t position = a->slot_positions ? a->slot_positions[slot + i] : (int32_t) slot + i;
        block->positions[i] = position;
        block->lowest  = position < block->lowest ? position : block->lowest;
        block->highest = position > block->highest ? position : block->highest;
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

// The slots of a block that an item sees.
struct view {
    int count;
    int slots[BLOCK];
};

static bool sees_all(const struct block * block, struct pydflash_span span) {
    return block->lowest >= span.first && block->highest <= span.last;
}

static void look(const struct block * block, struct pydflash_span span, struct view * view) {
    view->count = 0;
    for (int i = 0; i < block->count; i++) {
        view->slots[view->count] = i;
        view->count += block->positions[i] >= span.first && block->positions[i] <= span.last;
    }
}

// How many of `count` items see what the first one sees: the heads of a row, or rows for which the block is complete.
static int64_t count_alike(const struct block * block, const struct item * items, int64_t count) {
    const struct pydflash_span span = items[0].span;
    const bool all = sees_all(block, span);
    int64_t    n   = 1;
    while (n < count && ((items[n].span.first == span.first && items[n].span.last == span.last) ||
                         (all && sees_all(block, items[n].span)))) {
        n++;
    }
    return n;
}

// The scores of n items, each by its own dot products with quantised keys.
static void score_quantised(const struct attention * a, struct item * items, int64_t n, const struct side * keys,
                            const struct view * view) {
    for (int64_t i = 0; i < n; i++) {
        for (int s = 0; s < view->count; s++) {
            const char * key = keys->slots + (size_t) view->slots[s] * keys->stride;
            a->dot((int) a->columns, &items[i].weights[s], 0, key, 0, items[i].q, 0, 1);
        }
    }
}

// The scores of n items, four keys at a time; up to three scores more than `count` are written.
LANES_INLINE void score(struct item * items, int n, const float * const * keys, int count, int64_t columns) {
    for (int s = 0; s < count; s += 4) {
        lanes sum[TOGETHER][4] = { 0 };
#pragma GCC unroll 1
        for (int64_t c = 0; c < columns; c += LANES) {
            lanes key[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                key[j] = load_lanes(keys[s + j] + c);
            }
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                const lanes q = load_lanes((const float *) items[i].q + c);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    sum[i][j] = multiply_add(q, key[j], sum[i][j]);
                }
            }
        }
        four_lanes scores[TOGETHER];
        sum_fours(sum, n, scores);
        for (int i = 0; i < n; i++) {
            memcpy(items[i].weights + s, &scores[i], sizeof(scores[i]));
        }
    }
}

// A step of the online softmax: `count` scores become weights, sum and max move on. Whole registers, so that every
// exponential is computed alike.
static void weigh(struct item * item, int count, float scale) {
    for (int s = count; s < BLOCK; s++) {
        item->weights[s] = -INFINITY;
    }
    lanes largest = all_lanes(item->max), sum = { 0 };
    for (int s = 0; s < BLOCK; s += LANES) {
        const lanes scores = scale * load_lanes(item->weights + s);
        largest = larger_lanes(scores, largest);
        store_lanes(item->weights + s, scores);
    }
    const float max = largest_lane(largest);
    for (int s = 0; s < BLOCK; s += LANES) {
        const lanes weights = exp_lanes(load_lanes(item->weights + s) - max);
        sum += weights;
        store_lanes(item->weights + s, weights);
    }
    item->factor = exp_lanes(all_lanes(item->max - max))[0];  // 0 the first time, when item->max is -infinity
    item->sum    = item->sum * item->factor + sum_lanes(sum);
    item->max    = max;
}

// out = factor * out + the rows' values, weighed, slot after slot: four registers of columns at a time, for n items.
LANES_INLINE void add_values(struct item * items, int n, const float * const * values, int count, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 4 * LANES) {
        lanes sum[TOGETHER][4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                sum[i][j] = items[i].factor * load_lanes(items[i].out + c + j * LANES);
            }
        }
#pragma GCC unroll 1
        for (int s = 0; s < count; s++) {
            lanes value[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                value[j] = load_lanes(values[s] + c + j * LANES);
            }
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                const lanes weight = all_lanes(items[i].weights[s]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    sum[i][j] = multiply_add(weight, value[j], sum[i][j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                store_lanes(items[i].out + c + j * LANES, sum[i][j]);
            }
        }
    }
}

// The f32 rows of a side's slots in a view, and three more, since readers take four at a time.
static void float_rows(struct side * side, int64_t columns, const struct view * view, const float * rows[BLOCK + 3]) {
    for (int s = 0; s < view->count; s++) {
        rows[s] = float_row(side, columns, view->slots[s]);
    }
    for (int s = view->count; s < view->count + 3; s++) {
        rows[s] = rows[view->count - 1];
    }
}

LANES_INLINE void add_together(const struct attention * a, struct item * items, int n, const float * const * keys,
                               const float * const * values, int count) {
    if (!a->dot) {
        score(items, n, keys, count, a->columns);
    }
    for (int i = 0; i < n; i++) {
        weigh(&items[i], count, a->scale);
    }
    add_values(items, n, values, count, a->columns);
}

// A block for n items that see the same slots of it.
static void add_block(const struct attention * a, struct item * items, int64_t n, struct block * block) {
    struct view   view;
    const float * keys[BLOCK + 3], * values[BLOCK + 3];
    look(block, items[0].span, &view);
    if (view.count == 0) {
        return;
    }
    if (a->dot) {
        score_quantised(a, items, n, &block->k, &view);
    } else {
        float_rows(&block->k, a->columns, &view, keys);
    }
    float_rows(&block->v, a->columns, &view, values);
    for (int64_t i = 0; i < n; i += TOGETHER) {
        const int64_t left = n - i;
        if (left >= TOGETHER) {
            add_together(a, items + i, TOGETHER, keys, values, view.count);
        } else if (left == 3) {
            add_together(a, items + i, 3, keys, values, view.count);
        } else if (left == 2) {
            add_together(a, items + i, 2, keys, values, view.count);
        } else {
            add_together(a, items + i, 1, keys, values, view.count);
        }
    }
}

// What a thread works in, 300 KiB: too much for the stacks of some threads.
struct desk {
    struct item  items[BATCH];
    struct block block;
};

size_t pydflash_attention_scratch(const struct ggml_tensor * node) {
    (void) node;
    return sizeof(struct desk);
}

// Items [begin, end) of one key/value head and one sequence, counted by row and then by head; at most BATCH of them.
static void attend(const struct attention * a, struct desk * desk, float * dst, int64_t kv_head, int64_t begin,
                   int64_t end) {
    struct item *  items = desk->items;
    struct block * block = &desk->block;
    const int32_t * pages = a->pages ? a->pages + a->sequences[begin / a->group] * (a->slots / PYDFLASH_PAGE) : NULL;
    int64_t first = a->slots, last = -1;  // slots that some item may see
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
        last  = a->slots - 1;
    }
    for (int64_t slot = first / BLOCK * BLOCK; slot < a->slots && slot <= last; slot += BLOCK) {
        begin_block(a, block, kv_head, pages, slot);
        for (int64_t i = 0; i < end - begin;) {
            const int64_t n = count_alike(block, &items[i], end - begin - i);
            add_block(a, &items[i], n, block);
            i += n;
        }
    }
    for (int64_t i = begin; i < end; i++) {
        end_item(a, &items[i - begin]);
    }
}

// The rows from `row` on, up to `end`, that belong to its sequence.
static int64_t same_sequence(const struct attention * a, int64_t row, int64_t end) {
    int64_t next = a->pages ? row + 1 : end;
    while (next < end && a->sequences[next] == a->sequences[row]) {
        next++;
    }
    return next - row;
}

// Items [begin, end), counted by key/value head, then by row, then by head.
static void attend_range(const struct attention * a, struct desk * desk, float * dst, int64_t begin, int64_t end) {
    const int64_t per_head = a->q->ne[2] * a->group;
    while (begin < end) {
        const int64_t kv_head = begin / per_head;
        const int64_t index   = begin % per_head;
        int64_t       count   = end - begin < BATCH ? end - begin : BATCH;
        const int64_t row  = index / a->group;
        const int64_t left = (row + same_sequence(a, row, a->q->ne[2])) * a->group - index;
        count = count < left ? count : left;
        attend(a, desk, dst, kv_head, index, index + count);
        begin += count;
    }
}

// Threads take turns, of equal shares where items are few; else of BATCH items, since later rows of a prompt see more.
void pydflash_attention_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct attention a = read_node(dst);
    const int64_t items = a.q->ne[2] * a.q->ne[1];
    const int64_t share = (items + nth - 1) / nth;
    const int64_t turn  = share < BATCH ? share : BATCH;
    struct desk * desk = (struct desk *) pydflash_node_scratch(dst, ith);
    for (int64_t begin = ith * turn; begin < items; begin += nth * turn) {
        attend_range(&a, desk, (float *) dst->data, begin, begin + turn < items ? begin + turn : items);
    }
}
