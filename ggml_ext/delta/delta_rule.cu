// delta_rule on CUDA. One block carries 32 value columns of one head through all rows, one after the other.
//
// The block's part of the state stays in registers: four threads share a column and hold a quarter of its key rows
// each (32 of 128, the head dimension D of every published qwen35 model; other D have kernels of their own), so a row
// costs two reductions over four lanes. Rows are brought to shared memory in tiles of 16, with q and k normalised on
// the way. Key rows are dealt to the four threads in groups of four, so that their 16-byte reads of k and q fall into
// different banks. A state's scale is taken in where it is read, and is 1 where it is written: the decay is part of a
// multiply-add here.
//
// The loop over rows is serial by nature, so its latency bounds the kernel. Measured on an H100 80GB HBM3 (3.35 TB/s),
// 2026-11-27: 0.96 us a row (94 ms for 2,048 rows in 48 layers of the 27B geometry); inputs, results and states of 3
// MiB a layer, moved once, would take 2 % of that. A decode step and a cycle take 11.6 us a layer (ncu), of which moving
// the state once is 0.9 us (8 %).
#include "delta_inputs.h"
#include "delta_rule.h"
#include "ext_cuda.cuh"

namespace {

constexpr int TAPE    = PYDFLASH_TAPE_ROWS;
constexpr int COLUMNS = 32;       // value columns per block
constexpr int SPLIT   = 4;        // threads per column
constexpr int THREADS = COLUMNS * SPLIT;
constexpr int TILE    = 16;       // rows in shared memory at a time

struct arguments {
    const float * inputs;
    float *       state;
    const int *   counts;
    float *       out;
    int           rows, width, v_heads, k_heads, keep;
    float         eps;
};

// 1 / sqrt(D), the scale of q.
template <int D>
constexpr float SCALE = D == 32 ? 0.17677669529663687f : D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;

template <int D>
struct tile {
    alignas(16) float q[TILE][D];
    float k[TILE][D];
    float v[TILE][COLUMNS];
    float decay[TILE];
    float beta[TILE];
};

__device__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, offset);
    }
    return v;
}

// What one lane holds of a row of q or k: D / 32 values, read together.
template <int D>
struct alignas(D < 128 ? D / 8 : 16) piece {
    float value[D / 32];
};

// x / sqrt(sum x^2 + eps) * scale by one warp.
template <int D>
__device__ void l2_normalise(float * out, const float * x, float eps, float scale) {
    const int lane = threadIdx.x % 32;
    piece<D> v = ((const piece<D> *) x)[lane];
    float sum = v.value[0] * v.value[0];
#pragma unroll
    for (int i = 1; i < D / 32; i++) {
        sum += v.value[i] * v.value[i];
    }
    const float factor = scale / sqrtf(warp_sum(sum) + eps);
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        v.value[i] *= factor;
    }
    ((piece<D> *) out)[lane] = v;
}

template <int D>
__device__ void load(tile<D> & s, const arguments & a, int first, int rows, int head, int column) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int k_head = head % a.k_heads;
    for (int t = warp; t < rows; t += THREADS / 32) {
        const float * row = a.inputs + (int64_t) (first + t) * a.width;
        l2_normalise<D>(s.q[t], row + k_head * D, a.eps, SCALE<D>);
        l2_normalise<D>(s.k[t], row + (a.k_heads + k_head) * D, a.eps, 1.0f);
        s.v[t][lane] = row[(2 * a.k_heads + head) * D + column + lane];
        if (lane == 0) {
            s.decay[t] = expf(row[a.width - 2 * a.v_heads + head]);
            s.beta[t]  = row[a.width - a.v_heads + head];
        }
    }
}

__device__ float dot4(float a, float b, float c, float d, float4 v, float sum) {
    return fmaf(a, v.x, fmaf(b, v.y, fmaf(c, v.z, fmaf(d, v.w, sum))));
}

// One row; returns o of this thread's column (the same value in its four threads). The products are spelt as fmaf so
// that replayed and new rows round alike whatever the compiler makes of the two loops.
template <int D>
__device__ float step(float (&state)[D / SPLIT], const tile<D> & s, int t, int part, int column) {
    const float decay = s.decay[t];
    float predicted = 0.0f;
#pragma unroll
    for (int i = 0; i < D / SPLIT; i += 4) {
        const float4 k = *(const float4 *) &s.k[t][i * SPLIT + part * 4];
        predicted = dot4(state[i], state[i + 1], state[i + 2], state[i + 3], k, predicted);
    }
    predicted += __shfl_xor_sync(0xffffffffu, predicted, 1);
    predicted += __shfl_xor_sync(0xffffffffu, predicted, 2);
    const float delta = __fmul_rn(s.beta[t], fmaf(-decay, predicted, s.v[t][column]));
    float read = 0.0f;
#pragma unroll
    for (int i = 0; i < D / SPLIT; i += 4) {
        const float4 k = *(const float4 *) &s.k[t][i * SPLIT + part * 4];
        const float4 q = *(const float4 *) &s.q[t][i * SPLIT + part * 4];
        state[i] = fmaf(decay, state[i], __fmul_rn(delta, k.x));
        state[i + 1] = fmaf(decay, state[i + 1], __fmul_rn(delta, k.y));
        state[i + 2] = fmaf(decay, state[i + 2], __fmul_rn(delta, k.z));
        state[i + 3] = fmaf(decay, state[i + 3], __fmul_rn(delta, k.w));
        read = dot4(state[i], state[i + 1], state[i + 2], state[i + 3], q, read);
    }
    read += __shfl_xor_sync(0xffffffffu, read, 1);
    read += __shfl_xor_sync(0xffffffffu, read, 2);
    return read;
}

