#include "linear.h"

#include "ggml-cpu.h"

#include <stdlib.h>

// Weight rows that one pass over the activation rows uses: they stay in the L2 cache while T rows stream past.
#define BLOCK_ROWS 16

// All rows of x in the type that the dot product wants. Custom ops have no barrier, so every thread converts for itself
// into memory of its own, which grows to the largest product the thread has seen and lives as long as the thread.
static const char * converted(const struct ggml_tensor * x, enum ggml_type type, size_t row_size) {
    static _Thread_local char * buffer   = NULL;
    static _Thread_local size_t capacity = 0;

    const size_t needed = row_size * (size_t) x->ne[1];
    if (needed > capacity) {
        free(buffer);
        buffer   = (char *) malloc(needed);
        capacity = needed;
        GGML_ASSERT(buffer != NULL);
    }
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(type)->from_float;
    for (int64_t t = 0; t < x->ne[1]; t++) {
        const char * row = (const char *) x->data + (size_t) t * x->nb[1];
        from_float((const float *) row, buffer + (size_t) t * row_size, x->ne[0]);
    }
    return buffer;
}

void pydflash_linear_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const struct ggml_tensor * w = dst->src[1];

    const struct ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(w->type);
    const int    K        = (int) x->ne[0];
    const size_t row_size = ggml_row_size(traits->vec_dot_type, K);

    int64_t begin, end;
    pydflash_share(w->ne[1], ith, nth, &begin, &end);
    if (begin == end) {
        return;
    }
    const char * rows = converted(x, traits->vec_dot_type, row_size);

    for (int64_t block = begin; block < end; block += BLOCK_ROWS) {
        const int64_t block_end = block + BLOCK_ROWS < end ? block + BLOCK_ROWS : end;
        for (int64_t t = 0; t < x->ne[1]; t++) {
            float *      result = (float *) ((char *) dst->data + (size_t) t * dst->nb[1]);
            const char * row    = rows + (size_t) t * row_size;
            for (int64_t m = block; m < block_end; m++) {
                // One row at a time (the last argument), always: the two-row kernels of some CPUs round differently.
                traits->vec_dot(K, result + m, 0, (const char *) w->data + (size_t) m * w->nb[1], 0, row, 0, 1);
            }
        }
    }
}
