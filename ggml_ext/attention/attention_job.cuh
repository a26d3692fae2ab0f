// What the attention kernels are given, how the cache is cut into chunks and tiles, and the shape of one block.
#pragma once

#include "kv_formats.cuh"

namespace pydflash_attention {

constexpr float LOG2_E = 1.4426950408889634f;

struct job {
    const float *   q;
    const char *    k;
    const char *    v;
    const int32_t * positions;
    const int32_t * slot_positions;
    float *         out;
    float2 *        stats;     // (T * H, chunks): maximum (base 2) and sum
    float *         partials;  // (T * H, chunks, D), unnormalised
    int64_t         k_stride, v_stride;  // bytes between slots
    ggml_type       k_type, v_type;
    int             rows, heads, kv_heads, slots, chunks;
    int             causal, window;
    float           scale_log2;  // scale * LOG2_E: the kernel works in powers of two
};

// ---- chunks: short at first, so that many SMs share a short cache; long later, so that partial results stay few ----

constexpr int TIER1_SLOTS = 2048,  TIER1_CHUNK = 128;
constexpr int TIER2_SLOTS = 32768, TIER2_CHUNK = 512;
constexpr int                      TIER3_CHUNK = 2048;
constexpr int TIER1_COUNT = TIER1_SLOTS / TIER1_CHUNK;
constexpr int TIER2_COUNT = TIER1_COUNT + (TIER2_SLOTS - TIER1_SLOTS) / TIER2_CHUNK;

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

__host__ __device__ constexpr int chunk_count(int slots) {
    return slots <= TIER1_SLOTS ? divide_up(slots, TIER1_CHUNK)
         : slots <= TIER2_SLOTS ? TIER1_COUNT + divide_up(slots - TIER1_SLOTS, TIER2_CHUNK)
                                : TIER2_COUNT + divide_up(slots - TIER2_SLOTS, TIER3_CHUNK);
}

__host__ __device__ constexpr int chunk_begin(int chunk) {
    return chunk < TIER1_COUNT ? chunk * TIER1_CHUNK
         : chunk < TIER2_COUNT ? TIER1_SLOTS + (chunk - TIER1_COUNT) * TIER2_CHUNK
                               : TIER2_SLOTS + (chunk - TIER2_COUNT) * TIER3_CHUNK;
}

// ---- the shape of one block ----

template <int D, int NT>  // NT: column tiles of 8
struct tiling {
    static constexpr int WARPS   = D / 32;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int COLUMNS = 8 * NT;
    static constexpr int SLOTS   = 16 * WARPS;         // per tile; must not depend on NT
    static constexpr int MT      = NT >= 6 ? 2 : 1;    // 16-slot tiles a warp scores; 2: half the columns, Q read less
    static constexpr int WM      = WARPS / MT;         // warps along the slots
    static constexpr int NTW     = NT / MT;            // column tiles per warp
    static constexpr int BLOCKS  = (NT >= 6 ? 256 : NT == 1 ? 768 : 512) / THREADS;  // per SM, as registers allow
    static constexpr int Q_BYTES = COLUMNS * D * 2;
    static constexpr int P_BYTES = WARPS * NT * 256;
    static_assert(TIER1_CHUNK % SLOTS == 0, "a tile belongs to one chunk");
};

constexpr int MAX_TILES = TIER3_CHUNK / tiling<64, 1>::SLOTS;

// How a head's slice of a slot lies in memory and in a tile.
template <typename F, int D>
struct slice {
    static constexpr int BYTES    = D / 32 * F::BLOCK;
    static constexpr int PIECE    = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : 4;  // of one cp.async
    static constexpr int PIECES   = BYTES / PIECE;
    static constexpr int K_STRIDE = BYTES + 4 * F::k_padding(BYTES / 4);
    static constexpr int V_STRIDE = BYTES + 4 * F::v_padding(BYTES / 4);
};

// The same facts of a format that is known at run time.
template <int D>
__host__ __device__ __forceinline__ int k_stride(ggml_type type) {
    return of_format(type, [](auto f) { return slice<decltype(f), D>::K_STRIDE; });
}

template <int D>
__host__ __device__ __forceinline__ int v_stride(ggml_type type) {
    return of_format(type, [](auto f) { return slice<decltype(f), D>::V_STRIDE; });
}

template <int D>
__host__ __device__ __forceinline__ int copy_piece(ggml_type type) {
    return of_format(type, [](auto f) { return slice<decltype(f), D>::PIECE; });
}

}  // namespace pydflash_attention
