#include "delta_rule.h"

#include "delta_inputs.h"
#include "lanes.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

// A tile of COLUMNS value columns of a head passes through all rows before the next one begins: it stays in the L1
// cache, and the committed state is read and written once. Four columns go together, each with its own sums, so that
// the sums do not wait for one another and k and q are loaded once for four. A row multiplies the state that it has
// just updated by the next row's k: a pass over the tile is one load, three multiply-adds and one store for each
// register of state, and no row waits for its own sums.
//
// The state is kept as scale * T, one scale a head, so that a decay is one product a head and not one a state element:
// with d of delta_rule.h,
//
//   scale <- exp(g) scale;   T <- T + k d^T / scale;   o = scale T^T q / sqrt(D)
//
// A row that would leave scale below LEAST_SCALE (exp(g) may be 0) or above 1 multiplies T by it instead and goes on
// with 1. Whether it does depends on the rows up to it alone, so the split has the same bits however rows are grouped
// into steps. T is at most 1 / LEAST_SCALE times as large as S and rounds as S does.
//
// Replayed and new rows run the same arithmetic, so that a replayed state has the same bits.
#define LEAST_SCALE  0x1p-24f
#define COLUMNS      32
#define TOGETHER     4
#define MAX_HEAD_DIM PYDFLASH_MAX_HEAD
#define MAX_ROWS     16  // together in `struct row`s

struct head {
    int64_t key_dim;           // D
    int64_t q, k, v, g, beta;  // column offsets into a row of the inputs
    float   eps;
};

// What the columns of a head share of a row. q and k stay as they come; norms and scales go into what is made of them.
// With T as the row meets it, the state decayed is `decayed` times T; with T as it leaves it, the state is `scale` * T.
struct row {
    _Alignas(64) float q[MAX_HEAD_DIM];
    float         k[MAX_HEAD_DIM];
    float         decayed, scale;
    bool          rescale;  // T is multiplied by `decayed`, and scale is 1
    float         recall;   // what the state holds for k is recall * T^T k
    float         gain;     // T takes up gain * (v - recall * T^T k)
    float         read;     // o = read * T^T q
    const float * values;   // v of the head's first column
};

// 1 over the L2 norm.
static float inverse_norm(const float * x, int64_t n, float eps) {
    lanes squares = { 0 };
    for (int64_t i = 0; i < n; i += LANES) {
        squares = multiply_add(load_lanes(x + i), load_lanes(x + i), squares);
    }
    return 1.0f / sqrtf(sum_lanes(squares) + eps);
}

// Reads the row after one that leaves `scale`; returns the scale that it leaves itself.
static float read_row(struct row * row, const float * input, const struct head * h, float scale) {
    memcpy(row->q, input + h->q, (size_t) h->key_dim * sizeof(float));
    memcpy(row->k, input + h->k, (size_t) h->key_dim * sizeof(float));
    const float k_scale = inverse_norm(row->k, h->key_dim, h->eps);
    row->decayed = (float) (scale * exp(input[h->g]));  // rounded once: a bias would grow from row to row
    row->rescale = !(row->decayed >= LEAST_SCALE && row->decayed <= 1.0f);
    row->scale   = row->rescale ? 1.0f : row->decayed;
    row->recall  = row->decayed * k_scale;
    row->gain    = k_scale * input[h->beta] / row->scale;
    row->read    = inverse_norm(row->q, h->key_dim, h->eps) / sqrtf((float) h->key_dim) * row->scale;
    row->values  = input + h->v;
    return row->scale;
}

// T^T k of four columns.
LANES_INLINE four_lanes project(const float * from, const float * along, int64_t d) {
    lanes sums[TOGETHER] = { 0 };
#pragma GCC unroll 1  // else compilers load everything first and run out of registers
    for (int64_t i = 0; i < d; i += LANES) {
        const lanes k = load_lanes(along + i);
#pragma GCC unroll 4
        for (int c = 0; c < TOGETHER; c++) {
            sums[c] = multiply_add(load_lanes(from + c * d + i), k, sums[c]);
        }
    }
    return sum_four(sums);
}

