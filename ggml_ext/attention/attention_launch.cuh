// How the host chooses the shape of attention's blocks and launches its two kernels.
#pragma once

#include "attention_kernel.cuh"
#include "attention_merge.cuh"

namespace pydflash_attention {

template <int D, int NT>
static int shared_bytes(const job & j) {
    using S = tiling<D, NT>;
    return S::Q_BYTES + S::P_BYTES + S::SLOTS * (k_stride<D>(j.k_type) + v_stride<D>(j.v_type));
}

// What one configuration costs, in units of a tile with one column tile: the longest block, or all blocks over the SMs.
// A tile costs about as much as two column tiles before the first column is counted.
template <int D, int NT>
static int64_t cost(const job & j, int sm_count, int shared_limit) {
    using S = tiling<D, NT>;
    const int wanted = j.rows * (j.heads / j.kv_heads);
    if (shared_bytes<D, NT>(j) + (int) sizeof(columns_of<D, NT>) + 1024 > shared_limit ||
        (NT > 1 && 8 * (NT / 2) >= wanted)) {
        return INT64_MAX;
    }
    const int64_t tiles   = divide_up(j.slots, S::SLOTS);
    const int     chunk   = j.slots > TIER2_SLOTS ? TIER3_CHUNK : j.slots > TIER1_SLOTS ? TIER2_CHUNK : TIER1_CHUNK;
    const int64_t longest = chunk / S::SLOTS;
    const int64_t all     = tiles * j.kv_heads * divide_up(wanted, S::COLUMNS) / sm_count;
    return (all > longest ? all : longest) * (2 + NT);
}

// Whether the narrowest configuration fits the shared memory of a block, and cp.async the alignment of the slots.
template <int D>
static bool fits_size(const job & j, int shared_limit) {
    return cost<D, 1>(j, 1, shared_limit) != INT64_MAX && j.k_stride % copy_piece<D>(j.k_type) == 0 &&
           j.v_stride % copy_piece<D>(j.v_type) == 0;
}

static bool fits(const job & j, int head_size, int shared_limit) {
    return head_size == 64  ? fits_size<64>(j, shared_limit)
         : head_size == 128 ? fits_size<128>(j, shared_limit)
         : head_size == 256 ? fits_size<256>(j, shared_limit) : false;
}

template <int D, int NT>
static bool launch_attend(const pydflash_cuda * cuda, const job & j) {
    using S = tiling<D, NT>;
    const int  bytes  = shared_bytes<D, NT>(j);
    const int  wanted = j.rows * (j.heads / j.kv_heads);
    const dim3 grid((unsigned) (j.chunks * j.kv_heads), (unsigned) divide_up(wanted, S::COLUMNS));
    return cudaFuncSetAttribute(attend<D, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess &&
           launch_early(cuda, attend<D, NT>, grid, S::THREADS, (size_t) bytes, j);
}

template <int D>
static bool launch_size(const pydflash_cuda * cuda, const job & j, int shared_limit) {
    const int     sm_count = cuda->sm_count;
    const int64_t costs[] = { cost<D, 1>(j, sm_count, shared_limit), cost<D, 2>(j, sm_count, shared_limit),
                              cost<D, 4>(j, sm_count, shared_limit), cost<D, 8>(j, sm_count, shared_limit),
                              cost<D, 12>(j, sm_count, shared_limit) };
    int best = 0;
    for (int i = 1; i < 5; i++) {
        best = costs[i] < costs[best] ? i : best;
    }
    if (costs[best] == INT64_MAX) {
        return false;
    }
    bool (*const attends[])(const pydflash_cuda *, const job &) = {
        launch_attend<D, 1>, launch_attend<D, 2>, launch_attend<D, 4>, launch_attend<D, 8>, launch_attend<D, 12>
    };
    return attends[best](cuda, j) && launch_early(cuda, merge<D>, j.rows * j.heads, D, j.chunks * sizeof(float2), j);
}

static size_t scratch_bytes(int items, int chunks, int head_size) {
    return (size_t) items * chunks * (sizeof(float2) + head_size * sizeof(float));
}

// Fills in the scratch pointers and launches both kernels; false when a tile does not fit the device's shared memory.
static bool launch_job(const pydflash_cuda * cuda, job j, int head_size, void * scratch, int shared_limit) {
    j.partials = (float *) scratch;
    j.stats    = (float2 *) (j.partials + (size_t) j.rows * j.heads * j.chunks * head_size);
    switch (head_size) {
        case 64:  return launch_size<64>(cuda, j, shared_limit);
        case 128: return launch_size<128>(cuda, j, shared_limit);
        case 256: return launch_size<256>(cuda, j, shared_limit);
        default:  return false;
    }
}

}  // namespace pydflash_attention
