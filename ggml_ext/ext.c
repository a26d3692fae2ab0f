#include "ext.h"

#include <string.h>

static const struct pydflash_op OPS[PYDFLASH_OP_COUNT] = {
#define SCRATCH(name)    pydflash_##name##_scratch
#define NO_SCRATCH(name) NULL
#define OP(ID, name, devices, scratch) \
    [PYDFLASH_OP_##ID] = { PYDFLASH_MAGIC, PYDFLASH_OP_##ID, #name, pydflash_##name##_cpu, scratch(name) },
#include "ops.def"
};

const struct pydflash_op * pydflash_op_get(enum pydflash_op_id id) {
    return &OPS[id];
}

struct ggml_tensor * pydflash_op_new(struct ggml_context * ctx, enum pydflash_op_id id, enum ggml_type type,
                                     const int64_t ne[4], struct ggml_tensor ** src, int n_src,
                                     const int32_t params[PYDFLASH_MAX_PARAMS], struct ggml_tensor * inplace) {
    const struct pydflash_op * op = &OPS[id];
    struct ggml_tensor * node;
    if (inplace) {
        node = ggml_custom_inplace(ctx, inplace, src, n_src, op->cpu, GGML_N_TASKS_MAX, (void *) (uintptr_t) op);
        // ggml puts the tensor itself before the sources; the contracts number the sources from 0.
        memset(node->src, 0, sizeof(node->src));
        memcpy(node->src, src, (size_t) n_src * sizeof(src[0]));
    } else {
        node = ggml_custom_4d(ctx, type, ne[0], ne[1], ne[2], ne[3], src, n_src, op->cpu, GGML_N_TASKS_MAX,
                              (void *) (uintptr_t) op);
    }
    memcpy((void *) (uintptr_t) pydflash_node_params(node), params, PYDFLASH_MAX_PARAMS * sizeof(int32_t));
    return node;
}
