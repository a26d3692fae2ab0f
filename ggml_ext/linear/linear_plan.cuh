// What a product kernel is given, how its work is cut, and the shapes of one block.
#pragma once

#include "linear.cuh"
#include "linear_formats.cuh"

namespace pydflash_linear {

constexpr int THREADS    = WARPS * LANES;
constexpr int MAX_STAGES = 5;                  // about 100 KiB in flight on an SM; more has nothing left to hide
constexpr int MIN_BUDGET = 93 * 1024;          // shared memory of a block: two stages of the largest format
constexpr int SLOT       = THREADS * 2 * 2 * 4;  // floats of a partial tile: 2 row tiles, 2 panels, 4 sums a lane

struct target {
    const char *  data;
    int64_t       rows, row_bytes;
    float *       out;
    int64_t       out_stride;
    const float * residual;
    int64_t       residual_stride;
    int           type;
};

struct plan {
    target     weights[PYDFLASH_LINEAR_MAX_WEIGHTS];
    int        first_unit[PYDFLASH_LINEAR_MAX_WEIGHTS + 1];
    int        n_weights, n_chunks, T, K;
    int        budget;                         // bytes of shared memory for the ring
    const char * packed;
    uint32_t * counters;                       // by the block that starts a tile; zero between products
    float *    partials;                       // two slots a block: a tile begun before it, a tile it does not end
    int        begin[MAX_BLOCKS + 1];          // block b computes units begin[b] .. begin[b + 1] - 1
};
static_assert(sizeof(plan) <= 4096, "the plan is passed by value");

template <typename F> constexpr int TILE_ROWS = F::WARPS * F::M_TILES * 16;
template <typename F> constexpr int WEIGHT_BYTES = TILE_ROWS<F> * F::STRIDE + F::skew(TILE_ROWS<F>);
template <typename F, int PANELS> constexpr int STAGE_BYTES = WEIGHT_BYTES<F> + PANELS * PANEL_BYTES;

// The place of a unit in its weight.
struct position {
    int tile, chunk;

    __device__ void advance(int n_chunks) {
        if (++chunk == n_chunks) {
            chunk = 0;
            tile++;
        }
    }
};

// Distance of a row's chunk from the 16-byte boundary before it.
template <typename F>
static __device__ __forceinline__ int misalignment(const target & w, int64_t row, int chunk) {
    const uint32_t address = (uint32_t) (uintptr_t) w.data + (uint32_t) row * (uint32_t) w.row_bytes + chunk * F::BYTES;
    return F::ALIGNED ? 0 : address & 15;
}

}  // namespace pydflash_linear
