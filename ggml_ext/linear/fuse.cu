#include "fuse.cuh"

#include "linear.cuh"

#include "ggml-impl.h"

#include <atomic>

namespace {

bool is_noop(const ggml_tensor * t) {
    return t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE ||
           t->op == GGML_OP_NONE;
}

bool is_linear(const ggml_tensor * t) {
    const pydflash_op * op = pydflash_node_op(t);
    return op && op->id == PYDFLASH_OP_LINEAR && t->src[0]->ne[1] <= PYDFLASH_EXACT_ROWS;
}

bool is_unary(const ggml_tensor * t, ggml_unary_op op) {
    return t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == op;
}

// A tensor without the reshapes around it: the same values in the same order.
const ggml_tensor * unshaped(const ggml_tensor * t) {
    while (t->op == GGML_OP_RESHAPE) {
        t = t->src[0];
    }
    return t;
}

int uses(const ggml_cgraph * graph, const ggml_tensor * t) {
    const size_t slot = ggml_hash_find(&graph->visited_hash_set, t);
    return ggml_bitset_get(graph->visited_hash_set.used, slot) ? graph->use_counts[slot] : 0;
}

// Whether nothing but `count` nodes of the run reads t, through one chain of reshapes that ends at `seen`.
bool read_only_by(const ggml_cgraph * graph, const ggml_tensor * t, const ggml_tensor * seen, int count) {
    for (const ggml_tensor * at = seen; at != t; at = at->src[0]) {
        if (at->op != GGML_OP_RESHAPE || uses(graph, at) != count) {
            return false;
        }
        count = 1;
    }
    return uses(graph, t) == count && !(t->flags & GGML_TENSOR_FLAG_OUTPUT);
}

// Steps through the nodes, passing over views.
struct cursor {
    const ggml_cgraph * graph;
    int                 at;

    const ggml_tensor * node() const { return at < graph->n_nodes ? graph->nodes[at] : nullptr; }
    const ggml_tensor * next() {
        do { at++; } while (at < graph->n_nodes && is_noop(graph->nodes[at]));
        return node();
    }
};

// The projections of one input that stand side by side, and the residual addition after a single one.
struct products {
    pydflash_linear_weight weights[PYDFLASH_LINEAR_MAX_WEIGHTS];
    const ggml_tensor *    input = nullptr;
    int                    count = 0;
    int                    last  = 0;  // index of the last node covered

