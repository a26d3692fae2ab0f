// How a tile is finished: partial sums of the blocks that share it, and the result.
#pragma once

#include "linear_multiply.cuh"

namespace pydflash_linear {

// Writes product + residual for this warp's rows of a finished tile.
template <typename F, int PANELS>
static __device__ void write_tile(const plan & p, const target & w, int tile, const sums<F, PANELS> & total) {
    const int     warp  = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t first = (int64_t) tile * TILE_ROWS<F> + warp * F::M_TILES * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t row    = first + m * 16 + i / 2 * 8;
                const int     column = n * PANEL_COLS + lane % 4 * 2 + i % 2;
                if (row < w.rows && column < p.T) {
                    const float residual = w.residual ? w.residual[column * w.residual_stride + row] : 0.0f;
                    w.out[column * w.out_stride + row] = total[m][n][i] + residual;
                }
            }
        }
    }
}

template <int PANELS>
static __device__ __forceinline__ float4 * slot_part(const plan & p, int slot, int m, int n) {
    return (float4 *) (p.partials + (int64_t) slot * SLOT) + (m * PANELS + n) * THREADS + threadIdx.x;
}

// Adds the partial sums that blocks first..last left of a tile, in that order: the block that began the tile, then
// those that went on with it.
template <typename F, int PANELS>
static __device__ void add_partials(const plan & p, int first, int last, sums<F, PANELS> & total) {
#pragma unroll
    for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[m][n][i] = 0.0f;
            }
        }
    }
#pragma unroll 4
    for (int block = first; block <= last; block++) {
        const bool empty = p.begin[block] == p.begin[block + 1];
        const int  slot  = 2 * block + (block == first);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int n = 0; n < PANELS; n++) {
                const float4 part = empty ? make_float4(0, 0, 0, 0) : __ldcg(slot_part<PANELS>(p, slot, m, n));
                total[m][n][0] += part.x;
                total[m][n][1] += part.y;
                total[m][n][2] += part.z;
                total[m][n][3] += part.w;
            }
        }
    }
}

// Leaves this block's share of a tile for the last of its blocks. True in that block, with the sum of all shares in
// `total`. tile_unit is the first unit of the tile.
template <typename F, int PANELS>
static __device__ bool combine(const plan & p, int tile_unit, sums<F, PANELS> & total) {
    __shared__ bool arrived_last;

    int first = blockIdx.x, last = blockIdx.x;
    while (p.begin[first] > tile_unit) {
        first--;
    }
    while (p.begin[last + 1] < tile_unit + p.n_chunks) {
        last++;
    }
    const bool computes = threadIdx.x / LANES < F::WARPS;
    if (computes) {
        const int slot = 2 * blockIdx.x + (blockIdx.x == first);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int n = 0; n < PANELS; n++) {
                const float(&c)[4] = total[m][n];
                *slot_part<PANELS>(p, slot, m, n) = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int shares = 0;
        for (int block = first; block <= last; block++) {
            shares += p.begin[block] < p.begin[block + 1];
        }
        arrived_last = (int) atomicAdd(p.counters + first, 1u) == shares - 1;
        if (arrived_last) {
            p.counters[first] = 0;
        }
    }
    __syncthreads();
    if (!arrived_last) {
        return false;
    }
    __threadfence();
    if (computes) {
        add_partials<F, PANELS>(p, first, last, total);
    }
    return true;
}

}  // namespace pydflash_linear
