// The kernel that computes one chunk of the cache (attention.cu describes it): what the block works on, which of its
// tiles anybody sees, how tiles arrive, and what it leaves.
#pragma once

#include "attention.h"
#include "attention_softmax.cuh"
#include "async_copy.cuh"
#include "ext_cuda.cuh"

#include <climits>

namespace pydflash_attention {

// The slots and the key/value head of this block.
template <int D, int NT>
struct share {
    int kv_head, chunk, begin, count, tiles;

    __device__ __forceinline__ explicit share(const job & j) {
        kv_head = blockIdx.x % j.kv_heads;
        chunk   = j.chunks - 1 - (int) (blockIdx.x / j.kv_heads);  // the long chunks come last and start first
        begin   = chunk_begin(chunk);
        count   = min(chunk_begin(chunk + 1), j.slots) - begin;
        tiles   = divide_up(count, tiling<D, NT>::SLOTS);
    }
};

// Where the tiles lie in shared memory.
template <int D, int NT>
struct tiles_at {
    char * q, * p, * k, * v;

    __device__ __forceinline__ tiles_at(char * shared, const job & j) {
        using S = tiling<D, NT>;
        q = shared;
        p = q + S::Q_BYTES;
        k = p + S::P_BYTES;
        v = k + S::SLOTS * k_stride<D>(j.k_type);
    }
};

// ---- which tiles anybody sees ----

// The smallest and largest bounds of the rows' visible positions, padding left out.
struct bounds { int min_first, max_first, min_last, max_last; };

static __device__ __forceinline__ bounds visible_bounds(const job & j) {
    const int           lane = threadIdx.x % 32;
    const int           qpos = lane < j.rows ? j.positions[lane] : -1;
    const pydflash_span span = pydflash_attention_span(qpos, j.causal, j.window);
    return { __reduce_min_sync(0xffffffffu, qpos < 0 ? INT_MAX : span.first),
             __reduce_max_sync(0xffffffffu, qpos < 0 ? 0 : span.first),
             __reduce_min_sync(0xffffffffu, qpos < 0 ? INT_MAX : span.last),
             __reduce_max_sync(0xffffffffu, qpos < 0 ? -1 : span.last) };
}

constexpr int SEEN = 1, MASKED = 2;  // some row sees something of a tile; some row may not see all of it

template <int D, int NT>
static __device__ __forceinline__ void classify_tiles(const job & j, const bounds & b, const share<D, NT> & own,
                                                      int * state) {
    using S = tiling<D, NT>;
    for (int i = threadIdx.x; i < own.tiles * S::SLOTS; i += S::THREADS) {
        const int kpos = slot_position(j, own.begin + i);
        const int seen = __any_sync(0xffffffffu, kpos >= b.min_first && kpos <= b.max_last);
        const int all  = __all_sync(0xffffffffu, kpos >= b.max_first && kpos <= b.min_last);
        if (threadIdx.x % 32 == 0) {
            atomicOr(&state[i / S::SLOTS], (seen ? SEEN : 0) | (all ? 0 : MASKED));
        }
    }
}

static __device__ __forceinline__ int next_seen(const int * state, int tile, int tiles) {
    while (tile < tiles && !(state[tile] & SEEN)) {
        tile++;
    }
    return tile;
}

// Fills in what is known of the columns and of the tiles before the first product.
template <int D, int NT>
static __device__ __forceinline__ void prepare(const job & j, const share<D, NT> & own, columns_of<D, NT> & col,
                                               int * state) {
    using S = tiling<D, NT>;
    const int    group   = j.heads / j.kv_heads;
    const bounds visible = visible_bounds(j);
    for (int c = threadIdx.x; c < S::COLUMNS; c += S::THREADS) {
        const int  column = (int) blockIdx.y * S::COLUMNS + c;
        const bool real   = column < j.rows * group;
        const pydflash_span span = pydflash_attention_span(real ? j.positions[column / group] : -1, j.causal, j.window);
        col.item[c]   = real ? column / group * j.heads + own.kv_head * group + column % group : -1;
        col.first[c]  = span.first;
        col.last[c]   = span.last;
        col.max[0][c] = -INFINITY;
    }
    for (int i = threadIdx.x; i < MAX_TILES; i += S::THREADS) {
        state[i] = 0;
    }
    __syncthreads();
    const bool reachable =
        j.slot_positions || (own.begin <= visible.max_last && own.begin + own.count > visible.min_first);
    if (reachable) {
        classify_tiles<D, NT>(j, visible, own, state);
    }
    __syncthreads();
}

// ---- how tiles arrive ----

// Starts the copy of a tile of `count` valid slots. Slots beyond keep whatever shared memory held: no row sees them.
template <typename F, int D, int STRIDE>
static __device__ __forceinline__ void fetch(char * tile, const char * rows, int64_t row_stride, int count) {
    using L = slice<F, D>;
    constexpr int SLOTS = tiling<D, 1>::SLOTS, THREADS = tiling<D, 1>::THREADS;
#pragma unroll 1
    for (int i = threadIdx.x; i < SLOTS * L::PIECES; i += THREADS) {
        const int slot = i / L::PIECES, piece = i % L::PIECES;
        if (slot < count) {
            copy_async<L::PIECE>(tile + slot * STRIDE + piece * L::PIECE, rows + slot * row_stride + piece * L::PIECE);
        }
    }
}

template <int D, int NT>
static __device__ __forceinline__ void fetch_keys(const job & j, const share<D, NT> & own, char * k_tile, int tile) {
    with_format(j.k_type, [&](auto f) {
        using L = slice<decltype(f), D>;
        const char * rows = j.k + (own.begin + tile * tiling<D, NT>::SLOTS) * j.k_stride + own.kv_head * L::BYTES;
        fetch<decltype(f), D, L::K_STRIDE>(k_tile, rows, j.k_stride, own.count - tile * tiling<D, NT>::SLOTS);
    });
    end_copy_group();
}

template <int D, int NT>
static __device__ __forceinline__ void fetch_values(const job & j, const share<D, NT> & own, char * v_tile, int tile) {
    with_format(j.v_type, [&](auto f) {
        using L = slice<decltype(f), D>;
        const char * rows = j.v + (own.begin + tile * tiling<D, NT>::SLOTS) * j.v_stride + own.kv_head * L::BYTES;
        fetch<decltype(f), D, L::V_STRIDE>(v_tile, rows, j.v_stride, own.count - tile * tiling<D, NT>::SLOTS);
    });
    end_copy_group();
}

// V of the first tile was asked for with K, that of the others is asked for after it.
static __device__ __forceinline__ void wait_for_keys(bool first) {
    if (first) {
        wait_for_copies<1>();
    } else {
        wait_for_copies<0>();
    }
}

// ---- what the block leaves ----

// Of a chunk that no row sees anything of: no partial result is read where the maximum is -infinity.
template <int D, int NT>
static __device__ __forceinline__ void write_unseen(const job & j, const share<D, NT> & own,
                                                    const columns_of<D, NT> & col) {
    using S = tiling<D, NT>;
    for (int c = threadIdx.x; c < S::COLUMNS; c += S::THREADS) {
        if (col.item[c] >= 0) {
            j.stats[(int64_t) col.item[c] * j.chunks + own.chunk] = make_float2(-INFINITY, 0.0f);
        }
    }
}

// The maximum and sum of every column; the sums of 16 slots (gather_sums) are added in order.
template <int D, int NT>
static __device__ __forceinline__ void write_statistics(const job & j, const share<D, NT> & own,
                                                        const columns_of<D, NT> & col, int parity) {
    using S = tiling<D, NT>;
    for (int c = threadIdx.x; c < S::COLUMNS; c += S::THREADS) {
        float total = 0.0f;
        for (int m = 0; m < S::WARPS; m++) {
            total += col.gather[m][c];
        }
        if (col.item[c] >= 0) {
            j.stats[(int64_t) col.item[c] * j.chunks + own.chunk] = make_float2(col.max[parity][c], total);
        }
    }
}

// The warp's dimensions of every column, unnormalised.
template <int D, int NT>
static __device__ __forceinline__ void write_partials(const job & j, const share<D, NT> & own,
                                                      const columns_of<D, NT> & col, int parity,
                                                      const output<D, NT> & o, const place<D, NT> & at) {
    const bool pairs = !in_order(j.v_type);  // load_v's order: a thread has dimensions 2 g and 2 g + 1
#pragma unroll
    for (int i = 0; i < 2 * NT; i++) {
        const int nt = i / 2, e = i % 2, item = col.item[8 * nt + 2 * at.t + e];
        if (item < 0 || col.max[parity][8 * nt + 2 * at.t + e] == -INFINITY) {
            continue;
        }
        float * to = j.partials + ((int64_t) item * j.chunks + own.chunk) * D + 32 * at.warp;
#pragma unroll
        for (int tile16 = 0; tile16 < 2; tile16++) {
            const float low = o[tile16][nt][e], high = o[tile16][nt][2 + e];
            if (pairs) {
                *reinterpret_cast<float2 *>(to + 16 * tile16 + 2 * at.g) = make_float2(low, high);
            } else {
                to[16 * tile16 + at.g]     = low;
                to[16 * tile16 + at.g + 8] = high;
            }
        }
    }
}

// ---- the kernel ----

template <int D, int NT>
__global__ void __launch_bounds__(tiling<D, NT>::THREADS, tiling<D, NT>::BLOCKS) attend(const __grid_constant__ job j) {
    using S = tiling<D, NT>;
    extern __shared__ __align__(128) char shared[];
    __shared__ columns_of<D, NT> col;
    __shared__ int state[MAX_TILES];

    release_successor();
    wait_for_predecessor();
    const place<D, NT> at;
    const share<D, NT> own(j);
    prepare<D, NT>(j, own, col, state);
    int tile = next_seen(state, 0, own.tiles);
    if (tile == own.tiles) {
        write_unseen<D, NT>(j, own, col);
        return;
    }
    const tiles_at<D, NT> in(shared, j);
    fetch_keys<D, NT>(j, own, in.k, tile);
    fetch_values<D, NT>(j, own, in.v, tile);
    stage_queries<D, NT>(j, in.q, col);

    output<D, NT> o   = {};
    sums<D, NT>   sum = {};
    int parity = 0;
    for (bool first = true; tile < own.tiles; first = false) {
        wait_for_keys(first);
        __syncthreads();  // K has arrived; no warp reads V or P of the previous tile
        if (!first) {
            fetch_values<D, NT>(j, own, in.v, tile);
        }
        scores<D, NT> s = {};
        with_format(j.k_type, [&](auto f) { score<decltype(f), D, NT>(s, in.k, in.q, at); });
        if (state[tile] & MASKED) {
            hide_unseen<D, NT>(j, own.begin + tile * S::SLOTS, col, s, at);
        }
        gather_maxima<D, NT>(s, col, at);
        __syncthreads();  // maxima are complete; no warp reads K
        const int following = next_seen(state, tile + 1, own.tiles);
        if (following < own.tiles) {
            fetch_keys<D, NT>(j, own, in.k, following);
        } else {
            end_copy_group();  // keeps the count of pending groups
        }
        weigh_scores<D, NT>(s, in.p, col, parity, sum, at);
        wait_for_copies<1>();
        __syncthreads();  // P, alpha and V are complete
        rescale_output<D, NT>(o, col, at);
        with_format(j.v_type, [&](auto f) { add_values<decltype(f), D, NT>(o, in.v, in.p, at); });
        parity ^= 1;
        tile = following;
    }
    __syncthreads();
    gather_sums<D, NT>(sum, col, at);
    __syncthreads();
    write_statistics<D, NT>(j, own, col, parity);
    write_partials<D, NT>(j, own, col, parity, o, at);
}

}  // namespace pydflash_attention
