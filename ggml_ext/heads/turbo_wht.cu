// turbo_wht on CUDA. One warp rotates one group of 64, 128 or 256 values; a block holds 8 warps.
//
// Each lane keeps n/32 consecutive values in registers: the first log2(n/32) butterfly stages stay inside the lane, the
// last five exchange with the lane whose index differs in one bit (__shfl_xor_sync). No shared memory. The kernel reads
// and writes each value once, so device memory bounds it. Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, ncu, 24
// heads of 256: 3.9 us for 1 row and for 16, of which moving 0.8 MB would take 0.23 us (6 %): the launch is what is paid.
#include "ext_cuda.cuh"
#include "turbo_wht.cuh"

namespace {

constexpr int WARPS = 8;

struct strides { int64_t ne1, ne2, nb1, nb2, nb3; };

template <int N>
__global__ void turbo_wht(const char * x, float * y, const float * signs, int inverse, int64_t columns, int64_t groups,
                          strides s) {
    release_successor();
    wait_for_predecessor();
    const int64_t group = (int64_t) blockIdx.x * WARPS + threadIdx.y;
    if (group >= groups) {
        return;
    }
    constexpr int PER_LANE = N / 32;
    const int     lane     = threadIdx.x;
    const int64_t per_row  = columns / N;
    const int64_t row      = group / per_row;
    const int64_t column   = (group % per_row) * N + lane * PER_LANE;

    const int64_t i1 = row % s.ne1, i2 = row / s.ne1 % s.ne2, i3 = row / (s.ne1 * s.ne2);
    const float * from = (const float *) (x + i1 * s.nb1 + i2 * s.nb2 + i3 * s.nb3) + column;

    float v[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        v[i] = from[i] * (signs ? signs[(inverse ? N : 0) + lane * PER_LANE + i] : 1.0f);
    }
    hadamard_warp<N>(v, lane);
    float * to = y + row * columns + column;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        to[i] = v[i] * (signs ? signs[(inverse ? 0 : N) + lane * PER_LANE + i] : 1.0f);
    }
}

bool supports(const ggml_tensor * node) {
    const int n = pydflash_node_params(node)[0];
    return (n == 64 || n == 128 || n == 256) && node->src[0]->type == GGML_TYPE_F32 &&
           node->src[0]->nb[0] == sizeof(float) && node->src[0]->ne[0] % n == 0;
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const ggml_tensor * x      = node->src[0];
    const float *       signs  = node->src[1] ? (const float *) node->src[1]->data : nullptr;
    const int           n      = pydflash_node_params(node)[0];
    const int           inv    = pydflash_node_params(node)[1];
    const int64_t       groups = ggml_nelements(x) / n;
    const strides       s      = { x->ne[1], x->ne[2], (int64_t) x->nb[1], (int64_t) x->nb[2], (int64_t) x->nb[3] };
    const dim3          block(32, WARPS);
    const dim3          grid((unsigned) ((groups + WARPS - 1) / WARPS));
    auto run = [&](auto kernel) {
        return launch_early(cuda, kernel, grid, block, 0, (const char *) x->data, (float *) node->data, signs, inv,
                            x->ne[0], groups, s);
    };
    switch (n) {
        case 64: return run(turbo_wht<64>);
        case 128: return run(turbo_wht<128>);
        case 256: return run(turbo_wht<256>);
        default:  return false;
    }
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_turbo_wht = { launch, supports };
