#include "top_k.h"

#include "order.h"

static uint64_t largest_below(const float * x, int64_t n, uint64_t limit) {
    uint64_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint64_t key = pydflash_order_key(x[i], i);
        largest = key < limit && key > largest ? key : largest;
    }
    return largest;
}

void pydflash_top_k_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const struct ggml_tensor * x = dst->src[0];
    const int64_t k = dst->ne[0];
    int64_t begin, end;
    pydflash_share(x->ne[1], ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        int32_t * indices = (int32_t *) dst->data + row * k;
        uint64_t  key     = UINT64_MAX;
        for (int64_t j = 0; j < k; j++) {
            key        = largest_below(pydflash_row(x, row), x->ne[0], key);
            indices[j] = pydflash_order_index(key);
        }
    }
}
