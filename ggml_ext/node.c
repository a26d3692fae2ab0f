// What needs ggml's private structs: reading a custom node, naming a graph. Compiled into both the binding and
// ggml-cuda, which share no other code of pydflash.
#include "ext.h"

#include "ggml-impl.h"

#include <string.h>

// Our parameters follow ggml's own in op_params, and a pointer to scratch memory follows them (scratch.c); all fit.
#define PARAMS_OFFSET ((sizeof(struct ggml_custom_op_params) + sizeof(int32_t) - 1) / sizeof(int32_t))

_Static_assert((PARAMS_OFFSET + PYDFLASH_MAX_PARAMS) * sizeof(int32_t) + sizeof(void *) <= GGML_MAX_OP_PARAMS,
               "our parameters do not fit behind ggml's");

const struct pydflash_op * pydflash_node_op(const struct ggml_tensor * node) {
    if (node->op != GGML_OP_CUSTOM) {
        return NULL;
    }
    struct ggml_custom_op_params custom;
    memcpy(&custom, node->op_params, sizeof(custom));
    const struct pydflash_op * op = (const struct pydflash_op *) custom.userdata;
    return op && op->magic == PYDFLASH_MAGIC ? op : NULL;
}

const int32_t * pydflash_node_params(const struct ggml_tensor * node) {
    return node->op_params + PARAMS_OFFSET;
}

void pydflash_graph_set_uid(struct ggml_cgraph * cgraph) {
    cgraph->uid = ggml_graph_next_uid();
    if (cgraph->n_nodes > 0) {
        ggml_format_name(cgraph->nodes[0], "graph %llu", (unsigned long long) cgraph->uid);
    }
}
