// The two products of attention for one tile of slots, S^T = K Q^T and O^T += V^T P^T, and how Q is laid out for them.
#pragma once

#include "attention_job.cuh"

namespace pydflash_attention {

// A thread's place: its warp in the block, its lane's row and column pair in an accumulator, its warp's slots (wm) and
// columns (wn) of S^T.
template <int D, int NT>
struct place {
    int lane, warp, g, t, wm, wn;

    __device__ __forceinline__ place() {
        const int tid = threadIdx.x;
        lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
        wm = warp % tiling<D, NT>::WM, wn = warp / tiling<D, NT>::WM;
    }
};

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

template <int D, int NT> using columns_of = columns<tiling<D, NT>::COLUMNS, tiling<D, NT>::WARPS>;

// Accumulators: a warp's slots and columns of S^T, a warp's 32 dimensions of O^T, a lane's sums of P over its slots.
template <int D, int NT> using scores = float[tiling<D, NT>::MT][tiling<D, NT>::NTW][4];
template <int D, int NT> using output = float[2][NT][4];
template <int D, int NT> using sums   = float[tiling<D, NT>::MT][tiling<D, NT>::NTW][2];

static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                           uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Q as f16 in B-fragment order: for column tile n and block b of 32 dimensions, lane (g, t) finds the 8 values of
// column g that load_k gives lane t of K. A column is scaled by a power of two into [1, 2), so it cannot overflow;
// `factor` undoes it.
template <int D, int NT>
static __device__ __forceinline__ void stage_queries(const job & j, char * q_tile, columns_of<D, NT> & col) {
    constexpr int WARPS = D / 32, PARTS = D > 128 ? D / 128 : 1, BATCH = NT == 1 && D == 256 ? 1 : 2;
    const int  lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool swap = !in_order(j.k_type);
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
template <typename F, int D, int NT>
static __device__ __forceinline__ void score(scores<D, NT> & s, const char * k_tile, const char * q_tile,
                                             const place<D, NT> & at) {
    using S = tiling<D, NT>;
    using L = slice<F, D>;
    const char *  slots = k_tile + 16 * S::MT * at.wm * L::K_STRIDE;
    const uint4 * q = reinterpret_cast<const uint4 *>(q_tile) + S::NTW * at.wn * (D / 32) * 32 + at.lane;
#pragma unroll 1
    for (int pair = 0; pair < D / 64; pair++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int block = 2 * pair + odd;
            uint32_t  low[S::MT][4], high[S::MT][4];  // rows g and g + 8
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++) {
                const char * a = slots + (16 * mt + row_slot(at.g)) * L::K_STRIDE + block * F::BLOCK;
                const char * b = slots + (16 * mt + row_slot(at.g + 8)) * L::K_STRIDE + block * F::BLOCK;
                if (odd) {
                    F::template load_k<true>(low[mt], a, at.t), F::template load_k<true>(high[mt], b, at.t);
                } else {
                    F::template load_k<false>(low[mt], a, at.t), F::template load_k<false>(high[mt], b, at.t);
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
template <typename F, int D, int NT>
static __device__ __forceinline__ void add_values(output<D, NT> & o, const char * v_tile, const char * p_tile,
                                                  const place<D, NT> & at) {
    constexpr int STRIDE = slice<F, D>::V_STRIDE;
    const uint2 * p = reinterpret_cast<const uint2 *>(p_tile) + at.lane;
#pragma unroll 1
    for (int m = 0; m < tiling<D, NT>::WARPS; m++) {
        uint32_t a[2][4];
        F::template load_v<STRIDE>(a, v_tile + 16 * m * STRIDE, at.warp, at.lane);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const uint2 b = p[(m * NT + nt) * 32];
            mma(o[0][nt], a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
            mma(o[1][nt], a[1][0], a[1][1], a[1][2], a[1][3], b.x, b.y);
        }
    }
}

}  // namespace pydflash_attention
