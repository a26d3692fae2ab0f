// delta_inputs on CUDA. One thread owns one channel: q|k|v channels run the convolution, gate channels the gate
// formulas.
//
// A block covers 128 channels and one tile of 64 new rows; the blocks of tile 0 also produce the replayed rows and
// move the window. A channel's window is touched by one thread only, so the op needs no synchronisation. The kernel
// reads each raw value once (plus K-1 per tile) and writes each result once: device memory bounds it in prefill, its
// launch at the few rows of decoding. Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27: 2,048 rows of the 27B
// geometry in 125 us a layer = 1.4 TB/s, 40 % of the bound; steps of 1 and 16 rows 8.2 us (ncu), launch and latency.
#include "delta_inputs.h"
#include "ext_cuda.cuh"

namespace {

constexpr int TAPE     = PYDFLASH_TAPE_ROWS;
constexpr int CHANNELS = 128;
constexpr int TILE     = 64;  // new rows per block

struct arguments {
    const float * x;     int64_t x_stride;
    const float * alpha; int64_t alpha_stride;
    const float * beta;  int64_t beta_stride;
    const float * weight;
    const float * ssm_a;
    const float * dt_bias;
    float *       window;
    const int *   counts;
    float *       out;
    int           channels, heads, rows, keep;
};

// K columns under the convolution: 4 in every published qwen35 model.
template <int K>
struct taps {
    float weight[K];
    float past[K - 1];

    __device__ void load(const float * weights) {
        if constexpr (K == 4) {
            *(float4 *) weight = *(const float4 *) weights;
        } else {
#pragma unroll
            for (int j = 0; j < K; j++) { weight[j] = weights[j]; }
        }
    }

    // The convolution of the position of `value`, then SiLU. Spelt as fmaf so that replayed and new rows round alike.
    __device__ float activate(float value) const {
        float v = __fmul_rn(weight[0], past[0]);
#pragma unroll
        for (int j = 1; j < K - 1; j++) { v = fmaf(weight[j], past[j], v); }
        v = fmaf(weight[K - 1], value, v);
        return v / (1.0f + expf(-v));
    }

