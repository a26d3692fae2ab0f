// attention on CUDA, split over the cache (flash-decoding). One block computes, for one key/value head, one chunk of
// the cache and a group of query columns, the unnormalised output and its softmax statistics; a second kernel merges
// the chunks in order. A column is one (row, query head) pair of the key/value head: with H / Hkv = 6, 16 rows make
// 96.
//
// The products are transposed, S^T = K Q^T and O^T = V^T P^T, so that cache slots and head dimensions are the M axis
// of mma.m16n8k16 and the columns its N axis of 8: one row costs 8 columns, not 16, and each cached byte is
// dequantised from shared memory straight into the A fragment of the warp that needs it. K and V tiles arrive by
// cp.async in their cached format; K of the next tile travels during softmax and P V, V during Q K. The warps of a
// block divide the slots for S^T (16 or 32 each) and the dimensions for O^T (32 each: one quantisation block). Shared
// memory holds Q and P in fragment order; S^T and O^T live in registers.
//
// Exactness. Chunks and tiles are cut at fixed slots, an element of S^T or O^T is one chain of mma over ascending
// slots or dimensions whatever the number of columns, row sums are gathered per 16 slots in a fixed order, and what a
// column does not see enters as p = 0 against a finite v. So neither T, nor P, nor the other columns can change a
// bit.
//
// Bounds: device memory for one row; for 16 rows of 6 heads at D = 256 the tensor cores, 12.9 GFLOP for 32,768 slots.
#include "attention.h"
#include "ext_cuda.cuh"

#include <climits>
#include <cuda_fp16.h>

namespace {

constexpr float LOG2_E = 1.4426950408889634f;

enum class format { F16, BF16, Q8_0, Q4_0 };

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
    format          k_format, v_format;
    int             rows, heads, kv_heads, slots, chunks;
    int             causal, window;
    float           scale_log2;  // scale * log2(e): the kernel works in powers of two
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

// ---- shapes of one block ----

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

// How a head's slice of a slot lies in memory and in a tile. The tile strides keep the fragment loads free of bank
// conflicts.
template <format F, int D>
struct layout {
    static constexpr bool HALF   = F == format::F16 || F == format::BF16;
    static constexpr int  BLOCK  = HALF ? 64 : F == format::Q8_0 ? 34 : 18;  // bytes of 32 values
    static constexpr int  BYTES  = D / 32 * BLOCK;
    static constexpr int  PIECE  = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : 4;  // of one cp.async
    static constexpr int  PIECES = BYTES / PIECE;
    static constexpr int  WORDS  = BYTES / 4;
    // K is read by 8 lanes groups in 8 slots: 4 words each when quantised, 8 words each otherwise.
    static constexpr int  K_STRIDE = 4 * (HALF ? WORDS + 8 : WORDS + (12 - WORDS % 8) % 8);
    // V is read in 4 slots, 5 to 8 words each, or by ldmatrix in 8 slots, 4 words each.
    static constexpr int  V_STRIDE = 4 * (HALF ? WORDS + 4 : WORDS + (24 - WORDS % 16) % 16);
};

template <int D>
__host__ __device__ constexpr int k_stride(format f) {
    return f == format::Q8_0 ? layout<format::Q8_0, D>::K_STRIDE
         : f == format::Q4_0 ? layout<format::Q4_0, D>::K_STRIDE : layout<format::F16, D>::K_STRIDE;
}

template <int D>
constexpr int v_stride(format f) {
    return f == format::Q8_0 ? layout<format::Q8_0, D>::V_STRIDE
         : f == format::Q4_0 ? layout<format::Q4_0, D>::V_STRIDE : layout<format::F16, D>::V_STRIDE;
}

// Calls function(tag<F>()) for the run-time format F: formats are told apart inside the kernel, outside its inner
// loops, so that pairs of formats do not multiply the number of kernels.
template <format F> struct tag { static constexpr format value = F; };

template <typename Function>
__device__ __forceinline__ void with_format(format f, Function && function) {
    switch (f) {
        case format::F16:  function(tag<format::F16>());  break;
        case format::BF16: function(tag<format::BF16>()); break;
        case format::Q8_0: function(tag<format::Q8_0>()); break;
        case format::Q4_0: function(tag<format::Q4_0>()); break;
    }
}

// ---- instructions ----

template <int BYTES>
__device__ __forceinline__ void copy_async(void * to, const void * from) {
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(to);
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
    }
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t bits(half2 h) { return *reinterpret_cast<uint32_t *>(&h); }
__device__ __forceinline__ half2 halves(uint32_t u) { return *reinterpret_cast<half2 *>(&u); }

// ---- dequantisation to pairs of f16 ----

// Magic numbers: 0x6400 | u is the f16 1024 + u for u < 1024, so subtracting 1024 + zero point is exact.
__device__ __forceinline__ uint32_t from_nibbles(uint32_t x, half2 d) {
    const half2 biased = halves((x & 0x000f000fu) | 0x64006400u);
    return bits(__hmul2(__hsub2(biased, halves(0x64086408u)), d));
}

__device__ __forceinline__ uint32_t from_bytes(uint32_t x, half2 d) {
    const half2 biased = halves((x & 0x00ff00ffu) ^ 0x64806480u);
    return bits(__hmul2(__hsub2(biased, halves(0x64806480u)), d));
}

// Infinities and NaN become finite as well, so that p = 0 makes them vanish.
__device__ __forceinline__ uint32_t saturate(uint32_t x, uint32_t limit = 0x7bff7bffu /* 65504 */) {
    return bits(__hmax2(__hmin2(halves(x), halves(limit)), halves(limit | 0x80008000u)));
}

__device__ __forceinline__ uint32_t from_bf16(uint32_t x) {
    return saturate(bits(__floats2half2_rn(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u))));
}