    int64_t rows() const { return input->ne[1]; }
    int64_t columns() const { return input->ne[0]; }
};

float * f32(const ggml_tensor * t) { return (float *) t->data; }
int64_t row_stride(const ggml_tensor * t) { return (int64_t) (t->nb[1] / sizeof(float)); }

void add_weight(products & p, const ggml_tensor * node) {
    const ggml_tensor * w = node->src[1];
    p.weights[p.count++] = { w->data, w->type, w->ne[1], (int64_t) w->nb[1], f32(node), row_stride(node), nullptr, 0 };
}

void take_residual(products & p, cursor c) {
    const ggml_tensor * product = c.node();
    const ggml_tensor * add     = c.next();
    if (!add || add->op != GGML_OP_ADD || uses(c.graph, product) != 1 || (product->flags & GGML_TENSOR_FLAG_OUTPUT)) {
        return;
    }
    const int           side  = add->src[1] == product ? 1 : add->src[0] == product ? 0 : -1;
    const ggml_tensor * other = side < 0 ? nullptr : add->src[1 - side];
    if (!other || !ggml_are_same_shape(other, product) || !ggml_is_contiguous(other) || other->type != GGML_TYPE_F32) {
        return;
    }
    pydflash_linear_weight & w = p.weights[0];
    w.out = f32(add); w.out_stride = row_stride(add);
    w.residual = f32(other); w.residual_stride = row_stride(other);
    p.last = c.at;
}

// Collects from the cursor's node on; false when it is not a projection that the kernel takes.
bool collect(products & p, cursor c) {
    const ggml_tensor * node = c.node();
    if (!node || !is_linear(node)) {
        return false;
    }
    p.input = node->src[0];
    cursor end = c;
    while (node && p.count < PYDFLASH_LINEAR_MAX_WEIGHTS && is_linear(node) && node->src[0] == p.input &&
           pydflash_linear_supports(node->src[1]->type, (int64_t) node->src[1]->nb[1], p.columns())) {
        add_weight(p, node);
        p.last = c.at;
        end    = c;
        node   = c.next();
    }
    if (p.count == 1) {
        take_residual(p, end);
    }
    return p.count > 0;
}

struct buffers {
    void * packed;
    void * scratch;
    buffers(pydflash_cuda * cuda, const products & p)
        : packed(cuda->alloc(cuda, pydflash_linear_packed_size(p.rows(), p.columns()))),
          scratch(cuda->alloc(cuda, pydflash_linear_scratch_size(cuda))) {}
};

bool multiply(pydflash_cuda * cuda, const products & p, const buffers & b) {
    return pydflash_linear_multiply(cuda, b.packed, p.rows(), p.columns(), p.weights, p.count, b.scratch);
}

bool fuse_linear(pydflash_cuda * cuda, cursor c, products & p) {
    if (!collect(p, c) || p.last == c.at) {
        return false;  // a single product stands alone (linear.cu)
    }
    const buffers b(cuda, p);
    return pydflash_linear_pack(cuda, f32(p.input), row_stride(p.input), p.rows(), p.columns(), b.packed) &&
           multiply(cuda, p, b);
}

bool fuse_swiglu(pydflash_cuda * cuda, cursor c, products & p) {
    const ggml_tensor * glu = c.node();
    if (ggml_get_glu_op(glu) != GGML_GLU_OP_SWIGLU || !glu->src[1]) {
        return false;
    }
    c.next();
    if (!collect(p, c) || unshaped(p.input) != glu || !read_only_by(c.graph, glu, p.input, p.count)) {
        return false;
    }
    const buffers b(cuda, p);
    return pydflash_linear_pack_swiglu(cuda, f32(glu->src[0]), row_stride(glu->src[0]), f32(glu->src[1]),
                                       row_stride(glu->src[1]), p.rows(), p.columns(), b.packed) &&
           multiply(cuda, p, b);
}

// The weight of a norm that starts at the cursor (rms_norm, mul by a vector); moves the cursor to the mul.
const ggml_tensor * norm_weight(cursor & c) {
    const ggml_tensor * norm = c.node();
    const ggml_tensor * mul  = c.next();
    if (!mul || mul->op != GGML_OP_MUL || mul->src[0] != norm || !read_only_by(c.graph, norm, norm, 1)) {
        return nullptr;
    }
    const ggml_tensor * weight = mul->src[1];
    return weight->type == GGML_TYPE_F32 && ggml_nelements(weight) == norm->ne[0] ? weight : nullptr;
}

bool fuse_rms_norm(pydflash_cuda * cuda, cursor c, products & p) {
    const ggml_tensor * norm   = c.node();
    const ggml_tensor * x      = norm->src[0];
    const ggml_tensor * weight = norm_weight(c);
    const ggml_tensor * mul    = c.node();
    if (!weight || norm->ne[2] != 1) {
        return false;
    }
    c.next();
    if (!collect(p, c) || p.input != mul || !read_only_by(c.graph, mul, mul, p.count)) {
        return false;
    }
    const buffers b(cuda, p);
    const float   eps = ggml_get_op_params_f32(norm, 0);
    return pydflash_linear_pack_rms_norm(cuda, f32(x), row_stride(x), f32(weight), eps, p.rows(), p.columns(),
                                         b.packed) &&
           multiply(cuda, p, b);
}

bool fuse_gated_norm(pydflash_cuda * cuda, cursor c, products & p) {
    const ggml_tensor * norm   = c.node();
    const ggml_tensor * o      = norm->src[0];
    const ggml_tensor * weight = norm_weight(c);
    const ggml_tensor * scaled = c.node();
    if (!weight || norm->ne[0] != PYDFLASH_LINEAR_GATED_NORM_HEAD || !ggml_is_contiguous(o) ||
        !read_only_by(c.graph, scaled, scaled, 1)) {
        return false;
    }
    const ggml_tensor * silu = c.next();
    if (!silu || !is_unary(silu, GGML_UNARY_OP_SILU) || !ggml_is_contiguous(silu->src[0]) ||
        !read_only_by(c.graph, silu, silu, 1)) {
        return false;
    }
    const ggml_tensor * gated = c.next();
    if (!gated || gated->op != GGML_OP_MUL || gated->src[0] != scaled || gated->src[1] != silu) {
        return false;
    }
    c.next();
    if (!collect(p, c) || unshaped(p.input) != gated || !read_only_by(c.graph, gated, p.input, p.count)) {
        return false;
    }
    const buffers b(cuda, p);
    const float   eps = ggml_get_op_params_f32(norm, 0);
    return pydflash_linear_pack_gated_norm(cuda, f32(o), f32(silu->src[0]), f32(weight), eps, p.rows(), p.columns(),
                                           b.packed) &&
           multiply(cuda, p, b);
}

bool fuse_sigmoid_gate(pydflash_cuda * cuda, cursor c, products & p) {
    const ggml_tensor * dense = c.node();
    const ggml_tensor * gate  = dense->src[0];  // (T, H, D), between the query heads
    const ggml_tensor * sigmoid = c.next();
    if (!sigmoid || !is_unary(sigmoid, GGML_UNARY_OP_SIGMOID) || sigmoid->src[0] != dense || gate->type != GGML_TYPE_F32 ||
        !read_only_by(c.graph, dense, dense, 1) || !read_only_by(c.graph, sigmoid, sigmoid, 1)) {
        return false;
    }
    const ggml_tensor * gated = c.next();
    if (!gated || gated->op != GGML_OP_MUL || gated->src[1] != sigmoid || !ggml_is_contiguous(gated->src[0])) {
        return false;
    }
    c.next();
    if (!collect(p, c) || unshaped(p.input) != gated || !read_only_by(c.graph, gated, p.input, p.count)) {
        return false;
    }
    const buffers b(cuda, p);
    return pydflash_linear_pack_sigmoid_gate(cuda, f32(gated->src[0]), f32(gate), (int64_t) (gate->nb[2] / sizeof(float)),
                                             row_stride(gate), (int) gate->ne[0], p.rows(), p.columns(), b.packed) &&
           multiply(cuda, p, b);
}

std::atomic<int64_t> fused_runs[PYDFLASH_FUSED_KINDS];

}  // namespace

