#include "delta_rule.h"

#include "delta_inputs.h"
#include "lanes.h"

#include <math.h>
#include <string.h>

// A tile of COLUMNS value columns of a head passes through all rows before the next one begins: it stays in the L1
// cache, and the committed state is read and written once. Four columns go together, each with sums of its own, so that
// the sums do not wait for one another and k and q are loaded once for four.
//
// Replayed and new rows run the same arithmetic, so that a replayed state has the same bits.
#define COLUMNS      32
#define TOGETHER     4
#define MAX_HEAD_DIM 256
#define MAX_ROWS     16  // together in `struct row`s

struct head {
    int64_t key_dim;           // D
    int64_t q, k, v, g, beta;  // column offsets into a row of the inputs
    float   eps;
};

// What the columns of a head share of a row. q and k stay as they come; what the columns make of them is scaled.
struct row {
    _Alignas(64) float q[MAX_HEAD_DIM];
    float         k[MAX_HEAD_DIM];
    float         q_scale, k_scale;
    float         decay, beta;
    const float * values;  // v of the head's first column
};

// 1 over the L2 norm.
static float inverse_norm(const float * x, int64_t n, float eps) {
    lanes squares = { 0 };
    for (int64_t i = 0; i < n; i += LANES) {
        squares = multiply_add(load_lanes(x + i), load_lanes(x + i), squares);
    }
    return 1.0f / sqrtf(sum_lanes(squares) + eps);
}

static void read_row(struct row * row, const float * input, const struct head * h) {
    memcpy(row->q, input + h->q, (size_t) h->key_dim * sizeof(float));
    memcpy(row->k, input + h->k, (size_t) h->key_dim * sizeof(float));
    row->q_scale = inverse_norm(row->q, h->key_dim, h->eps) / sqrtf((float) h->key_dim);
    row->k_scale = inverse_norm(row->k, h->key_dim, h->eps);
    row->decay   = expf(input[h->g]);
    row->beta    = input[h->beta];
    row->values  = input + h->v;
}

// One row through four columns from `column` on: from -> to, which may be the same; reads them into `out` when given.
LANES_INLINE void advance(float * to, const float * from, const struct row * restrict row, int64_t column, int64_t d,
                          float * out) {
    lanes along_k[TOGETHER] = { 0 }, along_q[TOGETHER] = { 0 };
#pragma GCC unroll 1  // else compilers load everything first and run out of registers
    for (int64_t i = 0; i < d; i += LANES) {
        const lanes k = load_lanes(row->k + i);
#pragma GCC unroll 4
        for (int c = 0; c < TOGETHER; c++) {
            along_k[c] = multiply_add(load_lanes(from + c * d + i), k, along_k[c]);
        }
    }
    four_lanes v;
    memcpy(&v, row->values + column, sizeof(v));
    const four_lanes delta = row->k_scale * row->beta * (v - row->decay * row->k_scale * sum_four(along_k));
#pragma GCC unroll 1
    for (int64_t i = 0; i < d; i += LANES) {
        const lanes k = load_lanes(row->k + i), q = load_lanes(row->q + i);
#pragma GCC unroll 4
        for (int c = 0; c < TOGETHER; c++) {
            const lanes s = multiply_add(all_lanes(delta[c]), k, row->decay * load_lanes(from + c * d + i));
            store_lanes(to + c * d + i, s);
            along_q[c] = multiply_add(s, q, along_q[c]);
        }
    }
    if (out) {
        const four_lanes o = row->q_scale * sum_four(along_q);
        memcpy(out + column, &o, sizeof(o));
    }
}

// Rows through a tile. The first takes the state from `from`; it is in `tile` from then on.
LANES_INLINE void pass(float * tile, const float * from, const struct row * rows, int64_t count, int64_t column,
                       int64_t d, float * out, int64_t out_stride) {
    for (int64_t t = 0; t < count; t++) {
        for (int64_t c = 0; c < COLUMNS; c += TOGETHER) {
            const float * old = (t == 0 ? from : tile) + c * d;
            advance(tile + c * d, old, &rows[t], column + c, d, out ? out + t * out_stride : NULL);
        }
    }
}

// Columns begin..end of one head, whole tiles. d is the head's key_dim.
LANES_INLINE void run_head(const struct ggml_tensor * dst, const struct head * h, int64_t d, int64_t begin, int64_t end,
                           float * state, float * out) {
    const struct ggml_tensor * inputs = dst->src[0];
    const int32_t * counts = (const int32_t *) dst->src[2]->data;
    const int       keep   = pydflash_node_params(dst)[0];
    const int64_t   width = inputs->ne[0];
    const float *   input = (const float *) inputs->data;
    struct row rows[MAX_ROWS];
    for (int32_t t = 0; t < counts[0]; t++) {
        read_row(&rows[t], input + t * width, h);
    }
    for (int64_t column = begin; column < end; column += COLUMNS) {
        pass(state + column * d, state + column * d, rows, counts[0], column, d, NULL, 0);
    }
    for (int64_t first = 0; first < counts[1]; first += MAX_ROWS) {
        const int64_t count = counts[1] - first < MAX_ROWS ? counts[1] - first : MAX_ROWS;
        for (int64_t t = 0; t < count; t++) {
            read_row(&rows[t], input + (PYDFLASH_TAPE_ROWS + first + t) * width, h);
        }
        for (int64_t column = begin; column < end; column += COLUMNS) {
            _Alignas(64) float working[COLUMNS * MAX_HEAD_DIM];
            float * committed = state + column * d;
            pass(keep ? working : committed, committed, rows, count, column, d, out + first * dst->ne[0], dst->ne[0]);
        }
    }
}

void pydflash_delta_rule_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * states = dst->src[1];
    const int32_t real    = ((const int32_t *) dst->src[2]->data)[1];
    const int64_t k_heads = pydflash_node_params(dst)[1];
    const int64_t d       = pydflash_node_params(dst)[2];
    const int64_t v_heads = states->ne[2];
    const int64_t width   = dst->src[0]->ne[0];

    int64_t begin, end;  // of this thread's columns, counted over all heads
    pydflash_share(v_heads * (d / COLUMNS), ith, nth, &begin, &end);
    begin *= COLUMNS;
    end   *= COLUMNS;
    for (int64_t h = begin / d; h * d < end; h++) {
        const struct head head = {
            .key_dim = d,
            .q = (h % k_heads) * d,
            .k = (k_heads + h % k_heads) * d,
            .v = (2 * k_heads + h) * d,
            .g = width - 2 * v_heads + h,
            .beta = width - v_heads + h,
            .eps = pydflash_node_param_f32(dst, 3),
        };
        const int64_t first = begin > h * d ? begin - h * d : 0;
        const int64_t last  = end - h * d < d ? end - h * d : d;
        float * state = (float *) states->data + h * d * d;
        float * out   = (float *) dst->data + h * d;
        if (d == 128) {  // Qwen's size, as a constant
            run_head(dst, &head, 128, first, last, state, out);
        } else {
            run_head(dst, &head, d, first, last, state, out);
        }
    }
    for (int64_t t = real; t < dst->ne[1] && begin < end; t++) {  // padding
        memset((float *) dst->data + t * dst->ne[0] + begin, 0, (size_t) (end - begin) * sizeof(float));
    }
}