__device__ __forceinline__ uint32_t load16(const char * p) { return *reinterpret_cast<const uint16_t *>(p); }

// A word at p, which is 2 past a word boundary unless ALIGNED.
template <bool ALIGNED>
__device__ __forceinline__ uint32_t load32(const char * p) {
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const uint32_t *>(p);
    } else {
        return __byte_perm(*reinterpret_cast<const uint32_t *>(p - 2), *reinterpret_cast<const uint32_t *>(p + 2),
                           0x5432);
    }
}

// Lane t of a group of four takes 8 values of a 32-value block: 4t .. 4t+3 and 16+4t .. 16+4t+3. Quantised formats
// yield each four in the order 0, 2, 1, 3, which Q follows (stage_queries). ODD: the block's number within a pair of
// blocks.
template <format F, bool ODD>
__device__ __forceinline__ void load_k(uint32_t (&a)[4], const char * block, int t) {
    if constexpr (layout<F, 64>::HALF) {
        const uint2 low = *reinterpret_cast<const uint2 *>(block + 8 * t);
        const uint2 high = *reinterpret_cast<const uint2 *>(block + 32 + 8 * t);
        a[0] = low.x, a[1] = low.y, a[2] = high.x, a[3] = high.y;
        if constexpr (F == format::BF16) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = from_bf16(a[i]);
            }
        }
    } else {
        const half2    d = halves(load16(block) * 0x00010001u);
        const uint32_t x = load32<ODD>(block + 2 + 4 * t);
        if constexpr (F == format::Q4_0) {
            a[0] = from_nibbles(x, d), a[1] = from_nibbles(x >> 8, d);
            a[2] = from_nibbles(x >> 4, d), a[3] = from_nibbles(x >> 12, d);
        } else {
            const uint32_t y = load32<ODD>(block + 18 + 4 * t);
            a[0] = from_bytes(x, d), a[1] = from_bytes(x >> 8, d);
            a[2] = from_bytes(y, d), a[3] = from_bytes(y >> 8, d);
        }
    }
}

// Row i of a 16-slot tile of S^T is slot row_slot(i): the pair (i, i + 8), which the accumulator layout packs into one
// word of P, differs in bit 2 so that the transposing ldmatrix of V meets eight different banks.
__device__ __forceinline__ int row_slot(int row) { return row < 8 ? row : 8 + ((row - 8) ^ 4); }