    __device__ void push(float value) {
#pragma unroll
        for (int j = 0; j < K - 2; j++) { past[j] = past[j + 1]; }
        past[K - 2] = value;
    }
};

// One q|k|v channel of one tile.
template <int K>
__device__ void convolve(const arguments & a, int c, int tile, int kept, int rows) {
    constexpr int HISTORY = K - 1;
    const int width = a.channels + 2 * a.heads;
    float * column  = a.window + c;
    taps<K> s;
    s.load(a.weight + (int64_t) c * K);
    if (tile == 0) {
#pragma unroll
        for (int j = 0; j < HISTORY; j++) { s.past[j] = column[j * width]; }
        for (int t = 0; t < kept; t++) {
            const float value = column[(HISTORY + t) * width];
            a.out[(int64_t) t * width + c] = s.activate(value);
            s.push(value);
        }
    } else {
#pragma unroll
        for (int j = 0; j < HISTORY; j++) { s.past[j] = a.x[(tile * TILE - HISTORY + j) * a.x_stride + c]; }
    }
    if (tile == 0) {
        taps<K> end = s;
        if (!a.keep) {  // the last columns of [past | new rows]
#pragma unroll
            for (int row = rows - HISTORY, j = 0; j < HISTORY; row++, j++) {
                if (row >= 0) { end.push(a.x[row * a.x_stride + c]); }
            }
        }
#pragma unroll
        for (int j = 0; j < HISTORY; j++) { column[j * width] = end.past[j]; }
    }
    const int last = min(rows, (tile + 1) * TILE);
    for (int t = tile * TILE; t < last; t++) {
        const float value = a.x[t * a.x_stride + c];
        a.out[(int64_t) (TAPE + t) * width + c] = s.activate(value);
        s.push(value);
        if (a.keep) { column[(HISTORY + t) * width] = value; }
    }
}

// One gate channel of one tile: log-decay for the first `heads` channels, beta for the rest.
template <int K>
__device__ void gate(const arguments & a, int c, int tile, int kept, int rows) {
    constexpr int HISTORY = K - 1;
    const int width = a.channels + 2 * a.heads;
    const int head  = c - a.channels < a.heads ? c - a.channels : c - a.channels - a.heads;
    const bool decay = c - a.channels < a.heads;
    float * column = a.window + c;
    for (int t = 0; tile == 0 && t < kept; t++) {
        a.out[(int64_t) t * width + c] = column[(HISTORY + t) * width];
    }
    const int last = min(rows, (tile + 1) * TILE);
    for (int t = tile * TILE; t < last; t++) {
        float value;
        if (decay) {
            const float v = a.alpha[t * a.alpha_stride + head] + a.dt_bias[head];
            value = a.ssm_a[head] * (v > 20.0f ? v : log1pf(expf(v)));
        } else {
            value = 1.0f / (1.0f + expf(-a.beta[t * a.beta_stride + head]));
        }
        a.out[(int64_t) (TAPE + t) * width + c] = value;
        if (a.keep) { column[(HISTORY + t) * width] = value; }
    }
}

template <int K>
__global__ void delta_inputs(arguments a) {
    release_successor();
    wait_for_predecessor();
    const int c = blockIdx.x * CHANNELS + threadIdx.x;
    const int kept = a.counts[0], rows = a.counts[1];
    if (c < a.channels) {
        convolve<K>(a, c, blockIdx.y, kept, rows);
    } else if (c < a.channels + 2 * a.heads) {
        gate<K>(a, c, blockIdx.y, kept, rows);
    }
}

using kernel = void (*)(arguments);
constexpr kernel KERNELS[] = {  // by K, from 2 on
    delta_inputs<2>,  delta_inputs<3>,  delta_inputs<4>,  delta_inputs<5>,  delta_inputs<6>,
    delta_inputs<7>,  delta_inputs<8>,  delta_inputs<9>,  delta_inputs<10>, delta_inputs<11>,
    delta_inputs<12>, delta_inputs<13>, delta_inputs<14>, delta_inputs<15>, delta_inputs<16>,
};
static_assert(sizeof(KERNELS) / sizeof(KERNELS[0]) == PYDFLASH_MAX_TAPS - 1, "a kernel for every number of taps");

// Of one sequence, which has the only window.
bool supports(const ggml_tensor * node) {
    if (node->src[7]->ne[1] != 1 || node->src[6]->ne[2] != 1) { return false; }
    return node->src[3]->ne[0] >= 2 && node->src[3]->ne[0] <= PYDFLASH_MAX_TAPS && node->src[0]->type == GGML_TYPE_F32;
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    auto f32    = [&](int i) { return (float *) node->src[i]->data; };
    auto stride = [&](int i) { return (int64_t) (node->src[i]->nb[1] / sizeof(float)); };
    arguments a;
    a.x = f32(0);     a.x_stride = stride(0);
    a.alpha = f32(1); a.alpha_stride = stride(1);
    a.beta = f32(2);  a.beta_stride = stride(2);
    a.weight = f32(3); a.ssm_a = f32(4); a.dt_bias = f32(5); a.window = f32(6);
    a.counts = (const int *) node->src[7]->data;
    a.out = (float *) node->data;
    a.channels = (int) node->src[0]->ne[0];
    a.heads = (int) node->src[4]->ne[0];
    a.rows = (int) node->src[0]->ne[1];
    a.keep = pydflash_node_params(node)[0];
    const dim3 grid((a.channels + 2 * a.heads + CHANNELS - 1) / CHANNELS, (a.rows + TILE - 1) / TILE);
    return launch_early(cuda, KERNELS[node->src[3]->ne[0] - 2], grid, CHANNELS, 0, a);
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_delta_inputs = { launch, supports };
