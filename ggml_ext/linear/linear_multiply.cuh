// The arithmetic of one unit: a warp's rows of weights times one chunk of the packed activations.
#pragma once

#include "linear_plan.cuh"

namespace pydflash_linear {

static __device__ __forceinline__ void mma(float (&c)[4], uint2 low, uint2 high, uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b.x), "r"(b.y));
}

static __device__ __forceinline__ void mma_tf32(float (&c)[4], uint32_t low0, uint32_t high0, uint32_t low1,
                                                uint32_t high1, float2 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

// The tf32 form of a step: values 0 and 2 first, then 1 and 3, as the activations are ordered.
static __device__ __forceinline__ void mma(float (&c)[4], uint4 low, uint4 high, uint2 b) {
    mma_tf32(c, low.x, high.x, low.z, high.z, __half22float2(as_half2(b.x)));
    mma_tf32(c, low.y, high.y, low.w, high.w, __half22float2(as_half2(b.y)));
}

// The sums of a warp's rows: [row tile][panel][sum], sums 0 and 1 for row g and columns 2t and 2t+1, 2 and 3 for g + 8.
template <typename F, int PANELS> using sums = float[F::M_TILES][PANELS][4];

// What the chunk's minima subtract: minimum of a block times the sum of its activations, before the row's factor.
template <typename F, int PANELS>
static __device__ __forceinline__ void multiply_minima(const typename F::row (&rows)[2 * F::M_TILES],
                                                       const char * panels, sums<F, PANELS> & result) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int n = 0; n < PANELS; n++) {
        const uint2 b = *(const uint2 *) (panels + n * PANEL_BYTES + SUMS_OFFSET + lane * 8);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
            const uint32_t low = rows[2 * m].minima, high = rows[2 * m + 1].minima;
            mma(result[m][n], make_uint2(low, low), make_uint2(high, high), b);
        }
    }
}

// Adds the product of this warp's rows with one chunk of the activations.
template <typename F, int PANELS>
static __device__ void multiply_chunk(const uint8_t * stage, const target & w, position at, sums<F, PANELS> & total) {
    const int    warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    const char * panels = (const char *) stage + WEIGHT_BYTES<F>;

    typename F::row rows[2 * F::M_TILES];
#pragma unroll
    for (int i = 0; i < 2 * F::M_TILES; i++) {
        const int row = warp * F::M_TILES * 16 + i * 8 + g;
        rows[i].load(stage + row * F::STRIDE + F::skew(row) +
                         misalignment<F>(w, (int64_t) at.tile * TILE_ROWS<F> + row, at.chunk), t);
    }
    sums<F, PANELS> part = {};
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
        uint4 b[PANELS];
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
            b[n] = F::activations(panels + n * PANEL_BYTES, pair, lane);
        }
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const auto low = rows[2 * m].weights(2 * pair + odd), high = rows[2 * m + 1].weights(2 * pair + odd);
#pragma unroll
                for (int n = 0; n < PANELS; n++) {
                    mma(part[m][n], low, high, odd ? make_uint2(b[n].z, b[n].w) : make_uint2(b[n].x, b[n].y));
                }
            }
        }
    }
    sums<F, PANELS> less = {};
    if constexpr (F::MINIMUM) {
        multiply_minima<F, PANELS>(rows, panels, less);
    }
#pragma unroll
    for (int n = 0; n < PANELS; n++) {
        const float2 column = *(const float2 *) (panels + n * PANEL_BYTES + SCALE_OFFSET + 8 * t);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float factor = i % 2 ? column.y : column.x;
                if constexpr (F::MINIMUM) {
                    total[m][n][i] = fmaf(less[m][n][i], -factor * rows[2 * m + i / 2].minimum(), total[m][n][i]);
                }
                if constexpr (F::FLOAT_SCALE) {
                    factor *= rows[2 * m + i / 2].scale();
                }
                total[m][n][i] = fmaf(part[m][n][i], factor, total[m][n][i]);
            }
        }
    }
}

}  // namespace pydflash_linear
