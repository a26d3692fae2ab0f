#include "experts.h"

#include "linear.h"

#include <math.h>
#include <string.h>

// Rows that have selected the same expert go through its matrix together, as many at a time as linear takes; linear's
// product makes a row's bits independent of its company. A thread has its share of the M values of every row, so that
// the sum over a row's experts is its own: expert by expert, in the order of their numbers.
//
// A selection is one (row, place) of ids, numbered row by row.
struct work {
    const struct ggml_tensor * x, * w, * ids, * logits;
    struct ggml_tensor *       result;
    int32_t * first;       // by expert: where its selections begin
    int32_t * selections;  // by expert
    float *   weights;     // of each selection
    float *   products;    // of one group, when they are to be added up
    void *    memory;      // of a product
};

// A counting sort. `first` has room for two more numbers than there are experts.
static void sort_by_expert(const struct work * work) {
    const int32_t * ids     = (const int32_t *) work->ids->data;
    const int64_t   experts = work->w->ne[2], count = work->ids->ne[0] * work->ids->ne[1];
    memset(work->first, 0, (size_t) (experts + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < count; i++) {
        work->first[ids[i] + 2]++;
    }
    for (int64_t e = 2; e < experts + 2; e++) {
        work->first[e] += work->first[e - 1];
    }
    for (int64_t i = 0; i < count; i++) {
        work->selections[work->first[ids[i] + 1]++] = (int32_t) i;
    }
}

// The softmax over the selected logits of row t.
static void weigh(const struct work * work, int64_t t) {
    const int64_t   k       = work->ids->ne[0];
    const int32_t * ids     = (const int32_t *) work->ids->data + t * k;
    const float *   logits  = pydflash_row(work->logits, t);
    float *         weights = work->weights + t * k;
    float peak = -INFINITY, sum = 0.0f;
    for (int64_t j = 0; j < k; j++) {
        peak = fmaxf(peak, logits[ids[j]]);
    }
    for (int64_t j = 0; j < k; j++) {
        weights[j] = expf(logits[ids[j]] - peak);
        sum += weights[j];
    }
    for (int64_t j = 0; j < k; j++) {
        weights[j] /= sum;
    }
}

// Values begin..end - 1 of the `count` selections from `at` on, all of one expert.
static void multiply_group(const struct work * work, int64_t expert, const int32_t * at, int64_t count, int64_t begin,
                           int64_t end) {
    const struct ggml_tensor * x = work->x, * w = work->w;
    const int64_t k = work->ids->ne[0], M = w->ne[1];
    float * result = (float *) work->result->data;
    const char * matrix = (const char *) w->data + (size_t) expert * w->nb[2];
    struct pydflash_product product = { w->type, w->ne[0], matrix, w->nb[1], count, { 0 }, { 0 } };
    for (int64_t i = 0; i < count; i++) {
        product.x[i]   = pydflash_row(x, x->ne[1] == 1 ? at[i] / k : at[i]);
        product.out[i] = work->logits ? work->products + i * M : result + at[i] * M;
    }
    pydflash_multiply(&product, work->memory, begin, end);
    for (int64_t i = 0; work->logits && i < count; i++) {
        float *     sum    = result + at[i] / k * M;
        const float weight = work->weights[at[i]];
        for (int64_t m = begin; m < end; m++) {
            sum[m] += weight * product.out[i][m];
        }
    }
}

size_t pydflash_experts_scratch(const struct ggml_tensor * node) {
    const struct ggml_tensor * w = node->src[1], * ids = node->src[2], * logits = node->src[3];
    const size_t experts = (size_t) w->ne[2], M = (size_t) w->ne[1], count = (size_t) (ids->ne[0] * ids->ne[1]);
    const size_t words   = experts + 2 + 2 * count + (logits ? PYDFLASH_EXACT_ROWS * M : 0);
    return pydflash_multiply_scratch(PYDFLASH_EXACT_ROWS, w->ne[0]) + words * sizeof(int32_t);
}

// The memory of a product comes first, since it must be aligned.
static struct work prepare(struct ggml_tensor * dst, void * memory) {
    struct work work = { dst->src[0], dst->src[1], dst->src[2], dst->src[3], dst, NULL, NULL, NULL, NULL, memory };
    const int64_t count = work.ids->ne[0] * work.ids->ne[1];
    work.first      = (int32_t *) ((char *) memory + pydflash_multiply_scratch(PYDFLASH_EXACT_ROWS, work.w->ne[0]));
    work.selections = work.first + work.w->ne[2] + 2;
    work.weights    = (float *) (work.selections + count);
    work.products   = work.weights + count;
    return work;
}

void pydflash_experts_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    int64_t begin, end;
    pydflash_share(dst->src[1]->ne[1], ith, nth, &begin, &end);
    if (begin == end) {
        return;
    }
    const struct work work = prepare(dst, pydflash_node_scratch(dst, ith));
    sort_by_expert(&work);
    for (int64_t t = 0; work.logits && t < work.ids->ne[1]; t++) {
        weigh(&work, t);
        memset((float *) dst->data + t * dst->ne[0] + begin, 0, (size_t) (end - begin) * sizeof(float));
    }
    for (int64_t expert = 0; expert < work.w->ne[2]; expert++) {
        for (int64_t i = work.first[expert]; i < work.first[expert + 1]; i += PYDFLASH_EXACT_ROWS) {
            const int64_t left = work.first[expert + 1] - i;
            multiply_group(&work, expert, work.selections + i, left < PYDFLASH_EXACT_ROWS ? left : PYDFLASH_EXACT_ROWS,
                           begin, end);
        }
    }
}
