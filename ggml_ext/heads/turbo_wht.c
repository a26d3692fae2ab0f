#include "turbo_wht.h"

#include <math.h>
#include <string.h>

// The butterflies of the fast Walsh-Hadamard transform, then the scale 1/sqrt(n).
static void transform(float * x, int n) {
    for (int half = 1; half < n; half *= 2) {
        for (int base = 0; base < n; base += 2 * half) {
            for (int i = base; i < base + half; i++) {
                const float a = x[i];
                const float b = x[i + half];
                x[i]        = a + b;
                x[i + half] = a - b;
            }
        }
    }
    const float scale = 1.0f / sqrtf((float) n);
    for (int i = 0; i < n; i++) {
        x[i] *= scale;
    }
}

void pydflash_rotate(float * x, int n, const float * signs, int inverse) {
    const float * before = signs ? signs + (inverse ? n : 0) : NULL;
    const float * after  = signs ? signs + (inverse ? 0 : n) : NULL;
    for (int i = 0; before && i < n; i++) {
        x[i] *= before[i];
    }
    transform(x, n);
    for (int i = 0; after && i < n; i++) {
        x[i] *= after[i];
    }
}

void pydflash_turbo_wht_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x     = dst->src[0];
    const struct ggml_tensor * signs = dst->src[1];
    const int n       = pydflash_node_params(dst)[0];
    const int inverse = pydflash_node_params(dst)[1];

    int64_t begin, end;
    pydflash_share(ggml_nrows(x), ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const int64_t i1 = row % x->ne[1];
        const int64_t i2 = row / x->ne[1] % x->ne[2];
        const int64_t i3 = row / (x->ne[1] * x->ne[2]);
        const float * from = (const float *) ((const char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3]);
        float *       to   = (float *) dst->data + row * x->ne[0];
        memcpy(to, from, (size_t) x->ne[0] * sizeof(float));
        for (int64_t group = 0; group < x->ne[0]; group += n) {
            pydflash_rotate(to + group, n, signs ? (const float *) signs->data : NULL, inverse);
        }
    }
}
