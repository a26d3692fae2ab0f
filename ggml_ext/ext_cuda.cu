// The op table of the CUDA back end, and the three functions that ggml-cuda's hooks call (vendor/hooks).
#include "ext_cuda.cuh"
#include "fuse.cuh"

#include "common.cuh"  // ggml-cuda's context: stream and memory pool

#include <memory>
#include <vector>

namespace {

// The kernels of a node; NULL when it is not one of ours or runs on the CPU only.
const pydflash_cuda_op * kernels_of(const ggml_tensor * node) {
    const pydflash_op * op = pydflash_node_op(node);
    switch (op ? op->id : PYDFLASH_OP_COUNT) {
#define CUDA(ID, name) case PYDFLASH_OP_##ID: return &pydflash_cuda_##name;
#define CPU_ONLY(ID, name)
#define OP(ID, name, devices, scratch) devices(ID, name)
#include "ops.def"
#undef CUDA
#undef CPU_ONLY
        default: return nullptr;
    }
}

// Scratch of one launch: taken from ggml's stream-ordered pool, given back in reverse order.
struct scratch {
    explicit scratch(ggml_backend_cuda_context & ctx) : pool(ctx.pool()) {}
    ggml_cuda_pool &                                         pool;
    std::vector<std::unique_ptr<ggml_cuda_pool_alloc<char>>> blocks;
    ~scratch() {
        while (!blocks.empty()) { blocks.pop_back(); }
    }
};

void * scratch_alloc(pydflash_cuda * self, size_t size) {
    auto * s = (scratch *) self->pool;
    s->blocks.push_back(std::make_unique<ggml_cuda_pool_alloc<char>>(s->pool, size));
    return s->blocks.back()->get();
}

__global__ void probe() {}

// A device that supports early launches is not enough: kernels compiled for an older one do not wait for their
// predecessor.
bool can_launch_early(int compute_capability) {
    cudaFuncAttributes attributes = {};
    return compute_capability >= GGML_CUDA_CC_HOPPER && cudaFuncGetAttributes(&attributes, probe) == cudaSuccess &&
           attributes.ptxVersion >= 90;
}

pydflash_cuda handle(ggml_backend_cuda_context & ctx, scratch & s) {
    const auto & device = ggml_cuda_info().devices[ctx.device];
    return { ctx.stream(), ctx.device, device.nsm, can_launch_early(device.cc), &s, scratch_alloc };
}

}  // namespace

bool pydflash_cuda_supports(const ggml_tensor * node) {
    const pydflash_cuda_op * op = kernels_of(node);
    return op && op->supports(node);
}

bool pydflash_cuda_compute(ggml_backend_cuda_context * ctx, ggml_tensor * node) {
    const pydflash_cuda_op * op = kernels_of(node);
    if (!op) {
        return false;
    }
    scratch s(*ctx);
    pydflash_cuda cuda = handle(*ctx, s);
    const bool launched = op->launch(&cuda, node);
    CUDA_CHECK(cudaGetLastError());
    return launched;
}

int pydflash_cuda_fuse(ggml_backend_cuda_context * ctx, ggml_cgraph * cgraph, int i) {
    scratch s(*ctx);
    pydflash_cuda cuda = handle(*ctx, s);
    const int skipped = pydflash_fuse(&cuda, cgraph, i);
    CUDA_CHECK(cudaGetLastError());
    return skipped;
}