template <int D>
__device__ void load_state(float (&state)[D / SPLIT], const float * memory, float scale) {
    if (scale == 0.0f) { scale = 1.0f; }
#pragma unroll
    for (int i = 0; i < D / SPLIT; i += 4) {
        const float4 v = *(const float4 *) (memory + i * SPLIT);
        state[i] = scale * v.x; state[i + 1] = scale * v.y; state[i + 2] = scale * v.z; state[i + 3] = scale * v.w;
    }
}

// The four threads of a column have read its scale before one of them gets here: barriers lie between.
template <int D>
__device__ void store_state(const float (&state)[D / SPLIT], float * memory, float * scale, int part) {
#pragma unroll
    for (int i = 0; i < D / SPLIT; i += 4) {
        *(float4 *) (memory + i * SPLIT) = make_float4(state[i], state[i + 1], state[i + 2], state[i + 3]);
    }
    if (part == 0) { *scale = 1.0f; }
}

template <int D>
__global__ void __launch_bounds__(THREADS) delta_rule(arguments a) {
    __shared__ tile<D> s;
    release_successor();
    const int head   = blockIdx.x;
    const int base   = blockIdx.y * COLUMNS;
    const int column = threadIdx.x / SPLIT;
    const int part   = threadIdx.x % SPLIT;
    const int kept = a.counts[0], rows = a.counts[1];

    float * matrix = a.state + (int64_t) head * (D + 1) * D;
    float * memory = matrix + (base + column) * D + part * 4;
    float * scale  = matrix + D * D + base + column;
    float state[D / SPLIT];
    // Written in the step before; a step begins with copies, which no kernel overtakes.
    load_state<D>(state, memory, *scale);
    wait_for_predecessor();

    if (kept > 0) {
        load(s, a, 0, kept, head, base);
        __syncthreads();
        for (int t = 0; t < kept; t++) {
            step<D>(state, s, t, part, column);
        }
        if (a.keep) { store_state<D>(state, memory, scale, part); }
    }
    for (int first = 0; first < a.rows; first += TILE) {
        const int count = min(TILE, max(0, rows - first));
        __syncthreads();
        load(s, a, TAPE + first, count, head, base);
        __syncthreads();
        for (int t = 0; t < min(TILE, a.rows - first); t++) {
            const float o = t < count ? step<D>(state, s, t, part, column) : 0.0f;
            if (part == 0) {
                a.out[(int64_t) (first + t) * a.v_heads * D + head * D + base + column] = o;
            }
        }
    }
    if (!a.keep) { store_state<D>(state, memory, scale, part); }
}

using kernel = void (*)(arguments);

kernel kernel_of(int d) {
    switch (d) {
        case 32:  return delta_rule<32>;
        case 64:  return delta_rule<64>;
        case 128: return delta_rule<128>;
        case 256: return delta_rule<256>;
        default:  return nullptr;
    }
}

// One sequence, which has the only state. Rows of q and k must be aligned for 16-byte reads, which an odd number of value
// heads breaks.
bool supports(const ggml_tensor * node) {
    if (node->src[2]->ne[1] != 1 || node->src[1]->ne[3] != 1) { return false; }
    const int d = pydflash_node_params(node)[2];
    return kernel_of(d) && (d < 128 || node->src[0]->ne[0] % 4 == 0);
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const int32_t * params = pydflash_node_params(node);
    arguments a;
    a.inputs  = (const float *) node->src[0]->data;
    a.state   = (float *) node->src[1]->data;
    a.counts  = (const int *) node->src[2]->data;
    a.out     = (float *) node->data;
    a.rows    = (int) node->ne[1];
    a.width   = (int) node->src[0]->ne[0];
    a.v_heads = (int) node->src[1]->ne[2];
    a.k_heads = params[1];
    a.keep    = params[0];
    a.eps     = pydflash_node_param_f32(node, 3);
    const int d = params[2];
    return launch_early(cuda, kernel_of(d), dim3(a.v_heads, d / COLUMNS), THREADS, 0, a);
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_delta_rule = { launch, supports };