// The A fragments of V^T for 16 slots and the warp's 32 dimensions. Quantised: row r of tile j is dimension
// 16 j + 2 (r % 8) + r / 8; otherwise 16 j + r.
template <format F, int D>
__device__ __forceinline__ void load_v(uint32_t (&a)[2][4], const char * slots, int block, int lane) {
    constexpr int STRIDE = layout<F, D>::V_STRIDE;
    if constexpr (layout<F, D>::HALF) {
        const int matrix = lane / 8, r = lane % 8;
        const int slot   = row_slot(r / 2 + 4 * (matrix / 2) + 8 * (r % 2));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const char *   row     = slots + slot * STRIDE + 64 * block + 32 * j + 16 * (matrix % 2);
            const uint32_t address = (uint32_t) __cvta_generic_to_shared(row);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a[j][0]), "=r"(a[j][1]), "=r"(a[j][2]), "=r"(a[j][3])
                         : "r"(address)
                         : "memory");
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[j][i] = F == format::BF16 ? from_bf16(a[j][i]) : saturate(a[j][i]);
            }
        }
    } else {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const char * first  = slots + row_slot(t + 4 * p) * STRIDE + layout<F, D>::BLOCK * block;
            const char * second = slots + row_slot(t + 4 * p + 8) * STRIDE + layout<F, D>::BLOCK * block;
            // 511 * 128 < 65504: a saturated scale keeps every product finite.
            const half2    d = halves(saturate(load16(first) | load16(second) << 16, 0x5ffc5ffcu));
            const uint32_t x = load16(first + 2 + 2 * g) | load16(second + 2 + 2 * g) << 16;
            if constexpr (F == format::Q4_0) {
                a[0][2 * p] = from_nibbles(x, d), a[0][2 * p + 1] = from_nibbles(x >> 8, d);
                a[1][2 * p] = from_nibbles(x >> 4, d), a[1][2 * p + 1] = from_nibbles(x >> 12, d);
            } else {
                const uint32_t y = load16(first + 18 + 2 * g) | load16(second + 18 + 2 * g) << 16;
                a[0][2 * p] = from_bytes(x, d), a[0][2 * p + 1] = from_bytes(x >> 8, d);
                a[1][2 * p] = from_bytes(y, d), a[1][2 * p + 1] = from_bytes(y >> 8, d);
            }
        }
    }
}

// ---- the steps of a block ----

// Starts the copy of a tile of `count` valid slots. Slots beyond keep whatever shared memory held: nobody sees them.
template <format F, int D, int STRIDE>
__device__ __forceinline__ void fetch(char * tile, const char * rows, int64_t row_stride, int count) {
    using L = layout<F, D>;
    constexpr int SLOTS = tiling<D, 1>::SLOTS, THREADS = tiling<D, 1>::THREADS;
#pragma unroll 1
    for (int i = threadIdx.x; i < SLOTS * L::PIECES; i += THREADS) {
        const int slot = i / L::PIECES, piece = i % L::PIECES;
        if (slot < count) {
            copy_async<L::PIECE>(tile + slot * STRIDE + piece * L::PIECE, rows + slot * row_stride + piece * L::PIECE);
        }
    }
}

// Per-column facts of a block, in shared memory.
template <int COLUMNS, int WARPS>
struct columns {
    int   item[COLUMNS];         // row * H + head, or -1
    int   first[COLUMNS];        // visible positions
    int   last[COLUMNS];
    float factor[COLUMNS];       // of the raw scores: scale * log2(e) over the row's power of two
    float max[2][COLUMNS];       // running maximum, by parity of the tile
    float alpha[COLUMNS];        // what the running sums are multiplied by
    float gather[WARPS][COLUMNS];
};

// Q as f16 in B-fragment order: for column tile n and block b of 32 dimensions, lane (g, t) finds the 8 values of
// column g that load_k gives lane t of K. A column is scaled by a power of two into [1, 2), so it cannot overflow;
// `factor` undoes it.
template <int D, int NT>
__device__ __forceinline__ void stage_queries(const job & j, char * q_tile, columns<8 * NT, D / 32> & col) {
    constexpr int WARPS = D / 32, PARTS = D > 128 ? D / 128 : 1, BATCH = NT == 1 && D == 256 ? 1 : 2;
    const int  lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool swap = j.k_format == format::Q8_0 || j.k_format == format::Q4_0;
    for (int begin = warp; begin < 8 * NT; begin += WARPS * BATCH) {
        float4 x[BATCH][PARTS];
#pragma unroll
        for (int i = 0; i < BATCH * PARTS; i++) {  // all loads first
            const int item = col.item[begin + i / PARTS * WARPS], four = lane + 32 * (i % PARTS);
            x[i / PARTS][i % PARTS] = item >= 0 && four < D / 4
                ? reinterpret_cast<const float4 *>(j.q + (int64_t) item * D)[four] : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int c = begin + i * WARPS;
            float largest = 0.0f;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                largest = fmaxf(largest, fmaxf(fmaxf(fabsf(x[i][p].x), fabsf(x[i][p].y)),
                                               fmaxf(fabsf(x[i][p].z), fabsf(x[i][p].w))));
            }
            largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
            const int   exponent = max(1, min(253, (int) (__float_as_uint(largest) >> 23)));
            const float down     = __uint_as_float((uint32_t) (254 - exponent) << 23);
            if (lane == 0) {
                col.factor[c] = j.scale_log2 * __uint_as_float((uint32_t) exponent << 23);
            }
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                const int   four  = lane + 32 * p;
                const half2 outer = __floats2half2_rn(x[i][p].x * down, (swap ? x[i][p].z : x[i][p].y) * down);
                const half2 inner = __floats2half2_rn((swap ? x[i][p].y : x[i][p].z) * down, x[i][p].w * down);
                if (four < D / 4) {
                    const int fragment = ((c / 8) * (D / 32) + four / 8) * 32 + (c % 8) * 4 + four % 4;
                    *reinterpret_cast<uint2 *>(q_tile + fragment * 16 + (four % 8) / 4 * 8) =
                        make_uint2(bits(outer), bits(inner));
                }
            }
        }
    }
}

