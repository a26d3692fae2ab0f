#include "delta_inputs.h"

#include "lanes.h"

#include <math.h>
#include <string.h>

#define TAPE     PYDFLASH_TAPE_ROWS
#define TOGETHER 32  // rows that share a load of the weights
#define MAX_TAPS PYDFLASH_MAX_TAPS

static const float * row_of(const struct ggml_tensor * t, int64_t row) {
    return (const float *) ((const char *) t->data + row * (int64_t) t->nb[1]);
}

static float * window_row(const struct ggml_tensor * window, int64_t row) {
    return (float *) window->data + row * window->ne[0];
}

// The raw column at `index` of the sequence [history | kept pending | new].
static const float * column(const struct ggml_tensor * window, const struct ggml_tensor * x, int64_t past, int64_t index) {
    return index < past ? window_row(window, index) : row_of(x, index - past);
}

// Rows first..first + count of [kept | new], channels c0..c1: `taps` neighbours of the sequence each, oldest first.
LANES_INLINE void convolve(const struct ggml_tensor * dst, int64_t kept, int64_t first, int64_t count, int64_t taps,
                           int64_t c0, int64_t c1) {
    const float * weight = (const float *) dst->src[3]->data;
    const float * from[TOGETHER + MAX_TAPS - 1];
    float *       to[TOGETHER];
    for (int64_t i = 0; i < count + taps - 1; i++) {
        from[i] = column(dst->src[6], dst->src[0], taps - 1 + kept, first + i);
    }
    for (int64_t t = 0; t < count; t++) {
        const int64_t row = first + t;
        to[t] = (float *) dst->data + (row < kept ? row : TAPE + row - kept) * dst->ne[0];
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

static void gates(float * out, const struct ggml_tensor * dst, int64_t row) {
    const int64_t heads   = dst->src[4]->ne[0];
    const float * alpha   = row_of(dst->src[1], row);
    const float * beta    = row_of(dst->src[2], row);
    const float * ssm_a   = (const float *) dst->src[4]->data;
    const float * dt_bias = (const float *) dst->src[5]->data;
    for (int64_t h = 0; h < heads; h++) {
        const float a = alpha[h] + dt_bias[h];
        out[h]         = ssm_a[h] * (a > 20.0f ? a : log1pf(expf(a)));
        out[heads + h] = 1.0f / (1.0f + expf(-beta[h]));
    }
}

// Row t of the gates: the kept one comes from the window, the new one is computed and takes its place there.
static void move_gates(const struct ggml_tensor * dst, int64_t kept, int64_t rows, int keep, int64_t t) {
    const int64_t channels = dst->src[0]->ne[0];
    const size_t  bytes    = (size_t) (2 * dst->src[4]->ne[0]) * sizeof(float);
    float *       out      = (float *) dst->data + t * dst->ne[0] + channels;
    float *       pending  = window_row(dst->src[6], dst->src[3]->ne[0] - 1 + t) + channels;
    if (t < kept) {
        memcpy(out, pending, bytes);
    }
    if (t < rows) {
        out += TAPE * dst->ne[0];
        gates(out, dst, t);
        if (keep) {
            memcpy(pending, out, bytes);
        }
    }
}

// Channels c0..c1 of the window: kept columns become history, new ones pending.
static void move_window(const struct ggml_tensor * dst, int64_t kept, int64_t rows, int keep, int64_t c0, int64_t c1) {
    const struct ggml_tensor * x      = dst->src[0];
    const struct ggml_tensor * window = dst->src[6];
    const int64_t history = dst->src[3]->ne[0] - 1;
    const size_t  bytes   = (size_t) (c1 - c0) * sizeof(float);
    const int64_t past    = history + kept;
    const int64_t next    = keep ? kept : kept + rows;  // where the new history starts in [history | kept | new]
    for (int64_t i = 0; i < history; i++) {
        memmove(window_row(window, i) + c0, column(window, x, past, next + i) + c0, bytes);
    }
    for (int64_t i = 0; keep && i < rows; i++) {
        memcpy(window_row(window, history + i) + c0, row_of(x, i) + c0, bytes);
    }
}

void pydflash_delta_inputs_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const int32_t * counts   = (const int32_t *) dst->src[7]->data;
    const int       keep     = pydflash_node_params(dst)[0];
    const int64_t   channels = dst->src[0]->ne[0];
    const int64_t   history  = dst->src[3]->ne[0] - 1;
    const int64_t   kept     = counts[0];
    const int64_t   rows     = counts[1];

    // Shares are multiples of 16 channels: whole registers.
    int64_t c0, c1;
    pydflash_share((channels + 15) / 16, ith, nth, &c0, &c1);
    c0 = 16 * c0 < channels ? 16 * c0 : channels;
    c1 = 16 * c1 < channels ? 16 * c1 : channels;
    for (int64_t t = 0; t < kept + rows; t += TOGETHER) {
        const int64_t count = kept + rows - t < TOGETHER ? kept + rows - t : TOGETHER;
        if (history + 1 == 4) {  // Qwen's kernel, as a constant
            convolve(dst, kept, t, count, 4, c0, c1);
        } else {
            convolve(dst, kept, t, count, history + 1, c0, c1);
        }
    }
    move_window(dst, kept, rows, keep, c0, c1);

    int64_t begin, end;
    pydflash_share(kept > rows ? kept : rows, ith, nth, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        move_gates(dst, kept, rows, keep, t);
    }
}
