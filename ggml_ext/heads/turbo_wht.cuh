// The Walsh-Hadamard transform of N values held by one warp, lane l holding values l*N/32 .. (l+1)*N/32 - 1.
#pragma once

template <int N>
static __device__ __forceinline__ void hadamard_warp(float (&v)[N / 32], int lane) {
    constexpr int PER_LANE = N / 32;
#pragma unroll
    for (int half = 1; half < PER_LANE; half *= 2) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            if ((i & half) == 0) {
                const float a = v[i], b = v[i + half];
                v[i]        = a + b;
                v[i + half] = a - b;
            }
        }
    }
#pragma unroll
    for (int half = 1; half < 32; half *= 2) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float other = __shfl_xor_sync(0xffffffffu, v[i], half);
            v[i] = (lane & half) ? other - v[i] : v[i] + other;
        }
    }
    constexpr float SCALE = N == 64 ? 0.125f : N == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        v[i] *= SCALE;
    }
}