// S^T of the warp's slots and columns: s[mt][nt] is one accumulator tile.
template <format F, int D, int NT>
__device__ __forceinline__ void score(float (&s)[tiling<D, NT>::MT][tiling<D, NT>::NTW][4], const char * k_tile,
                                      const char * q_tile, int wm, int wn, int lane) {
    using S = tiling<D, NT>;
    using L = layout<F, D>;
    const int    g = lane / 4, t = lane % 4;
    const char * slots = k_tile + 16 * S::MT * wm * L::K_STRIDE;
    const uint4 * q = reinterpret_cast<const uint4 *>(q_tile) + S::NTW * wn * (D / 32) * 32 + lane;
#pragma unroll 1
    for (int pair = 0; pair < D / 64; pair++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int block = 2 * pair + odd;
            uint32_t  low[S::MT][4], high[S::MT][4];  // rows g and g + 8
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++) {
                const char * a = slots + (16 * mt + row_slot(g)) * L::K_STRIDE + block * L::BLOCK;
                const char * b = slots + (16 * mt + row_slot(g + 8)) * L::K_STRIDE + block * L::BLOCK;
                if (odd) {
                    load_k<F, true>(low[mt], a, t), load_k<F, true>(high[mt], b, t);
                } else {
                    load_k<F, false>(low[mt], a, t), load_k<F, false>(high[mt], b, t);
                }
            }
#pragma unroll
            for (int nt = 0; nt < S::NTW; nt++) {
                const uint4 b = q[(nt * (D / 32) + block) * 32];
#pragma unroll
                for (int mt = 0; mt < S::MT; mt++) {
                    mma(s[mt][nt], low[mt][0], high[mt][0], low[mt][1], high[mt][1], b.x, b.y);
                    mma(s[mt][nt], low[mt][2], high[mt][2], low[mt][3], high[mt][3], b.z, b.w);
                }
            }
        }
    }
}

// O^T += V^T P^T over the tile's slots, for the warp's 32 dimensions and all columns.
template <format F, int D, int NT>
__device__ __forceinline__ void add_values(float (&o)[2][NT][4], const char * v_tile, const char * p_tile, int warp,
                                           int lane) {
    const uint2 * p = reinterpret_cast<const uint2 *>(p_tile) + lane;
#pragma unroll 1
    for (int m = 0; m < tiling<D, NT>::WARPS; m++) {
        uint32_t a[2][4];
        load_v<F, D>(a, v_tile + 16 * m * layout<F, D>::V_STRIDE, warp, lane);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const uint2 b = p[(m * NT + nt) * 32];
            mma(o[0][nt], a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
            mma(o[1][nt], a[1][0], a[1][1], a[1][2], a[1][3], b.x, b.y);
        }
    }
}

// The smallest and largest bounds of the rows' visible positions, padding left out.
struct bounds { int min_first, max_first, min_last, max_last; };

__device__ __forceinline__ bounds visible_bounds(const job & j) {
    const int           lane = threadIdx.x % 32;
    const int           qpos = lane < j.rows ? j.positions[lane] : -1;
    const pydflash_span span = pydflash_attention_span(qpos, j.causal, j.window);
    return { __reduce_min_sync(0xffffffffu, qpos < 0 ? INT_MAX : span.first),
             __reduce_max_sync(0xffffffffu, qpos < 0 ? 0 : span.first),
             __reduce_min_sync(0xffffffffu, qpos < 0 ? INT_MAX : span.last),
             __reduce_max_sync(0xffffffffu, qpos < 0 ? -1 : span.last) };
}

__device__ __forceinline__ int slot_position(const job & j, int slot) {
    return slot >= j.slots ? -1 : j.slot_positions ? j.slot_positions[slot] : slot;
}

constexpr int SEEN = 1, MASKED = 2;  // some row sees something of a tile; some row may not see all of it

template <int D, int NT>
__device__ __forceinline__ void classify_tiles(const job & j, const bounds & b, int begin, int tiles, int * state) {
    using S = tiling<D, NT>;
    for (int i = threadIdx.x; i < tiles * S::SLOTS; i += S::THREADS) {
        const int kpos = slot_position(j, begin + i);
        const int seen = __any_sync(0xffffffffu, kpos >= b.min_first && kpos <= b.max_last);
        const int all  = __all_sync(0xffffffffu, kpos >= b.max_first && kpos <= b.min_last);
        if (threadIdx.x % 32 == 0) {
            atomicOr(&state[i / S::SLOTS], (seen ? SEEN : 0) | (all ? 0 : MASKED));
        }
    }
}

