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

// Each NAME.cu defines one of these.
extern const pydflash_cuda_op pydflash_cuda_turbo_wht;
extern const pydflash_cuda_op pydflash_cuda_linear;
extern const pydflash_cuda_op pydflash_cuda_delta_inputs;
extern const pydflash_cuda_op pydflash_cuda_delta_rule;
extern const pydflash_cuda_op pydflash_cuda_attention;
extern const pydflash_cuda_op pydflash_cuda_norm_rope;
extern const pydflash_cuda_op pydflash_cuda_store_kv;