// One row through four columns from `column` on: from -> to, which may be the same; reads them into `out` when given.
// `along_k` is their projection on the row's k; becomes that on `next_k`, when given.
LANES_INLINE void advance(float * to, const float * from, const struct row * restrict row,
                          const float * restrict next_k, bool rescale, four_lanes * along_k, int64_t column, int64_t d,
                          float * out) {
    four_lanes v;
    memcpy(&v, row->values + column, sizeof(v));
    const four_lanes delta = row->gain * (v - row->recall * *along_k);
    lanes along_next[TOGETHER] = { 0 }, along_q[TOGETHER] = { 0 };
#pragma GCC unroll 1
    for (int64_t i = 0; i < d; i += LANES) {
        const lanes k = load_lanes(row->k + i);
#pragma GCC unroll 4
        for (int c = 0; c < TOGETHER; c++) {
            const lanes old = load_lanes(from + c * d + i);
            const lanes t   = multiply_add(all_lanes(delta[c]), k, rescale ? row->decayed * old : old);
            store_lanes(to + c * d + i, t);
            if (next_k) {
                along_next[c] = multiply_add(t, load_lanes(next_k + i), along_next[c]);
            }
            if (out) {
                along_q[c] = multiply_add(t, load_lanes(row->q + i), along_q[c]);
            }
        }
    }
    if (next_k) {
        *along_k = sum_four(along_next);
    }
    if (out) {
        const four_lanes o = row->read * sum_four(along_q);
        memcpy(out + column, &o, sizeof(o));
    }
}

LANES_INLINE void advance_tile(float * tile, const float * from, const struct row * row, const float * next_k,
                               bool rescale, four_lanes * along_k, int64_t column, int64_t d, float * out) {
    for (int64_t c = 0; c < COLUMNS; c += TOGETHER) {
        advance(tile + c * d, from + c * d, row, next_k, rescale, &along_k[c / TOGETHER], column + c, d, out);
    }
}

// Rows, at least one, through a tile. The first takes the state from `from`; it is in `tile` from then on.
LANES_INLINE void pass(float * tile, const float * from, const struct row * rows, int64_t count, int64_t column,
                       int64_t d, float * out, int64_t out_stride) {
    four_lanes along_k[COLUMNS / TOGETHER];
    for (int64_t c = 0; c < COLUMNS; c += TOGETHER) {
        along_k[c / TOGETHER] = project(from + c * d, rows[0].k, d);
    }
    for (int64_t t = 0; t < count; t++) {  // a copy of advance for each kind of row
        const struct row * row = &rows[t];
        float * o = out ? out + t * out_stride : NULL;
        if (t + 1 < count && !row->rescale) {
            advance_tile(tile, from, row, row[1].k, false, along_k, column, d, o);
        } else if (t + 1 < count) {
            advance_tile(tile, from, row, row[1].k, true, along_k, column, d, o);
        } else if (!row->rescale) {
            advance_tile(tile, from, row, NULL, false, along_k, column, d, o);
        } else {
            advance_tile(tile, from, row, NULL, true, along_k, column, d, o);
        }
        from = tile;
    }
}

// The scale of columns begin..end: whoever owns columns reads and writes theirs, as threads share heads.
static void store_scale(float * scales, int64_t begin, int64_t end, float scale) {
    for (int64_t column = begin; column < end; column++) {
        scales[column] = scale;
    }
}

// A sequence of a step, as one head sees it.
struct sequence {
    const float * kept;   // its first replayed row of the inputs
    const float * fresh;  // its first new row
    float *       state;
    float *       out;    // of its first new row
    int64_t       replay, rows;
};

