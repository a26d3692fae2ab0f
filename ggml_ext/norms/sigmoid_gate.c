#include "sigmoid_gate.h"

#include "lanes.h"

void pydflash_sigmoid_gate_cpu(struct ggml_tensor * dst, int ith, int nth, void * op) {
    (void) op;
    const int64_t columns = dst->ne[0];
    int64_t begin, end;
    pydflash_share(ggml_nrows(dst), ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const float * x = pydflash_row(dst->src[0], row), * gate = pydflash_row(dst->src[1], row);
        float *       y = (float *) dst->data + row * columns;
        for (int64_t i = 0; i < columns; i += LANES) {
            const int64_t left = columns - i;
            store_first(y + i, left, load_first(x + i, left) * sigmoid_lanes(load_first(gate + i, left)));
        }
    }
}
