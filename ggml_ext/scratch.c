// Memory in which a thread works on one node. It is allocated before a graph runs, so that no thread of a pool can find
// that there is none, and belongs to the back end and not to the threads, of which a program may start many. A back end
// runs one graph at a time, and none while the memory grows for another (pydflash/device_lock.py).
#include "ext.h"

#include "ggml-backend.h"

#include <stdlib.h>
#include <string.h>

#define PAGE 4096  // threads share no cache line, and no page

struct pydflash_scratch {
    size_t threads;
    size_t each;    // bytes of a thread's piece, whole pages
    char * memory;
};

struct pydflash_scratch * pydflash_scratch_new(int threads) {
    struct pydflash_scratch * scratch = (struct pydflash_scratch *) calloc(1, sizeof(*scratch));
    if (scratch) {
        scratch->threads = (size_t) threads;
    }
    return scratch;
}

void pydflash_scratch_free(struct pydflash_scratch * scratch) {
    free(scratch->memory);
    free(scratch);
}

static bool grow(struct pydflash_scratch * scratch, size_t each) {
    if (each > scratch->each) {
        char * memory = (char *) aligned_alloc(PAGE, scratch->threads * each);
        if (!memory) {
            return false;  // graphs that need no more than there is still run
        }
        free(scratch->memory);
        scratch->memory = memory;
        scratch->each   = each;
    }
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
    return (most + PAGE - 1) / PAGE * PAGE;
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
    return scratch->memory + (size_t) ith * scratch->each;
}