__device__ __forceinline__ int next_seen(const int * state, int tile, int tiles) {
    while (tile < tiles && !(state[tile] & SEEN)) {
        tile++;
    }
    return tile;
}

template <int D, int NT>
__global__ void __launch_bounds__(tiling<D, NT>::THREADS, tiling<D, NT>::BLOCKS) attend(const __grid_constant__ job j) {
    using S = tiling<D, NT>;
    extern __shared__ __align__(128) char shared[];
    __shared__ columns<S::COLUMNS, S::WARPS> col;
    __shared__ int state[MAX_TILES];

    release_successor();
    wait_for_predecessor();
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int wm = warp % S::WM, wn = warp / S::WM;
    const int kv_head = blockIdx.x % j.kv_heads;
    const int chunk   = j.chunks - 1 - (int) (blockIdx.x / j.kv_heads);  // the long chunks come last and start first
    const int begin   = chunk_begin(chunk);
    const int count   = min(chunk_begin(chunk + 1), j.slots) - begin;
    const int tiles   = divide_up(count, S::SLOTS);
    const int group   = j.heads / j.kv_heads;
    const bounds visible = visible_bounds(j);

    for (int c = tid; c < S::COLUMNS; c += S::THREADS) {
        const int  column = (int) blockIdx.y * S::COLUMNS + c;
        const bool real   = column < j.rows * group;
        const pydflash_span span = pydflash_attention_span(real ? j.positions[column / group] : -1, j.causal, j.window);
        col.item[c]   = real ? column / group * j.heads + kv_head * group + column % group : -1;
        col.first[c]  = span.first;
        col.last[c]   = span.last;
        col.max[0][c] = -INFINITY;
    }
    for (int i = tid; i < MAX_TILES; i += S::THREADS) {
        state[i] = 0;
    }
    __syncthreads();
    const bool reachable = j.slot_positions || (begin <= visible.max_last && begin + count > visible.min_first);
    if (reachable) {
        classify_tiles<D, NT>(j, visible, begin, tiles, state);
    }
    __syncthreads();
    int tile = next_seen(state, 0, tiles);
    if (tile == tiles) {
        for (int c = tid; c < S::COLUMNS; c += S::THREADS) {
            if (col.item[c] >= 0) {
                j.stats[(int64_t) col.item[c] * j.chunks + chunk] = make_float2(-INFINITY, 0.0f);
            }
        }
        return;
    }

    char * q_tile = shared;
    char * p_tile = q_tile + S::Q_BYTES;
    char * k_tile = p_tile + S::P_BYTES;
    char * v_tile = k_tile + S::SLOTS * k_stride<D>(j.k_format);

    const auto fetch_k = [&](int i) {
        with_format(j.k_format, [&](auto f) {
            constexpr format F = decltype(f)::value;
            const char * rows = j.k + (begin + i * S::SLOTS) * j.k_stride + kv_head * layout<F, D>::BYTES;
            fetch<F, D, layout<F, D>::K_STRIDE>(k_tile, rows, j.k_stride, count - i * S::SLOTS);
        });
        copy_commit();
    };
    const auto fetch_v = [&](int i) {
        with_format(j.v_format, [&](auto f) {
            constexpr format F = decltype(f)::value;
            const char * rows = j.v + (begin + i * S::SLOTS) * j.v_stride + kv_head * layout<F, D>::BYTES;
            fetch<F, D, layout<F, D>::V_STRIDE>(v_tile, rows, j.v_stride, count - i * S::SLOTS);
        });
        copy_commit();
    };
    fetch_k(tile);
    fetch_v(tile);
    stage_queries<D, NT>(j, q_tile, col);

    float o[2][NT][4]              = {};
    float sum[S::MT][S::NTW][2]    = {};  // of this lane's slots
    int   parity                   = 0;
    for (bool first = true; tile < tiles; first = false) {
        if (first) {
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();  // K is here; nobody reads V or P of the previous tile
        if (!first) {
            fetch_v(tile);
        }
        float s[S::MT][S::NTW][4] = {};
        with_format(j.k_format, [&](auto f) { score<decltype(f)::value, D, NT>(s, k_tile, q_tile, wm, wn, lane); });

        if (state[tile] & MASKED) {
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++) {
                const int slots = begin + tile * S::SLOTS + 16 * (wm * S::MT + mt);
                const int low = slot_position(j, slots + row_slot(g)), high = slot_position(j, slots + row_slot(g + 8));
#pragma unroll
                for (int i = 0; i < 4 * S::NTW; i++) {
                    const int c = 8 * (wn * S::NTW + i / 4) + 2 * t + i % 2, kpos = i % 4 < 2 ? low : high;
                    if (kpos < col.first[c] || kpos > col.last[c]) {
                        s[mt][i / 4][i % 4] = -INFINITY;
                    }
                }
            }
        }

        // The largest raw score of each column over the warp's slots. Factors are positive, so scaling can wait.
#pragma unroll
        for (int i = 0; i < 2 * S::NTW; i++) {
            float largest = -INFINITY;
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++) {
                largest = fmaxf(largest, fmaxf(s[mt][i / 2][i % 2], s[mt][i / 2][2 + i % 2]));
            }
#pragma unroll
            for (int other = 4; other < 32; other *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
            }
            if (g == 0) {
                col.gather[wm][8 * (wn * S::NTW + i / 2) + 2 * t + i % 2] = largest;
            }
        }
        __syncthreads();  // maxima are here; nobody reads K
        const int following = next_seen(state, tile + 1, tiles);
        if (following < tiles) {
            fetch_k(following);
        } else {
            copy_commit();  // keeps the count of pending groups
        }

#pragma unroll
        for (int nt = 0; nt < S::NTW; nt++) {
            uint32_t word[S::MT][2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int c = 8 * (wn * S::NTW + nt) + 2 * t + e;
                float largest = col.gather[0][c];
#pragma unroll
                for (int m = 1; m < S::WM; m++) {
                    largest = fmaxf(largest, col.gather[m][c]);
                }
                const float factor = col.factor[c], before = col.max[parity][c];
                const float now    = fmaxf(before, largest * factor);
                const float base   = now == -INFINITY ? 0.0f : now;
                const float alpha  = now == before ? 1.0f : exp2_fast(before - now);
                if (wm == 0 && g == 0) {
                    col.max[parity ^ 1][c] = now;
                    col.alpha[c]           = alpha;
                }
#pragma unroll
                for (int mt = 0; mt < S::MT; mt++) {
                    const float low  = exp2_fast(fmaf(s[mt][nt][e], factor, -base));
                    const float high = exp2_fast(fmaf(s[mt][nt][2 + e], factor, -base));
                    sum[mt][nt][e] = fmaf(sum[mt][nt][e], alpha, low + high);
                    word[mt][e]    = bits(__floats2half2_rn(low, high));
                }
            }
            // Word g of column 2t + e, where the B fragment of O^T has it; lanes with t >= 2 store the other column
            // first, so that a store meets 32 banks.
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++) {
                uint32_t * to = reinterpret_cast<uint32_t *>(p_tile) +
                                ((wm * S::MT + mt) * NT + wn * S::NTW + nt) * 64 + 16 * t + 2 * (g % 4) + g / 4;
                const int late = t / 2;
                to[8 * late]       = late ? word[mt][1] : word[mt][0];
                to[8 * (1 - late)] = late ? word[mt][0] : word[mt][1];
            }
        }
        copy_wait<1>();
        __syncthreads();  // P, alpha and V are here

