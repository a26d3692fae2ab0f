#include "ext.h"

#include "argmax.h"
#include "attention.h"
#include "delta_inputs.h"
#include "delta_rule.h"
#include "linear.h"
#include "norm_rope.h"
#include "rms_norm.h"
#include "rope.h"
#include "sigmoid_gate.h"
#include "store_kv.h"
#include "turbo_wht.h"

#include <string.h>

static const struct pydflash_op OPS[PYDFLASH_OP_COUNT] = {
    [PYDFLASH_OP_TURBO_WHT]  = { PYDFLASH_MAGIC, PYDFLASH_OP_TURBO_WHT,  "turbo_wht",  pydflash_turbo_wht_cpu  },
    [PYDFLASH_OP_LINEAR]     = { PYDFLASH_MAGIC, PYDFLASH_OP_LINEAR,     "linear",     pydflash_linear_cpu,
                                 pydflash_linear_scratch },
    [PYDFLASH_OP_DELTA_INPUTS] = { PYDFLASH_MAGIC, PYDFLASH_OP_DELTA_INPUTS, "delta_inputs", pydflash_delta_inputs_cpu },
    [PYDFLASH_OP_DELTA_RULE] = { PYDFLASH_MAGIC, PYDFLASH_OP_DELTA_RULE, "delta_rule", pydflash_delta_rule_cpu },
    [PYDFLASH_OP_ATTENTION]  = { PYDFLASH_MAGIC, PYDFLASH_OP_ATTENTION,  "attention",  pydflash_attention_cpu,
                                 pydflash_attention_scratch },
    [PYDFLASH_OP_ROPE]       = { PYDFLASH_MAGIC, PYDFLASH_OP_ROPE,       "rope",       pydflash_rope_cpu       },
    [PYDFLASH_OP_NORM_ROPE]  = { PYDFLASH_MAGIC, PYDFLASH_OP_NORM_ROPE,  "norm_rope",  pydflash_norm_rope_cpu  },
    [PYDFLASH_OP_STORE_KV]   = { PYDFLASH_MAGIC, PYDFLASH_OP_STORE_KV,   "store_kv",   pydflash_store_kv_cpu   },
    [PYDFLASH_OP_ARGMAX]     = { PYDFLASH_MAGIC, PYDFLASH_OP_ARGMAX,     "argmax",     pydflash_argmax_cpu     },
    [PYDFLASH_OP_RMS_NORM]   = { PYDFLASH_MAGIC, PYDFLASH_OP_RMS_NORM,   "rms_norm",   pydflash_rms_norm_cpu   },
    [PYDFLASH_OP_SIGMOID_GATE] = { PYDFLASH_MAGIC, PYDFLASH_OP_SIGMOID_GATE, "sigmoid_gate", pydflash_sigmoid_gate_cpu },
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
        // ggml puts the tensor itself before the sources; ours are numbered as the contract numbers them.
        memset(node->src, 0, sizeof(node->src));
        memcpy(node->src, src, (size_t) n_src * sizeof(src[0]));
    } else {
        node = ggml_custom_4d(ctx, type, ne[0], ne[1], ne[2], ne[3], src, n_src, op->cpu, GGML_N_TASKS_MAX,
                              (void *) (uintptr_t) op);
    }
    memcpy((void *) (uintptr_t) pydflash_node_params(node), params, PYDFLASH_MAX_PARAMS * sizeof(int32_t));
    return node;
}
