// cp.async: copies from device to shared memory that run while the thread goes on, in groups that complete in order.
#pragma once

#include <stdint.h>

// Copies 4, 8 or 16 bytes, both addresses aligned to as many.
template <int BYTES>
static __device__ __forceinline__ void copy_async(void * to, const void * from) {
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(to);
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
    }
}

// 16 bytes, of which the first `valid` come from device memory and the rest are zeros; asks for the cache line of 128.
static __device__ __forceinline__ void copy_async_or_zero(void * to, const void * from, int valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::
                     "r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from), "r"(valid) : "memory");
}

// Ends a group of copies, which may be empty.
static __device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are on their way.
template <int PENDING>
static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
