#include "argmax.h"

#include <math.h>

// Two passes, both of which compilers vectorise: the largest value and whether all are numbers, then its first place.
static int32_t first_largest(const float * x, int64_t n, bool report) {
    float largest = -INFINITY;
    int   nans    = 0;
#pragma omp simd reduction(max : largest) reduction(| : nans)
    for (int64_t i = 0; i < n; i++) {
        largest = x[i] > largest ? x[i] : largest;
        nans |= x[i] != x[i];
    }
    if (report && (nans || isinf(largest))) {
        return -1;
    }
    int64_t i = 0;
    while (i < n - 1 && x[i] != largest) {
        i++;
    }
    return (int32_t) i;
}

void pydflash_argmax_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const bool report = pydflash_node_params(dst)[0];
    int64_t begin, end;
    pydflash_share(x->ne[1], ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const float * values = (const float *) ((const char *) x->data + row * (int64_t) x->nb[1]);
        ((int32_t *) dst->data)[row] = first_largest(values, x->ne[0], report);
    }
}
