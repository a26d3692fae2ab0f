// rope on CUDA. One block turns one head of one row, one thread a value. A thread reads its partner from memory too, in
// sectors that another thread of the block loads anyway: device memory moves each value once and bounds the kernel in
// prefill, its launch at the few rows of decoding. Models use norm_rope and store_kv; this is the unfused operation.
// Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, ncu, 24 heads of 256: 1 row 3.1 us, 16 rows 2.8 us, of which moving
// 0.8 MB would take 0.23 us (8 %): the launch is what is paid.
#include "ext_cuda.cuh"
#include "rope.cuh"

namespace {

__global__ void __launch_bounds__(PYDFLASH_MAX_HEAD)
rope(const char * x, int64_t head_bytes, int64_t row_bytes, float * y, const int32_t * positions, rope_frequencies f) {
    release_successor();
    wait_for_predecessor();
    const int     row  = blockIdx.y, i = threadIdx.x, half = f.dims / 2;
    const float * from = (const float *) (x + blockIdx.x * head_bytes + row * row_bytes);
    float         v    = from[i];
    if (i < f.dims) {
        v = turn(v, from[i < half ? i + half : i - half], i, positions[row], f);
    }
    y[((int64_t) row * gridDim.x + blockIdx.x) * blockDim.x + i] = v;
}

bool supports(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    return x->ne[0] <= PYDFLASH_MAX_HEAD && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[2] <= 65535;
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const dim3 grid((unsigned) x->ne[1], (unsigned) x->ne[2]);
    return launch_early(cuda, rope, grid, (unsigned) x->ne[0], 0, (const char *) x->data, (int64_t) x->nb[1],
                        (int64_t) x->nb[2], (float *) node->data, (const int32_t *) node->src[1]->data,
                        rope_frequencies_of(node));
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_rope = { launch, supports };
