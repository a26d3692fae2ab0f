#include "delta_inputs.h"

#include "lanes.h"

#include <math.h>
#include <string.h>

#define TAPE     PYDFLASH_TAPE_ROWS
#define TOGETHER 32  // rows that share a load of the weights
#define MAX_TAPS PYDFLASH_MAX_TAPS

// A sequence of a step: its rows in [history | kept pending | new], and where its results go.
struct sequence {
    float *       window;           // row 0
    const float * x;                // its first new row
    int64_t       x_stride, width;  // floats from row to row, of x and of the window and the results
    int64_t       history, kept, rows;
    float *       replayed;         // results of the kept rows
    float *       fresh;            // results of the new rows
};

static struct sequence sequence_of(const struct ggml_tensor * dst, int64_t index, int64_t first) {
    const struct ggml_tensor * x       = dst->src[0];
    const struct ggml_tensor * windows = dst->src[6];
    const int32_t * counts = (const int32_t *) dst->src[7]->data + 2 * index;
    const int32_t   slot   = ((const int32_t *) dst->src[8]->data)[index];
    const int64_t   stride = (int64_t) (x->nb[1] / sizeof(float));
    float * out = (float *) dst->data;
    return (struct sequence) {
        .window   = (float *) windows->data + slot * windows->ne[1] * windows->ne[0],
        .x        = (const float *) x->data + first * stride,
        .x_stride = stride,
        .width    = dst->ne[0],
        .history  = dst->src[3]->ne[0] - 1,
        .kept     = counts[0],
        .rows     = counts[1],
        .replayed = out + index * TAPE * dst->ne[0],
        .fresh    = out + (dst->src[7]->ne[1] * TAPE + first) * dst->ne[0],
    };
}

static float * window_row(const struct sequence * s, int64_t row) {
    return s->window + row * s->width;
}

// The raw column at `index` of [history | kept pending | new].
static const float * column(const struct sequence * s, int64_t index) {
    const int64_t past = s->history + s->kept;
    return index < past ? window_row(s, index) : s->x + (index - past) * s->x_stride;
}

// Rows first..first + count of [kept | new], channels c0..c1: `taps` neighbours of the sequence each, oldest first.
LANES_INLINE void convolve(const struct sequence * s, const float * weight, int64_t first, int64_t count, int64_t taps,
                           int64_t c0, int64_t c1) {
    const float * from[TOGETHER + MAX_TAPS - 1];
    float *       to[TOGETHER];
    for (int64_t i = 0; i < count + taps - 1; i++) {
        from[i] = column(s, first + i);
    }
    for (int64_t t = 0; t < count; t++) {
        const int64_t row = first + t;
        to[t] = row < s->kept ? s->replayed + row * s->width : s->fresh + (row - s->kept) * s->width;
    }
    for (int64_t c = c0; c < c1; c += LANES) {
        float w[MAX_TAPS][LANES];
        for (int64_t i = 0; i < LANES; i++) {
            for (int64_t j = 0; j < taps; j++) {
                w[j][i] = weight[(c + i) * taps + j];
            }
        }
        for (int64_t t = 0; t < count; t++) {
            lanes sum = { 0 };
            for (int64_t j = 0; j < taps; j++) {
                sum = multiply_add(load_lanes(w[j]), load_lanes(from[t + j] + c), sum);
            }
            store_lanes(to[t] + c, silu_lanes(sum));
        }
    }
}

// The gates of row `row` of the step, counted over all sequences.
static void gates(float * out, const struct ggml_tensor * dst, int64_t row) {
    const int64_t heads   = dst->src[4]->ne[0];
    const float * alpha   = pydflash_row(dst->src[1], row);
    const float * beta    = pydflash_row(dst->src[2], row);
    const float * ssm_a   = (const float *) dst->src[4]->data;
    const float * dt_bias = (const float *) dst->src[5]->data;
    for (int64_t h = 0; h < heads; h++) {
        const float a = alpha[h] + dt_bias[h];
        out[h]         = ssm_a[h] * (a > 20.0f ? a : log1pf(expf(a)));
        out[heads + h] = 1.0f / (1.0f + expf(-beta[h]));
    }
}

// Row t of a sequence's gates: the kept one comes from the window, the new one is computed and takes its place there.
static void move_gates(const struct ggml_tensor * dst, const struct sequence * s, int64_t first, int keep, int64_t t) {
    const int64_t channels = dst->src[0]->ne[0];
    const size_t  bytes    = (size_t) (2 * dst->src[4]->ne[0]) * sizeof(float);
    float *       pending  = window_row(s, s->history + t) + channels;
    if (t < s->kept) {
        memcpy(s->replayed + t * s->width + channels, pending, bytes);
    }
    if (t < s->rows) {
        float * out = s->fresh + t * s->width + channels;
        gates(out, dst, first + t);
        if (keep) {
            memcpy(pending, out, bytes);
        }
    }
}

// Channels c0..c1 of the window: kept columns become history, new ones pending.
static void move_window(const struct sequence * s, int keep, int64_t c0, int64_t c1) {
    const size_t  bytes = (size_t) (c1 - c0) * sizeof(float);
    const int64_t next  = keep ? s->kept : s->kept + s->rows;  // where the new history starts in [history | kept | new]
    for (int64_t i = 0; i < s->history; i++) {
        memmove(window_row(s, i) + c0, column(s, next + i) + c0, bytes);
    }
    for (int64_t i = 0; keep && i < s->rows; i++) {
        memcpy(window_row(s, s->history + i) + c0, s->x + i * s->x_stride + c0, bytes);
    }
}

// Channels c0..c1 of a sequence, and this thread's share of its gates.
static void run_sequence(const struct ggml_tensor * dst, const struct sequence * s, int64_t first, int ith, int nth,
                         int64_t c0, int64_t c1) {
    const int     keep   = pydflash_node_params(dst)[0];
    const float * weight = (const float *) dst->src[3]->data;
    for (int64_t t = 0; t < s->kept + s->rows; t += TOGETHER) {
        const int64_t count = s->kept + s->rows - t < TOGETHER ? s->kept + s->rows - t : TOGETHER;
        if (s->history + 1 == 4) {  // Qwen's kernel, as a constant
            convolve(s, weight, t, count, 4, c0, c1);
        } else {
            convolve(s, weight, t, count, s->history + 1, c0, c1);
        }
    }
    move_window(s, keep, c0, c1);
    int64_t begin, end;
    pydflash_share(s->kept > s->rows ? s->kept : s->rows, ith, nth, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        move_gates(dst, s, first, keep, t);
    }
}

void pydflash_delta_inputs_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const int64_t channels = dst->src[0]->ne[0];
    // Shares are multiples of 16 channels: whole registers.
    int64_t c0, c1;
    pydflash_share((channels + 15) / 16, ith, nth, &c0, &c1);
    c0 = 16 * c0 < channels ? 16 * c0 : channels;
    c1 = 16 * c1 < channels ? 16 * c1 : channels;
    int64_t first = 0;
    for (int64_t i = 0; i < dst->src[7]->ne[1]; i++) {
        const struct sequence s = sequence_of(dst, i, first);
        run_sequence(dst, &s, first, ith, nth, c0, c1);
        first += s.rows;
    }
}