#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const float2 alpha = *reinterpret_cast<const float2 *>(&col.alpha[8 * nt + 2 * t]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                o[i / 4][nt][i % 4] *= i % 2 ? alpha.y : alpha.x;
            }
        }
        with_format(j.v_format, [&](auto f) { add_values<decltype(f)::value, D, NT>(o, v_tile, p_tile, warp, lane); });
        parity ^= 1;
        tile = following;
    }

    // The sums of 16 slots at a time, then those in order: the same tree for every NT.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::MT * S::NTW * 2; i++) {
        const int mt = i / (2 * S::NTW), nt = i / 2 % S::NTW;
        float total = sum[mt][nt][i % 2];
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, other);
        }
        if (g == 0) {
            col.gather[wm * S::MT + mt][8 * (wn * S::NTW + nt) + 2 * t + i % 2] = total;
        }
    }
    __syncthreads();
    for (int c = tid; c < S::COLUMNS; c += S::THREADS) {
        float total = 0.0f;
        for (int m = 0; m < S::WARPS; m++) {
            total += col.gather[m][c];
        }
        if (col.item[c] >= 0) {
            j.stats[(int64_t) col.item[c] * j.chunks + chunk] = make_float2(col.max[parity][c], total);
        }
    }
    const bool pairs = j.v_format == format::Q8_0 || j.v_format == format::Q4_0;  // dimension order of load_v
