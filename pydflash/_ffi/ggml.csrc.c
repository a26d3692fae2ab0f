/* The shim between cffi and ggml: what needs a struct, a macro, a callback or dlopen. */
#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ext.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const char * pydflash_build_info(void) {
    return PYDFLASH_BUILD_INFO;
}

/* CUDA is loaded on first use, so that a machine without a driver can still import the package. Returns NULL or why not. */
static ggml_backend_t (*cuda_init)(int device);
static int (*cuda_device_count)(void);
static int64_t (*cuda_fused_runs)(int kind);
static pid_t cuda_process;  /* a child of fork() cannot use what its parent initialised */

static const char * pydflash_cuda_load(const char * path) {
    if (cuda_init) {
        return NULL;
    }
    void * library = dlopen(path, RTLD_NOW | RTLD_LOCAL);  /* cuBLAS and the rest are not for other libraries to find */
    if (!library) {
        return dlerror();
    }
    *(void **) &cuda_device_count = dlsym(library, "ggml_backend_cuda_get_device_count");
    *(void **) &cuda_init         = dlsym(library, "ggml_backend_cuda_init");
    *(void **) &cuda_fused_runs   = dlsym(library, "pydflash_fused_runs");
    cuda_process = getpid();
    return cuda_init && cuda_device_count ? NULL : "the library lacks ggml_backend_cuda_init";
}

static bool pydflash_cuda_forked(void) {
    return cuda_init && cuda_process != getpid();
}

static int pydflash_cuda_device_count(void) {
    return cuda_device_count ? cuda_device_count() : 0;
}

static int64_t pydflash_cuda_fused_runs(int kind) {
    return cuda_fused_runs ? cuda_fused_runs(kind) : 0;
}

static ggml_backend_t pydflash_cuda_init(int device) {
    return cuda_init ? cuda_init(device) : NULL;
}

/* Bytes between a tensor and the host. */
struct pydflash_copy {
    struct ggml_tensor * tensor;
    void *               data;
    size_t               size;
};

/* Can `size` bytes be allocated now? ggml asserts that its allocations succeed. */
static bool pydflash_can_allocate(size_t size) {
    void * memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory != MAP_FAILED && munmap(memory, size) == 0;
}

/* The stack of the calling thread: its lowest address, which does not change, and its size. */
static char * stack_end(size_t * size) {
    pthread_attr_t attributes;
    void * lowest = NULL;
    *size = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &lowest, size);
        pthread_attr_destroy(&attributes);
    }
    return (char *) lowest;
}

static int64_t pydflash_stack_left(void) {
    static _Thread_local char * lowest;  /* the main thread's is found by reading /proc/self/maps */
    char   here;
    size_t size;
    if (!lowest) {
        lowest = stack_end(&size);
    }
    return lowest ? &here - lowest : INT64_MAX;
}

/* Threads that do nothing but exist together, as those of a pool will: ggml asserts that each of them starts. Returns 0;
 * an errno when one does not start, or when `left` bytes cannot be allocated beside them; -1 when the stack of one is
 * smaller than `stack` bytes. */
struct rehearsal {
    pthread_mutex_t all_started;
    size_t          stack;
    atomic_bool     is_small;
};

static void * rehearse(void * data) {
    struct rehearsal * r = (struct rehearsal *) data;
    size_t size;
    if (stack_end(&size) && size < r->stack) {
        r->is_small = true;
    }
    pthread_mutex_lock(&r->all_started);
    pthread_mutex_unlock(&r->all_started);
    return NULL;
}

static int pydflash_threads_try(int count, size_t stack, size_t left) {
    struct rehearsal r = { PTHREAD_MUTEX_INITIALIZER, stack, false };
    pthread_t * threads = calloc((size_t) count + 1, sizeof(threads[0]));
    int started = 0, error = threads ? 0 : ENOMEM;
    pthread_mutex_lock(&r.all_started);
    while (!error && started < count) {
        error = pthread_create(&threads[started], NULL, rehearse, &r);
        started += !error;
    }
    if (!error && !pydflash_can_allocate(left)) {
        error = ENOMEM;
    }
    pthread_mutex_unlock(&r.all_started);
    while (started > 0) {
        pthread_join(threads[--started], NULL);
    }
    free(threads);
    return error ? error : r.is_small ? -1 : 0;
}

/* A thread pool that lives as long as its back end; polling keeps the gaps between nodes short. */
static struct ggml_threadpool * pydflash_threadpool_new(int n_threads) {
    struct ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    return ggml_threadpool_new(&params);
}

/* An upper bound of the leaves of a graph of the tensors in a context, whose operands may lie elsewhere. */
static size_t pydflash_context_operands(const struct ggml_context * ctx) {
    size_t count = 0;
    for (struct ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        for (int i = 0; i < GGML_MAX_SRC && t->src[i]; i++) {
            count++;
        }
    }
    return count;
}

/* Bytes that the CPU back end will allocate for a graph when it first runs it. */
static size_t pydflash_graph_work_size(struct ggml_cgraph * cgraph, int n_threads) {
    return ggml_graph_plan(cgraph, n_threads, NULL).work_size;
}

/* A step in one call, so that a thread waits for Python's interpreter lock once: inputs to the device, the graph, results
 * to the host. Without results it does not wait for the device. Returns a ggml_status, or -1 when the thread has less
 * than `stack` bytes of its stack left and nothing was done. */
static int pydflash_step(ggml_backend_t backend, struct ggml_cgraph * graph, int64_t stack, const struct pydflash_copy * inputs,
                         int n_inputs, const struct pydflash_copy * results, int n_results) {
    if (pydflash_stack_left() < stack) {
        return -1;
    }
    for (int i = 0; i < n_inputs; i++) {
        ggml_backend_tensor_set_async(backend, inputs[i].tensor, inputs[i].data, 0, inputs[i].size);
    }
    enum ggml_status status = ggml_backend_graph_compute_async(backend, graph);
    for (int i = 0; i < n_results && status == GGML_STATUS_SUCCESS; i++) {
        ggml_backend_tensor_get_async(backend, results[i].tensor, results[i].data, 0, results[i].size);
    }
    if (n_results) {
        ggml_backend_synchronize(backend);
    }
    return status;
}

/* ggml's log lines: only the last complete warning or error is kept, for the message of a NativeError. */
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static char            log_line[512];

static void log_keep(enum ggml_log_level level, const char * text, void * user_data) {
    (void) user_data;
    if (level != GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_ERROR) {
        return;
    }
    pthread_mutex_lock(&log_lock);
    snprintf(log_line, sizeof(log_line), "%s", text);
    log_line[strcspn(log_line, "\n")] = 0;
    pthread_mutex_unlock(&log_lock);
}

static void pydflash_log_start(void) {
    ggml_log_set(log_keep, NULL);
}

static int pydflash_log_last(char * line, int size) {
    pthread_mutex_lock(&log_lock);
    snprintf(line, (size_t) size, "%s", log_line);
    log_line[0] = 0;
    pthread_mutex_unlock(&log_lock);
    return (int) strlen(line);
}
