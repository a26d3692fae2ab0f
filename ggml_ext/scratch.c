// Memory in which a thread works on one node. It is allocated before a graph runs, so that no thread of a pool can find
// that there is none, and belongs to the back end and not to the threads, of which a program may start many.
#include "ext.h"

#include "ggml-backend.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096  // threads share no cache line, and no page

// A block is never moved or freed before the end: another graph may be at work in it while this one asks for more.
// Each is at least twice as large as the one before, so that all of them are at most twice the last.
struct block {
    struct block * before;
    char *         memory;  // `threads` pieces of `each` bytes
    size_t         each;
};

struct pydflash_scratch {
    size_t                  threads;
    _Atomic(struct block *) last;
};

struct pydflash_scratch * pydflash_scratch_new(int threads) {
    struct pydflash_scratch * scratch = (struct pydflash_scratch *) calloc(1, sizeof(*scratch));
    if (scratch) {
        scratch->threads = (size_t) threads;
    }
    return scratch;
}

void pydflash_scratch_free(struct pydflash_scratch * scratch) {
    for (struct block * block = scratch->last; block;) {
        struct block * before = block->before;
        free(block->memory);
        free(block);
        block = before;
    }
    free(scratch);
}

static bool grow(struct pydflash_scratch * scratch, size_t each) {
    struct block * before = scratch->last;
    if (before && before->each >= each) {
        return true;
    }
    each = before && each < 2 * before->each ? 2 * before->each : (each + PAGE - 1) / PAGE * PAGE;
    struct block * block = (struct block *) malloc(sizeof(*block));
    char * memory = (char *) aligned_alloc(PAGE, scratch->threads * each);
    if (!block || !memory) {
        free(block);
        free(memory);
        return false;
    }
    *block = (struct block) { before, memory, each };
    atomic_store_explicit(&scratch->last, block, memory_order_release);
    return true;
}

size_t pydflash_graph_scratch_size(struct ggml_cgraph * cgraph) {
    size_t most = 0;
    for (int i = 0; i < ggml_graph_n_nodes(cgraph); i++) {
        const struct ggml_tensor * node = ggml_graph_node(cgraph, i);
        const struct pydflash_op * op   = pydflash_node_op(node);
        const size_t size = op && op->scratch ? op->scratch(node) : 0;
        most = size > most ? size : most;
    }
    return most;
}

// The pointer follows the static parameters of a node.
static void * place(const struct ggml_tensor * node) {
    return (void *) (uintptr_t) (pydflash_node_params(node) + PYDFLASH_MAX_PARAMS);
}

bool pydflash_graph_set_scratch(struct ggml_cgraph * cgraph, struct pydflash_scratch * scratch) {
    if (!grow(scratch, pydflash_graph_scratch_size(cgraph))) {
        return false;
    }
    for (int i = 0; i < ggml_graph_n_nodes(cgraph); i++) {
        struct ggml_tensor * node = ggml_graph_node(cgraph, i);
        const struct pydflash_op * op = pydflash_node_op(node);
        if (op && op->scratch) {
            memcpy(place(node), &scratch, sizeof(scratch));
        }
    }
    return true;
}

void * pydflash_node_scratch(const struct ggml_tensor * node, int ith) {
    struct pydflash_scratch * scratch;
    memcpy(&scratch, place(node), sizeof(scratch));
    GGML_ASSERT(scratch != NULL && (size_t) ith < scratch->threads);
    const struct block * block = atomic_load_explicit(&scratch->last, memory_order_acquire);
    return block->memory + (size_t) ith * block->each;
}