#pragma unroll
    for (int i = 0; i < 2 * NT; i++) {
        const int nt = i / 2, e = i % 2, item = col.item[8 * nt + 2 * t + e];
        if (item < 0 || col.max[parity][8 * nt + 2 * t + e] == -INFINITY) {
            continue;
        }
        float * to = j.partials + ((int64_t) item * j.chunks + chunk) * D + 32 * warp;
#pragma unroll
        for (int tile16 = 0; tile16 < 2; tile16++) {
            const float low = o[tile16][nt][e], high = o[tile16][nt][2 + e];
            if (pairs) {
                *reinterpret_cast<float2 *>(to + 16 * tile16 + 2 * g) = make_float2(low, high);
            } else {
                to[16 * tile16 + g]     = low;
                to[16 * tile16 + g + 8] = high;
            }
        }
    }
}

// Merges the chunks of one (row, head): four interleaved sums over the chunks in order, then those four in order.
constexpr int MERGE_LANES = 4;

template <int D>
__global__ void __launch_bounds__(D) merge(const __grid_constant__ job j) {
    static_assert(D / 4 * MERGE_LANES == D, "one thread per four dimensions and sum");
    extern __shared__ float2 weights[];  // (chunks,): weight, weighted sum
    __shared__ float4 outs[MERGE_LANES][D / 4];
    __shared__ float  sums[MERGE_LANES], maxima[D / 32];

    release_successor();
    wait_for_predecessor();
    const int item = blockIdx.x, tid = threadIdx.x, four = tid % (D / 4), part = tid / (D / 4);
    float4 *  out  = reinterpret_cast<float4 *>(j.out + (int64_t) item * D);
    const float2 * stats = j.stats + (int64_t) item * j.chunks;

    float largest = -INFINITY;
    for (int c = tid; c < j.chunks; c += D) {
        largest = fmaxf(largest, stats[c].x);
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    }
    if (tid % 32 == 0) {
        maxima[tid / 32] = largest;
    }
    __syncthreads();
    for (int i = 0; i < D / 32; i++) {
        largest = fmaxf(largest, maxima[i]);
    }
    for (int c = tid; c < j.chunks; c += D) {
        const float2 s      = stats[c];
        const float  weight = s.x == -INFINITY ? 0.0f : exp2_fast(s.x - largest);
        weights[c] = make_float2(weight, weight * s.y);
    }
    __syncthreads();

    const float4 * partials = reinterpret_cast<const float4 *>(j.partials + (int64_t) item * j.chunks * D) + four;
    float4 o   = make_float4(0, 0, 0, 0);
    float  sum = 0.0f;
#pragma unroll 8
    for (int c = part; c < j.chunks; c += MERGE_LANES) {
        const float2 w = weights[c];
        if (w.x != 0.0f) {  // chunks nobody saw were not written
            const float4 x = partials[c * (D / 4)];
            o.x = fmaf(w.x, x.x, o.x), o.y = fmaf(w.x, x.y, o.y), o.z = fmaf(w.x, x.z, o.z), o.w = fmaf(w.x, x.w, o.w);
            sum += w.y;
        }
    }
    outs[part][four] = o;
    if (four == 0) {
        sums[part] = sum;
    }
    __syncthreads();
    if (part == 0) {
        for (int i = 1; i < MERGE_LANES; i++) {
            const float4 x = outs[i][four];
            o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
            sum += sums[i];
        }
        const bool  empty   = j.positions[item / j.heads] < 0 || sum == 0.0f;
        const float inverse = empty ? 0.0f : 1.0f / sum;
        out[four] = empty ? make_float4(0, 0, 0, 0)
                          : make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse);
    }
}

// ---- launching ----

template <int D, int NT>
int shared_bytes(const job & j) {
    using S = tiling<D, NT>;
    return S::Q_BYTES + S::P_BYTES + S::SLOTS * (k_stride<D>(j.k_format) + v_stride<D>(j.v_format));
}

