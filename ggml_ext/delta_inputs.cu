// delta_inputs on CUDA. One thread owns one channel: q|k|v channels run the convolution, gate channels the gate formulas.
//
// A block covers 128 channels and one tile of 64 new rows; the blocks of tile 0 also produce the replayed rows and move
// the window. A channel's window is touched by one thread only, so the op needs no synchronisation. The kernel reads each
// raw value once (plus K-1 per tile) and writes each result once: device memory and launch latency bound it.
#include "delta_inputs.h"
#include "ext_cuda.cuh"

namespace {

constexpr int TAPE     = PYDFLASH_TAPE_ROWS;
constexpr int KERNEL   = 4;   // columns under the convolution; the only size qwen35 files use
constexpr int HISTORY  = KERNEL - 1;
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

// The convolution of one position, then SiLU; spelt as fmaf so that replayed and new rows round alike.
__device__ float activate(float4 w, float v0, float v1, float v2, float v3) {
    const float v = fmaf(w.w, v3, fmaf(w.z, v2, fmaf(w.y, v1, __fmul_rn(w.x, v0))));
    return v / (1.0f + expf(-v));
}

// One q|k|v channel of one tile.
__device__ void convolve(const arguments & a, int c, int tile, int kept, int rows) {
    const int width = a.channels + 2 * a.heads;
    const float4 w  = *(const float4 *) (a.weight + (int64_t) c * KERNEL);
    float * column  = a.window + c;
    float v0, v1, v2;
    if (tile == 0) {
        v0 = column[0]; v1 = column[width]; v2 = column[2 * width];
        for (int t = 0; t < kept; t++) {
            const float v3 = column[(HISTORY + t) * width];
            a.out[(int64_t) t * width + c] = activate(w, v0, v1, v2, v3);
            v0 = v1; v1 = v2; v2 = v3;
        }
    } else {
        v0 = a.x[(tile * TILE - 3) * a.x_stride + c];
        v1 = a.x[(tile * TILE - 2) * a.x_stride + c];
        v2 = a.x[(tile * TILE - 1) * a.x_stride + c];
    }
    if (tile == 0 && a.keep) {
        column[0] = v0; column[width] = v1; column[2 * width] = v2;
    }
    if (tile == 0 && !a.keep) {
        // The last three columns of [v0 v1 v2 | new rows], for fewer than three new rows too.
        const float before[HISTORY] = { v0, v1, v2 };
#pragma unroll
        for (int i = 0; i < HISTORY; i++) {
            const int row = rows - HISTORY + i;
            float value = row >= 0 ? a.x[row * a.x_stride + c] : 0.0f;
#pragma unroll
            for (int j = 0; j < HISTORY; j++) {
                if (row + HISTORY == j) { value = before[j]; }
            }
            column[i * width] = value;
        }
    }
    const int last = min(rows, (tile + 1) * TILE);
    for (int t = tile * TILE; t < last; t++) {
        const float v3 = a.x[t * a.x_stride + c];
        a.out[(int64_t) (TAPE + t) * width + c] = activate(w, v0, v1, v2, v3);
        if (a.keep) { column[(HISTORY + t) * width] = v3; }
        v0 = v1; v1 = v2; v2 = v3;
    }
}

// One gate channel of one tile: log-decay for the first `heads` channels, beta for the rest.
__device__ void gate(const arguments & a, int c, int tile, int kept, int rows) {
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

__global__ void delta_inputs(arguments a) {
    const int c = blockIdx.x * CHANNELS + threadIdx.x;
    const int kept = a.counts[0], rows = a.counts[1];
    if (c < a.channels) {
        convolve(a, c, blockIdx.y, kept, rows);
    } else if (c < a.channels + 2 * a.heads) {
        gate(a, c, blockIdx.y, kept, rows);
    }
}

bool supports(const ggml_tensor * node) {
    return node->src[3]->ne[0] == KERNEL && node->src[0]->type == GGML_TYPE_F32;
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
    delta_inputs<<<grid, CHANNELS, 0, cuda->stream>>>(a);
    return true;
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_delta_inputs = { launch, supports };