int64_t pydflash_fused_runs(int kind) { return fused_runs[kind]; }

int pydflash_fuse(pydflash_cuda * cuda, ggml_cgraph * cgraph, int i) {
    const ggml_tensor * node = cgraph->nodes[i];
    const cursor c = { cgraph, i };
    products            p;
    pydflash_fused_kind kind  = PYDFLASH_FUSED_LINEAR;
    bool                fused = false;
    if (node->op == GGML_OP_CUSTOM) {
        fused = is_linear(node) && fuse_linear(cuda, c, p);
    } else if (node->op == GGML_OP_GLU) {
        kind  = PYDFLASH_FUSED_SWIGLU;
        fused = fuse_swiglu(cuda, c, p);
    } else if (node->op == GGML_OP_RMS_NORM) {
        kind  = PYDFLASH_FUSED_RMS_NORM;
        fused = fuse_rms_norm(cuda, c, p);
        if (!fused) {
            p     = products();
            kind  = PYDFLASH_FUSED_GATED_NORM;
            fused = fuse_gated_norm(cuda, c, p);
        }
    } else if (node->op == GGML_OP_CONT) {
        kind  = PYDFLASH_FUSED_SIGMOID_GATE;
        fused = fuse_sigmoid_gate(cuda, c, p);
    }
    if (!fused) {
        return 0;
    }
    fused_runs[kind]++;
    return p.last - i;
}
