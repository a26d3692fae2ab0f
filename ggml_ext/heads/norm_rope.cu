// norm_rope on CUDA. One block transforms one head of one row, one thread a value (norm_rope.cuh): partners of the
// rotary embedding and of the butterflies meet through shuffles within a warp and through shared memory beyond. The
// kernel reads and writes each value once; its launch bounds it at the few rows of decoding, device memory in prefill.
// Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, ncu, 24 heads of 256, 1 and 16 rows: 3.4 and 3.7 us, rotated 3.7
// and 4.0 us. The 0.8 MB of 16 rows would take 0.23 us: it is the launch that is paid.
#include "norm_rope.h"
#include "ext_cuda.cuh"
#include "norm_rope.cuh"

namespace {

template <int D>
__global__ void __launch_bounds__(D) norm_rope(const char * x, int64_t head_bytes, int64_t row_bytes, float * y,
                                               head_transform h) {
    __shared__ head_scratch<D> s;
    release_successor();
    wait_for_predecessor();
    const int     row  = blockIdx.y;
    const float * from = (const float *) (x + blockIdx.x * head_bytes + row * row_bytes);
    y[((int64_t) row * gridDim.x + blockIdx.x) * D + threadIdx.x] = transform_block<D>(from[threadIdx.x], row, h, s);
}

bool supports(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const int64_t size = x->ne[0];
    return (size == 64 || size == 128 || size == 256) && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) &&
           x->ne[2] <= 65535;
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    head_transform h;
    h.weight      = (const float *) node->src[1]->data;
    h.positions   = (const int32_t *) node->src[2]->data;
    h.signs       = node->src[3] ? (const float *) node->src[3]->data : nullptr;
    h.eps         = pydflash_node_param_f32(node, PYDFLASH_ROPE_PARAMS);
    h.group       = pydflash_node_params(node)[PYDFLASH_ROPE_PARAMS + 1];
    h.rope        = rope_frequencies_of(node);
    auto run = [&](auto kernel) {
        const dim3 grid((unsigned) x->ne[1], (unsigned) x->ne[2]);
        return launch_early(cuda, kernel, grid, (unsigned) x->ne[0], 0, (const char *) x->data, (int64_t) x->nb[1],
                            (int64_t) x->nb[2], (float *) node->data, h);
    };
    switch (x->ne[0]) {
        case 64:  return run(norm_rope<64>);
        case 128: return run(norm_rope<128>);
        case 256: return run(norm_rope<256>);
        default:  return false;
    }
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_norm_rope = { launch, supports };
