#include "delta_rule.h"

#include "delta_inputs.h"

#include <math.h>
#include <string.h>

#define COLUMNS 32      // value columns per unit of work
#define MAX_HEAD_DIM 256

struct head {
    int64_t key_dim;        // D
    int64_t q, k, v, g, beta;  // column offsets into a row of the inputs
    float   eps;
};

static float dot(const float * a, const float * b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

static void l2_normalise(float * out, const float * x, int64_t n, float eps, float scale) {
    const float factor = scale / sqrtf(dot(x, x, n) + eps);
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] * factor;
    }
}

// One row through `columns` value columns of one head; writes o when `out` is given. Replayed and new rows run the same
// instructions, so that a replayed state has the same bits.
static void step(float * state, const float * row, const struct head * h, int64_t column, int64_t columns, float * out) {
    float q[MAX_HEAD_DIM], k[MAX_HEAD_DIM];
    const int64_t d = h->key_dim;
    l2_normalise(k, row + h->k, d, h->eps, 1.0f);
    l2_normalise(q, row + h->q, d, h->eps, 1.0f / sqrtf((float) d));
    const float decay = expf(row[h->g]);
    const float beta  = row[h->beta];
    for (int64_t j = 0; j < columns; j++) {
        float * s = state + j * d;
        const float delta = beta * (row[h->v + column + j] - decay * dot(s, k, d));
        float read = 0.0f;
#pragma omp simd reduction(+ : read)
        for (int64_t i = 0; i < d; i++) {
            s[i] = decay * s[i] + delta * k[i];
            read += s[i] * q[i];
        }
        if (out) {
            out[j] = read;
        }
    }
}

void pydflash_delta_rule_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * inputs = dst->src[0];
    const struct ggml_tensor * states = dst->src[1];
    const int32_t * counts  = (const int32_t *) dst->src[2]->data;
    const int       keep    = pydflash_node_params(dst)[0];
    const int64_t   k_heads = pydflash_node_params(dst)[1];
    const int64_t   d       = pydflash_node_params(dst)[2];
    const int64_t   v_heads = states->ne[2];
    const int64_t   width   = inputs->ne[0];
    const int64_t   rows    = dst->ne[1];
    const float *   input   = (const float *) inputs->data;

    int64_t begin, end;
    pydflash_share(v_heads * (d / COLUMNS), ith, nth, &begin, &end);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t h      = unit / (d / COLUMNS);
        const int64_t column = unit % (d / COLUMNS) * COLUMNS;
        const struct head head = {
            .key_dim = d,
            .q = (h % k_heads) * d,
            .k = (k_heads + h % k_heads) * d,
            .v = (2 * k_heads + h) * d,
            .g = width - 2 * v_heads + h,
            .beta = width - v_heads + h,
            .eps = pydflash_node_param_f32(dst, 3),
        };
        float * committed = (float *) states->data + (h * d + column) * d;
        for (int32_t t = 0; t < counts[0]; t++) {
            step(committed, input + t * width, &head, column, COLUMNS, NULL);
        }
        float working[COLUMNS * MAX_HEAD_DIM];
        float * state = keep ? memcpy(working, committed, (size_t) (COLUMNS * d) * sizeof(float)) : committed;
        for (int64_t t = 0; t < rows; t++) {
            float * out = (float *) dst->data + t * dst->ne[0] + h * d + column;
            if (t < counts[1]) {
                step(state, input + (PYDFLASH_TAPE_ROWS + t) * width, &head, column, COLUMNS, out);
            } else {
                memset(out, 0, COLUMNS * sizeof(float));
            }
        }
    }
}