// What one configuration costs, in units of a tile with one column tile: the longest block, or all blocks over the SMs.
// A tile costs about as much as two column tiles before the first column is counted.
template <int D, int NT>
int64_t cost(const job & j, int sm_count, int shared_limit) {
    using S = tiling<D, NT>;
    const int wanted = j.rows * (j.heads / j.kv_heads);
    if (shared_bytes<D, NT>(j) + (int) sizeof(columns<S::COLUMNS, S::WARPS>) + 1024 > shared_limit ||
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
bool fits_size(const job & j, int shared_limit) {
    const auto piece = [](format f) {
        return f == format::Q8_0 ? layout<format::Q8_0, D>::PIECE
             : f == format::Q4_0 ? layout<format::Q4_0, D>::PIECE : layout<format::F16, D>::PIECE;
    };
    return cost<D, 1>(j, 1, shared_limit) != INT64_MAX && j.k_stride % piece(j.k_format) == 0 &&
           j.v_stride % piece(j.v_format) == 0;
}

bool fits(const job & j, int head_size, int shared_limit) {
    return head_size == 64  ? fits_size<64>(j, shared_limit)
         : head_size == 128 ? fits_size<128>(j, shared_limit)
         : head_size == 256 ? fits_size<256>(j, shared_limit) : false;
}

template <int D, int NT>
bool launch_attend(const pydflash_cuda * cuda, const job & j) {
    using S = tiling<D, NT>;
    const int  bytes  = shared_bytes<D, NT>(j);
    const int  wanted = j.rows * (j.heads / j.kv_heads);
    const dim3 grid((unsigned) (j.chunks * j.kv_heads), (unsigned) divide_up(wanted, S::COLUMNS));
    return cudaFuncSetAttribute(attend<D, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess &&
           launch_early(cuda, attend<D, NT>, grid, S::THREADS, (size_t) bytes, j);
}

template <int D>
bool launch_size(const pydflash_cuda * cuda, const job & j, int shared_limit) {
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

size_t scratch_bytes(int items, int chunks, int head_size) {
    return (size_t) items * chunks * (sizeof(float2) + head_size * sizeof(float));
}

// Fills in the scratch pointers and launches both kernels; false when a tile does not fit the device's shared memory.
bool launch_job(const pydflash_cuda * cuda, job j, int head_size, void * scratch, int shared_limit) {
    j.partials = (float *) scratch;
    j.stats    = (float2 *) (j.partials + (size_t) j.rows * j.heads * j.chunks * head_size);
    switch (head_size) {
        case 64:  return launch_size<64>(cuda, j, shared_limit);
        case 128: return launch_size<128>(cuda, j, shared_limit);
        case 256: return launch_size<256>(cuda, j, shared_limit);
        default:  return false;
    }
}

#ifndef PYDFLASH_STANDALONE  // a benchmark includes this file without ggml

bool read_format(ggml_type type, format * f) {
    switch (type) {
        case GGML_TYPE_F16:  *f = format::F16;  return true;
        case GGML_TYPE_BF16: *f = format::BF16; return true;
        case GGML_TYPE_Q8_0: *f = format::Q8_0; return true;
        case GGML_TYPE_Q4_0: *f = format::Q4_0; return true;
        default:             return false;
    }
}

bool read_node(const ggml_tensor * node, job * j) {
    const ggml_tensor * q = node->src[0], * k = node->src[1], * v = node->src[2], * slot_positions = node->src[4];
    const int32_t * params = pydflash_node_params(node);
    if (!read_format(k->type, &j->k_format) || !read_format(v->type, &j->v_format)) {
        return false;
    }
    j->q              = (const float *) q->data;
    j->k              = (const char *) k->data;
    j->v              = (const char *) v->data;
    j->positions      = (const int32_t *) node->src[3]->data;
    j->slot_positions = slot_positions ? (const int32_t *) slot_positions->data : nullptr;
    j->out            = (float *) node->data;
    j->k_stride       = (int64_t) k->nb[1];
    j->v_stride       = (int64_t) v->nb[1];
    j->rows           = (int) q->ne[2];
    j->heads          = (int) q->ne[1];
    j->kv_heads       = params[3];
    j->slots          = (int) k->ne[1];
    j->chunks         = chunk_count(j->slots);
    j->causal         = params[1];
    j->window         = params[2];
    j->scale_log2     = pydflash_node_param_f32(node, 0) * LOG2_E;
    return j->rows <= PYDFLASH_EXACT_ROWS && q->type == GGML_TYPE_F32 && j->slots % PYDFLASH_SLOT_STEP == 0;
}

int shared_limit(int device) {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

bool supports(const ggml_tensor * node) {
    job j;
    int device = 0;
    return read_node(node, &j) && cudaGetDevice(&device) == cudaSuccess &&
           fits(j, (int) node->src[0]->ne[0], shared_limit(device));
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    job j;
    if (!read_node(node, &j)) {
        return false;
    }
    const int head_size = (int) node->src[0]->ne[0];
    void * scratch = cuda->alloc(cuda, scratch_bytes(j.rows * j.heads, j.chunks, head_size));
    return launch_job(cuda, j, head_size, scratch, shared_limit(cuda->device));
}

#endif

}  // namespace

#ifndef PYDFLASH_STANDALONE
const pydflash_cuda_op pydflash_cuda_attention = { launch, supports };
#endif