// Columns begin..end of one head, whole tiles. d is the head's key_dim.
LANES_INLINE void run_head(const struct ggml_tensor * dst, const struct head * h, const struct sequence * s, int64_t d,
                           int64_t begin, int64_t end) {
    const int     keep  = pydflash_node_params(dst)[0];
    const int64_t width = dst->src[0]->ne[0];
    float * state  = s->state;
    float * scales = state + d * d;
    float   scale  = scales[begin] == 0.0f ? 1.0f : scales[begin];
    struct row rows[MAX_ROWS];
    for (int64_t t = 0; t < s->replay; t++) {
        scale = read_row(&rows[t], s->kept + t * width, h, scale);
    }
    if (s->replay > 0) {
        for (int64_t column = begin; column < end; column += COLUMNS) {
            pass(state + column * d, state + column * d, rows, s->replay, column, d, NULL, 0);
        }
        store_scale(scales, begin, end, scale);
    }
    for (int64_t first = 0; first < s->rows; first += MAX_ROWS) {
        const int64_t count = s->rows - first < MAX_ROWS ? s->rows - first : MAX_ROWS;
        for (int64_t t = 0; t < count; t++) {
            scale = read_row(&rows[t], s->fresh + (first + t) * width, h, scale);
        }
        for (int64_t column = begin; column < end; column += COLUMNS) {
            _Alignas(64) float working[COLUMNS * MAX_HEAD_DIM];
            float * committed = state + column * d;
            pass(keep ? working : committed, committed, rows, count, column, d, s->out + first * dst->ne[0], dst->ne[0]);
        }
    }
    if (!keep) {
        store_scale(scales, begin, end, scale);
    }
}

// Columns begin..end, counted over all heads, of one sequence whose state is `state`. d is the heads' key_dim.
static void run_columns(const struct ggml_tensor * dst, struct sequence s, float * state, int64_t d, int64_t begin,
                        int64_t end) {
    const int64_t k_heads = pydflash_node_params(dst)[1];
    const int64_t v_heads = dst->src[1]->ne[2];
    const int64_t width   = dst->src[0]->ne[0];
    float * const out = s.out;
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
        s.state = state + h * (d + 1) * d;
        s.out   = out + h * d;
        if (d == 128) {  // Qwen's size, as a constant
            run_head(dst, &head, &s, 128, first, last);
        } else {
            run_head(dst, &head, &s, d, first, last);
        }
    }
}

void pydflash_delta_rule_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * inputs = dst->src[0];
    const struct ggml_tensor * states = dst->src[1];
    const int32_t * counts    = (const int32_t *) dst->src[2]->data;
    const int32_t * slots     = (const int32_t *) dst->src[3]->data;
    const int64_t   d         = pydflash_node_params(dst)[2];
    const int64_t   sequences = dst->src[2]->ne[1];
    const int64_t   width     = inputs->ne[0];

    int64_t begin, end;  // of this thread's columns, counted over all heads
    pydflash_share(states->ne[2] * (d / COLUMNS), ith, nth, &begin, &end);
    begin *= COLUMNS;
    end   *= COLUMNS;
    int64_t done = 0;  // new rows
    for (int64_t i = 0; i < sequences; i++) {
        const struct sequence s = {
            .kept   = (const float *) inputs->data + i * PYDFLASH_TAPE_ROWS * width,
            .fresh  = (const float *) inputs->data + (sequences * PYDFLASH_TAPE_ROWS + done) * width,
            .out    = (float *) dst->data + done * dst->ne[0],
            .replay = counts[2 * i],
            .rows   = counts[2 * i + 1],
        };
        run_columns(dst, s, (float *) states->data + slots[i] * states->ne[2] * (d + 1) * d, d, begin, end);
        done += s.rows;
    }
    for (int64_t t = done; t < dst->ne[1] && begin < end; t++) {  // padding
        memset((float *) dst->data + t * dst->ne[0] + begin, 0, (size_t) (end - begin) * sizeof(float));
    }
}
