#include "rms_norm.h"

#include "lanes.h"

#include <math.h>

// Registers of sums, which do not wait for one another.
#define SUMS 4

static float inverse_rms(const float * x, int64_t n, float eps) {
    lanes squares[SUMS] = { 0 };
    for (int64_t i = 0; i < n; i += SUMS * LANES) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < SUMS; j++) {
            const lanes part = load_first(x + i + j * LANES, n - i - j * LANES);
            squares[j] = multiply_add(part, part, squares[j]);
        }
    }
    const four_lanes sums = sum_four(squares);
    return 1.0f / sqrtf(((sums[0] + sums[2]) + (sums[1] + sums[3])) / (float) n + eps);
}

void pydflash_rms_norm_row(float * y, const float * x, const float * weight, int64_t n, float eps) {
    const float scale = inverse_rms(x, n, eps);
    for (int64_t i = 0; i < n; i += LANES) {
        store_first(y + i, n - i, load_first(x + i, n - i) * scale * load_first(weight + i, n - i));
    }
}

static void multiply_by_silu(float * y, const float * z, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        store_first(y + i, n - i, load_first(y + i, n - i) * silu_lanes(load_first(z + i, n - i)));
    }
}

void pydflash_rms_norm_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0], * z = dst->src[2];
    const float * weight = (const float *) dst->src[1]->data;
    const float   eps    = pydflash_node_param_f32(dst, 0);
    int64_t begin, end;
    pydflash_share(ggml_nrows(x), ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        float * y = (float *) dst->data + row * x->ne[0];
        pydflash_rms_norm_row(y, pydflash_row(x, row), weight, x->ne[0], eps);
        if (z) {
            multiply_by_silu(y, pydflash_row(z, row), x->ne[0]);
        }
    }
}
