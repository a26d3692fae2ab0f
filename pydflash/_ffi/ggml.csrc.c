/* The shim between cffi and ggml: what needs a struct, a macro, a callback or dlopen. */
#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ext.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char * pydflash_build_info(void) {
    return PYDFLASH_BUILD_INFO;
}

/* CUDA is loaded on first use, so that a machine without a driver can still import the package. Returns NULL or why not. */
static ggml_backend_t (*cuda_init)(int device);
static int (*cuda_device_count)(void);
static pid_t cuda_process;  /* a child of fork() cannot use what its parent initialised */

static const char * pydflash_cuda_load(const char * path) {
    if (cuda_init) {
        return NULL;
    }
    void * library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        return dlerror();
    }
    *(void **) &cuda_device_count = dlsym(library, "ggml_backend_cuda_get_device_count");
    *(void **) &cuda_init         = dlsym(library, "ggml_backend_cuda_init");
    cuda_process = getpid();
    return cuda_init && cuda_device_count ? NULL : "the library lacks ggml_backend_cuda_init";
}

static bool pydflash_cuda_forked(void) {
    return cuda_init && cuda_process != getpid();
}

static int pydflash_cuda_device_count(void) {
    return cuda_device_count ? cuda_device_count() : 0;
}

static ggml_backend_t pydflash_cuda_init(int device) {
    return cuda_init ? cuda_init(device) : NULL;
}

/* A thread pool that lives as long as its back end; polling keeps the gaps between nodes short. */
static struct ggml_threadpool * pydflash_threadpool_new(int n_threads) {
    struct ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    return ggml_threadpool_new(&params);
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
