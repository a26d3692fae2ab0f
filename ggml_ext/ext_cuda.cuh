// The CUDA side of the op table: what a kernel's launcher is given, and how ggml-cuda finds it.
#pragma once

#include "ext.h"

#include <cuda_runtime.h>

// Scratch memory and the stream of the graph that is being run (or captured). A launcher enqueues on `stream`, never
// synchronises, never allocates except through `alloc`, and may be captured into a CUDA graph at any time.
struct pydflash_cuda {
    cudaStream_t stream;
    int          device;
    int          sm_count;
    bool         early_launch;                                     // kernels are compiled for 9.0 or newer and run there
    void *       pool;                                             // opaque, for alloc
    void *     (*alloc)(struct pydflash_cuda * self, size_t size); // stream-ordered scratch, 256-byte aligned, valid until the launcher returns
};

// Launches the kernels of `node`; false when this node is not supported (supports() told so before).
typedef bool (*pydflash_cuda_launch_t)(struct pydflash_cuda * cuda, struct ggml_tensor * node);
typedef bool (*pydflash_cuda_supports_t)(const struct ggml_tensor * node);

struct pydflash_cuda_op {
    pydflash_cuda_launch_t   launch;
    pydflash_cuda_supports_t supports;
};

#ifdef __CUDACC__

// Launches a kernel that may start while the one before it still runs, which hides the time between the two. It must call
// wait_for_predecessor in every thread before it touches what earlier kernels write; before that it may read what no
// kernel of the same step writes. Where the device has no programmatic dependent launch, it starts after the one before.
template <typename... Parameters, typename... Arguments>
static bool launch_early(const pydflash_cuda * cuda, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                         size_t shared_bytes, const Arguments &... arguments) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;

    cudaLaunchConfig_t config = {};
    config.gridDim          = grid;
    config.blockDim         = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream           = cuda->stream;
    config.attrs            = &early;
    config.numAttrs         = cuda->early_launch ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) == cudaSuccess;
}

// Lets the next kernel in the stream start while this one runs. A no-op unless that one is launched early.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

// Each NAME.cu defines one of these.
#define CUDA(name) extern const pydflash_cuda_op pydflash_cuda_##name;
#define CPU_ONLY(name)
#define OP(ID, name, devices, scratch) devices(name)
#include "ops.def"
#undef CUDA
#undef CPU_ONLY
