// pydflash's own operations, as ggml graph nodes.
//
// Every op here is a GGML_OP_CUSTOM node. The function pointer in the node is the CPU reference implementation, so
// any ggml CPU backend can run it; ggml-cuda finds the CUDA kernel of the same node in the op table (ext_cuda.cu).
// What distinguishes one of these nodes from another is its descriptor (`struct pydflash_op`), which the node carries
// as ggml's `userdata` pointer; its static parameters follow ggml's own in `op_params`.
//
// One op is one row of ops.def and one stem: NAME.h states the contract (formula, shapes, dtypes), NAME.c is the CPU
// reference, NAME.cu the CUDA kernel. Shapes in the contracts are row-major, as in Python: (rows, columns) means ne[1]
// rows of ne[0] floats.
#pragma once

#include "contract.h"

#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

enum pydflash_op_id {
#define OP(ID, name, devices, scratch) PYDFLASH_OP_##ID,
#include "ops.def"
    PYDFLASH_OP_COUNT,
};

// The CPU references, and for those that need scratch memory its size; a descriptor's `cpu` and `scratch`.
#define SCRATCH(name)    size_t pydflash_##name##_scratch(const struct ggml_tensor * node);
#define NO_SCRATCH(name)
#define OP(ID, name, devices, scratch)                                                 \
    void pydflash_##name##_cpu(struct ggml_tensor * dst, int ith, int nth, void * op); \
    scratch(name)
#include "ops.def"
#undef SCRATCH
#undef NO_SCRATCH

// Identifies a node as pydflash's: ggml's userdata points to one of these descriptors.
struct pydflash_op {
    uint32_t            magic;   // PYDFLASH_MAGIC
    enum pydflash_op_id id;
    const char *        name;
    ggml_custom_op_t    cpu;     // the reference: (dst, ith, nth, descriptor); threads never need a barrier
    size_t           (* scratch)(const struct ggml_tensor * node);  // bytes that a thread needs, or NULL for none
};

#define PYDFLASH_MAGIC 0x70796466u  // "pydf"

// The descriptor of an op. Never NULL for a valid id.
const struct pydflash_op * pydflash_op_get(enum pydflash_op_id id);

// A new node. `ne` is ggml's order (fastest first). With `inplace` the result is a view of that tensor (which must also
// be a source) and `type` and `ne` are ignored; otherwise the result is a new contiguous tensor.
// Callers have checked shapes; this function only asserts what ggml asserts.
struct ggml_tensor * pydflash_op_new(struct ggml_context * ctx, enum pydflash_op_id id, enum ggml_type type,
                                     const int64_t ne[4], struct ggml_tensor ** src, int n_src,
                                     const int32_t params[PYDFLASH_MAX_PARAMS], struct ggml_tensor * inplace);

// The op of a node, or NULL when the node is not one of pydflash's.
const struct pydflash_op * pydflash_node_op(const struct ggml_tensor * node);

// The static parameters of one of pydflash's nodes.
const int32_t * pydflash_node_params(const struct ggml_tensor * node);

// Gives a graph that never changes an identity: a uid, so that CUDA-graph replay need not compare its nodes, and a
// unique name of its first node (docs/log.md, "The captured graph of a freed graph"). ggml finds a captured CUDA
// graph by the address of the first node and compares every node, name included, but no operand's type: a new graph
// in the memory of a freed one, with a bf16 cache where that had f16, would be taken for it.
void pydflash_graph_set_uid(struct ggml_cgraph * cgraph);

// Scratch memory of one back end, a piece for each of its threads; only the CPU references use it. NULL without memory.
struct pydflash_scratch;
struct pydflash_scratch * pydflash_scratch_new(int threads);
void                      pydflash_scratch_free(struct pydflash_scratch * scratch);

// Bytes that a thread needs for the most demanding node of a graph, in whole pages; and: let the nodes use `scratch`,
// which grows to that. False without memory.
size_t pydflash_graph_scratch_size(struct ggml_cgraph * cgraph);
bool   pydflash_graph_set_scratch(struct ggml_cgraph * cgraph, struct pydflash_scratch * scratch);

// The piece of thread `ith`, aligned to a page, while it works on this node.
void * pydflash_node_scratch(const struct ggml_tensor * node, int ith);

static inline float pydflash_node_param_f32(const struct ggml_tensor * node, int index) {
    union { int32_t i; float f; } bits = { pydflash_node_params(node)[index] };
    return bits.f;
}

// Row `row` of an f32 tensor, counted over all axes but the contiguous one.
static inline const float * pydflash_row(const struct ggml_tensor * t, int64_t row) {
    const size_t i1 = (size_t) (row % t->ne[1]);
    const size_t i2 = (size_t) (row / t->ne[1] % t->ne[2]);
    const size_t i3 = (size_t) (row / t->ne[1] / t->ne[2]);
    return (const float *) ((const char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

// The half-open range of `count` items that thread `ith` of `nth` works on.
static inline void pydflash_share(int64_t count, int ith, int nth, int64_t * begin, int64_t * end) {
    const int64_t each = (count + nth - 1) / nth;
    *begin = each * ith < count ? each * ith : count;
    *end   = *begin + each < count ? *begin + each : count;
}

#ifdef __cplusplus
}
#endif
